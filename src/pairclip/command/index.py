"""Embed the images of a folder, once, so that `pairclip search` finds the most similar ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pairclip
from pairclip.command import outputs
from pairclip.command.arguments import add_json, add_loading, add_model
from pairclip.command.models import check_model, load_model

CONTENTS = "contents.json"
_HEADER = "image_index.json"  # of the library's index
_SHOWN_PROBLEMS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    add_model(parser, "model", "the tower", metavar="MODEL")
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="images to search, in folders of any layout"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="INDEX",
        help="folder for the index; the index that is there is used where nothing has changed, "
        "else replaced",
    )
    add_loading(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output '{args.output}' is a file. Give a folder for the index.")
    if not args.folder.is_dir():  # said below, in words
        image_files("FOLDER", args.folder)
    check_model("MODEL", args.model)
    outputs.check_writable("--output", args.output)
    if (args.output / CONTENTS).exists() != (args.output / _HEADER).exists():
        raise ValueError(
            f"--output '{args.output}' has files that `pairclip index` did not write, or not to "
            f"the end: {CONTENTS} without {_HEADER}, or the reverse. Give another folder, "
            "or remove them."
        )
    files = image_files("FOLDER", args.folder)
    tower = load_model("MODEL", args.model)
    # A search may start elsewhere.
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    index = index_of(files, tower, model, args.output, args)
    print(f"Images in {args.output}: {len(index):,}.")
    left_out = read_contents(args.output)["unreadable"]
    return {"index": str(args.output), "images": len(index), "unreadable": left_out}


def image_files(name: str, folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each image in a folder, however deep."""
    from pairclip.datasets import image_files as files_of

    if not folder.exists():
        raise FileNotFoundError(f"{name} '{folder}' does not exist.")
    if not folder.is_dir():
        raise ValueError(f"{name} '{folder}' is a file. Give a folder of images.")
    paths = files_of(folder.resolve())
    if not paths:
        raise ValueError(f"{name} '{folder}' has no images.")
    print(f"Images in {folder}: {len(paths):,}.")
    stats = [(path, Path(path).stat()) for path in paths]
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats}


def index_of(
    files: dict[str, list[int]],
    tower: pairclip.VisionTower,
    model: str,
    saved: Path,
    args: argparse.Namespace,
) -> pairclip.ImageIndex:
    """The saved index where files and tower are as they were, else a new one, saved."""
    if (saved / CONTENTS).is_file():
        try:
            index = pairclip.ImageIndex.load(saved, tower)
            before = read_contents(saved)
            if before["files"] != files:
                raise ValueError("The images are not those that were indexed.")
            print("Nothing has changed since they were indexed.")
            _say_unreadable(before["unreadable"])
            return index
        except (ValueError, FileNotFoundError) as error:
            print(f"Indexing anew, since the saved index can't be used. {error}")
    problems = pairclip.check_images(([*files], [0] * len(files)), num_workers=args.num_workers)
    unreadable = {str(problem.path): problem.reason for problem in problems}
    _say_unreadable(unreadable)
    readable = [path for path in files if path not in unreadable]
    if not readable:
        raise ValueError("None of the images can be read.")
    index = pairclip.ImageIndex.build(
        tower, readable, batch_size=args.embed_batch_size, num_workers=args.num_workers
    )
    # Gone before the index changes and written last: it never tells of another index.
    (saved / CONTENTS).unlink(missing_ok=True)
    index.save(saved)
    contents = {"model": model, "files": files, "unreadable": unreadable}
    outputs.write_json(saved / CONTENTS, contents)
    return index


def read_contents(saved: Path) -> dict[str, Any]:
    """What the index was made of."""
    from pairclip._files import read_json

    contents: dict[str, Any] = read_json(saved / CONTENTS)
    kinds = {"model": str, "files": dict, "unreadable": dict}
    if not isinstance(contents, dict) or any(
        not isinstance(contents.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"'{saved / CONTENTS}' is damaged: it is not what `pairclip index` wrote.")
    return contents


def _say_unreadable(problems: dict[str, str]) -> None:
    """Name the images that are left out."""
    if problems:
        print(f"LEFT OUT, because they can't be read: {len(problems):,} of the images.")
    for path, problem in list(problems.items())[:_SHOWN_PROBLEMS]:
        print(f"  {path!r}: {problem}")
    if len(problems) > _SHOWN_PROBLEMS:
        more = len(problems) - _SHOWN_PROBLEMS
        print(f"  and {more:,} more, listed in {CONTENTS} of the index")
