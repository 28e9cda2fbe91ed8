"""Write a tower for other programs: as an ONNX file, or as the folder that its library loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pairclip.command import outputs
from pairclip.command.arguments import add_json, add_model
from pairclip.command.models import check_model, load_model

_LIBRARIES = ("transformers", "sentence-transformers", "open_clip", "timm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    add_model(parser, "model", "the tower", metavar="MODEL")
    parser.add_argument(
        "--to",
        choices=("onnx", *_LIBRARIES),
        required=True,
        help="onnx writes a file, from pixel values to embeddings; the others the folder of that "
        "library, which must be the one that MODEL is of: transformers (and so "
        "sentence-transformers), open_clip or timm",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a file that ends with .onnx, or a folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUTPUT")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the weights; float16 takes half the room",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say."""
    onnx = args.to == "onnx"
    is_other = args.output.is_dir() if onnx else args.output.is_file()
    if is_other or onnx != (args.output.suffix == ".onnx"):
        wanted = "a file that ends with .onnx" if onnx else f"a folder, for --to {args.to}"
        raise ValueError(f"--output '{args.output}' must be {wanted}.")
    # An empty folder has nothing to lose; beside an ONNX file there is one that describes it.
    if onnx or not args.output.exists() or any(args.output.iterdir()):
        outputs.check_new("--output", args.output, args.overwrite)
    if onnx:
        outputs.check_new("--output", args.output.with_suffix(".json"), args.overwrite)
    check_model("MODEL", args.model)

    import torch

    tower = load_model("MODEL", args.model, "cpu")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, args.dtype)
    if onnx:
        return tower.export_onnx(args.output, dtype=dtype)
    return _save(tower, args.output, args.to, dtype)


def _save(tower: Any, folder: Path, library: str, dtype: Any) -> dict[str, Any]:
    """Write the folder, load it again, and compare embeddings of noise."""
    import numpy as np

    import pairclip
    from pairclip.towers.open_clip_tower import OpenClipTower
    from pairclip.towers.timm_tower import TimmTower

    kinds = {OpenClipTower: "open_clip", TimmTower: "timm"}
    own = next((name for kind, name in kinds.items() if isinstance(tower, kind)), "transformers")
    if library != own and (library, own) != ("sentence-transformers", "transformers"):
        raise ValueError(
            f"--to {library} needs a model of {library.replace('sentence-', '')}, and MODEL is of "
            f"{own}. Give --to {own}, or --to onnx, which takes any."
        )
    noise = np.random.default_rng(0).integers(0, 256, (3, 200, 300, 3), dtype=np.uint8)
    expected = pairclip.embed_images(tower, noise)
    tower.to(dtype).save_pretrained(folder)
    embeddings = pairclip.embed_images(pairclip.load_tower(folder), noise)
    apart = float((embeddings - expected).abs().max() / expected.abs().max())
    print(f"'{folder}': embeddings of {len(noise)} images differ by at most {apart:.1e}.")
    return {
        "library": library,
        "dtype": str(dtype).removeprefix("torch."),
        "fingerprint": tower.fingerprint(),
        "parity": {"images": len(noise), "largest_difference": apart},
    }
