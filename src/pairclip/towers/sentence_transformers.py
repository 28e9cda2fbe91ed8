"""Image models of sentence-transformers: taken apart, and described for it in a tower's folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from pairclip._files import read_json
from pairclip.towers.hub import CONFIG

if TYPE_CHECKING:
    from pairclip.towers.stored import Stored

_MODULES = "modules.json"
_PACKAGE = "sentence_transformers.base.modules"


def parts_of(source: Any) -> tuple[Any, Any] | None:
    """Model of `transformers` and image processor in a `SentenceTransformer`, or None.

    Raises:
        ValueError: If its embeddings are more than its model's, scaled to unit length.
    """
    library = sys.modules.get("sentence_transformers")
    if library is None or not isinstance(source, library.SentenceTransformer):
        return None
    first, *others = source
    _check_nothing_follows([type(part).__name__ for part in others])
    processor = first.processor
    return first.auto_model, getattr(processor, "image_processor", processor)


def folder_of_model(folder: Path) -> Path:
    """Where in a folder of sentence-transformers the model of `transformers` is.

    Raises:
        ValueError: If its embeddings are more than its model's, scaled to unit length.
    """
    if not (folder / _MODULES).is_file():
        return folder
    first, *others = read_json(folder / _MODULES)
    config: Path = folder / first["path"] / CONFIG
    kinds = [module["type"].rpartition(".")[2] for module in others]
    # A projection in the model is once more beside it, for those who load the model without.
    if config.is_file() and "WithProjection" in str(read_json(config).get("architectures")):
        kinds = kinds[kinds[:1] == ["Dense"] :]
    _check_nothing_follows(kinds)
    return config.parent


def _check_nothing_follows(kinds: list[str]) -> None:
    more = [kind for kind in kinds if kind != "Normalize"]
    if more:
        raise ValueError(
            f"`source` is a SentenceTransformer whose model is followed by {', '.join(more)}, so "
            "its embeddings are not its model's. Give the folder or id that it came from, or wrap "
            "it in a module of its own and pass `image_processor`."
        )


def describe(tower: Stored, folder: Path) -> None:
    """Write beside a model what lets `SentenceTransformer(folder)` give the tower's embeddings."""
    model: Any = tower._bare()
    whole = hasattr(model, "get_image_features")
    method = "get_image_features" if whole else "forward"
    of_image = {"method": method, "method_output_name": "pooler_output"}
    modules = [_module(0, "", f"{_PACKAGE}.transformer.Transformer")]
    if hasattr(model, "visual_projection") and not whole:
        # Its AutoModel loads the model without the projection.
        modules.append(_module(1, "1_Dense", f"{_PACKAGE}.dense.Dense"))
        weight = tower._merged_weights()["visual_projection.weight"].detach().cpu()
        (folder / "1_Dense").mkdir()
        values = {"linear.weight": weight.contiguous().clone()}
        save_file(values, folder / "1_Dense" / "model.safetensors")
        _write(
            folder / "1_Dense" / "config.json",
            {
                "in_features": weight.shape[1],
                "out_features": weight.shape[0],
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
    _write(folder / _MODULES, modules)
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"image": of_image},
            "module_output_name": "sentence_embedding",
        },
    )
    _write(
        folder / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    )


def _module(index: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": kind}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
