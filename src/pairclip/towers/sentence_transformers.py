"""Image models of sentence-transformers: taken apart, and described for it in a tower's folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairclip._files import read_json, write_json, write_tensors
from pairclip.towers.hub import CONFIG
from pairclip.towers.ranges import WHOLE

if TYPE_CHECKING:
    from pairclip.towers.body import Body

_MODULES = "modules.json"
_PACKAGE = "sentence_transformers.base.modules"


def parts_of(source: Any) -> tuple[Any, Any] | None:
    """Model of `transformers` and image processor in a `SentenceTransformer`, or None.

    Raises:
        ValueError: If its embeddings are more than its model's, scaled to unit length, or it has no
            such model.
    """
    library = sys.modules.get("sentence_transformers")
    if library is None or not isinstance(source, library.SentenceTransformer):
        return None
    first, *others = source
    _check_nothing_follows([type(part).__name__ for part in others])
    if not (hasattr(first, "auto_model") and hasattr(first, "processor")):
        raise ValueError(
            f"`source` is a SentenceTransformer that begins with a {type(first).__name__}, so it "
            "has no image model of transformers."
        )
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


def describe(tower: Body, folder: Path) -> None:
    """Write beside a model what lets `SentenceTransformer(folder)` give the tower's embeddings."""
    model: Any = tower._bare()
    whole = hasattr(model, "get_image_features")
    method = "get_image_features" if whole else "forward"
    of_image = {"method": method, "method_output_name": "pooler_output"}
    modules = [("", "transformer.Transformer")]
    if hasattr(model, "visual_projection") and not whole:
        # Its AutoModel loads the model without the projection.
        modules.append(("1_Dense", "dense.Dense"))
        weight = tower._merged_weights()["visual_projection.weight"]
        (folder / "1_Dense").mkdir()
        with (folder / "1_Dense" / WHOLE).open("wb") as file:
            write_tensors(file, {"linear.weight": weight}, {"format": "pt"})
        dense = {
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        write_json(folder / "1_Dense" / CONFIG, dense, indent=2)
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_PACKAGE}.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(folder / _MODULES, listed, indent=2)
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": of_image},
        "module_output_name": "sentence_embedding",
    }
    write_json(folder / "sentence_bert_config.json", settings, indent=2)
    kind = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", kind, indent=2)
