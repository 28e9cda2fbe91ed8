"""Search a folder of images with an image.

    python examples/image_search.py FOLDER QUERY                 # CLIP, downloaded
    python examples/image_search.py FOLDER QUERY --model FOLDER  # a local tower, say a tuned one
    python examples/image_search.py --offline                    # no network: drawings

Indexes the images of FOLDER, however they are nested, prints those nearest to QUERY, and writes
them as a page into --output. The index stays there for the next call with this folder and tower.
It is `pairclip index` and `pairclip search` in one call; what they do with an index is in
`pairclip.command.index` and `pairclip.command.search`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pairclip.command import index, search
from pairclip.command.arguments import (
    CLIP,
    HelpFormatter,
    add_json,
    add_loading,
    add_model,
    whole_number,
)
from pairclip.command.running import obey

OFFLINE = Path(__file__).parent / "offline"
OFFLINE_NOTE = (
    "offline stand-in: drawings made by a program and a small tower trained on Tiny-ImageNet, "
    "not your images and CLIP"
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="images to search, in folders of any layout")
    add("query", type=Path, nargs="?", help="image to search with")
    add("-k", type=whole_number(1), default=12, help="images to find")
    add_model(parser, "--model", "the tower", default=CLIP, metavar="ID_OR_FOLDER")
    output = Path("runs/search")
    add("--output", type=Path, default=output, help="where the index and the page go")
    add("--offline", action="store_true", help="needs no network: drawings and a small tower")
    add_loading(parser)
    add_json(parser)
    parser.set_defaults(min_score=None, overwrite=True)
    args = parser.parse_args(arguments)
    if args.offline and (args.folder or args.model != CLIP):
        extra = "FOLDER and QUERY" if args.folder else "--model"
        parser.error(f"--offline brings its own images and tower: leave out {extra}")
    if not args.offline and not (args.folder and args.query):
        parser.error("give FOLDER and QUERY, or --offline")
    return args


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Index the folder or use its index, search, print and write a page."""
    if args.offline:
        print(f"OFFLINE: {OFFLINE_NOTE}.", file=sys.stderr)
        args.model = str(OFFLINE / "tower")
        args.folder, args.query = offline_images(args.output / "offline")
    # Before the indexing, which may take long.
    search.check_queries([args.query])
    settings = vars(args)
    index.run(argparse.Namespace(**settings | {"output": args.output / "index"}))
    places = {"index": args.output / "index", "queries": [args.query], "html": args.output}
    return search.run(argparse.Namespace(**settings | places | {"model": None}))


def offline_images(folder: Path) -> tuple[Path, Path]:
    """Twenty-five drawings of each kind as image files, and another one to search with."""
    sys.path.insert(0, str(OFFLINE))
    from drawings import draw, save
    from numpy.random import default_rng

    query = folder / "query.png"
    if not query.exists():  # new files would look like a changed folder
        save(folder / "images", per_class=25)
        draw("butterfly", default_rng(7)).save(query)
    return folder / "images", query


def main(arguments: list[str] | None = None) -> int:
    """Search; the exit code."""
    return obey(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
