"""Search a folder of images with an image.

    python examples/image_search.py FOLDER QUERY                 # CLIP, downloaded
    python examples/image_search.py FOLDER QUERY --model FOLDER  # a local tower, say a tuned one
    python examples/image_search.py --offline                    # no network: digits, a tiny tower

Indexes the images of FOLDER, however they are nested, prints those nearest to QUERY, and writes
them as a page into --output. The index stays there for the next call with this folder and tower.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

import pairclip
from pairclip._files import write_json
from pairclip.towers import random_tower

OFFLINE_NOTE = (
    "offline stand-in: scikit-learn's digits and a small random tower, not your images and CLIP"
)
NO_NETWORK_HELP = (
    "Without a network, use --model FOLDER with a tower that transformers saved, or --offline."
)
SHOWN_PROBLEMS = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments."""
    clip, output = "openai/clip-vit-base-patch32", Path("runs/search")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])

    def add(flag: str, help_text: str, default: Any = None, **options: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(flag, help=help_text + shown, default=default, **options)

    add("folder", "images to search, in folders of any layout", type=Path, nargs="?")
    add("query", "image to search with", type=Path, nargs="?")
    add("-k", "images to find", 12, type=int)
    add("--model", "hub id or folder of the tower", clip)
    add("--output", "where the index and the page go", output, type=Path)
    add("--num-workers", "processes that load images", 0, type=int)
    parser.add_argument(
        "--offline", action="store_true", help="needs no network: digits and a small random tower"
    )
    args = parser.parse_args(arguments)
    if args.k < 1:
        parser.error(f"-k must be at least 1, got {args.k}")
    if args.offline and (args.folder or args.model != clip):
        extra = "FOLDER and QUERY" if args.folder else "--model"
        parser.error(f"--offline brings its own images and tower: leave out {extra}")
    if not args.offline and not (args.folder and args.query):
        parser.error("give FOLDER and QUERY, or --offline")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Index the folder or use its index, search, print and write a page."""
    args = parse(arguments)
    if args.offline:
        print(f"OFFLINE: {OFFLINE_NOTE}.")
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Do the work for parsed arguments."""
    if args.offline:
        args.folder, args.query = offline_images(args.output / "offline")
    # Before the indexing, which may take long.
    query, _ = pairclip.LabelledImages(([args.query], [0]))[0]
    tower = offline_tower() if args.offline else load_tower(args.model)
    folder = args.folder.resolve()
    index = index_of(folder, tower, args.output / "index", args.num_workers)

    # One more, since the query may be in the folder and would find itself.
    found = index.search(query, k=min(args.k + 1, len(index)))
    others = [match for match in found if Path(match.path).resolve() != args.query.resolve()]
    matches = others[: args.k]
    if not matches:
        raise ValueError(f"{folder} has no image but the query.")
    print(f"\nNearest to {str(args.query)!r}:\n")
    for place, match in enumerate(matches, 1):
        print(f"{place:4}.  {match.score:.3f}  {match.path!r}")
    if len(matches) < args.k:
        print(f"\nThe folder has no more than these {len(matches)} images to find.")
    images = pairclip.LabelledImages(([match.path for match in matches], [0] * len(matches)))
    results = [
        (image, as_text(os.path.relpath(match.path, folder)), match.score)
        for (image, _), match in zip(images, matches, strict=True)
    ]
    note = f"Among {len(index)} images of {as_text(str(folder))}."
    note += f" OFFLINE: {OFFLINE_NOTE}." if args.offline else ""
    page = pairclip.write_search_report(args.output, query, results, note=note)
    print(f"\nTo look at: {page}")


def as_text(path: str) -> str:
    """A path as text that can be written, even if its name is not valid UTF-8."""
    return path.encode("utf-8", "replace").decode()


def index_of(
    folder: Path, tower: pairclip.VisionTower, saved: Path, num_workers: int
) -> pairclip.ImageIndex:
    """The saved index where folder and tower are as they were, else a new one."""
    files = image_files(folder)
    contents = saved / "contents.json"
    if contents.is_file():
        try:
            before = json.loads(contents.read_text(encoding="utf-8"))
            index = pairclip.ImageIndex.load(saved, tower)
            if before["files"] != files:
                raise ValueError(f"The images in {folder} are not those that were indexed.")
            print(f"Using the index of {len(index)} images in {saved}: nothing has changed.")
            say_unreadable(before["unreadable"])
            return index
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            print(f"Indexing anew, since the saved index can't be used. {error}")
        contents.unlink()
    unreadable = problems_of(list(files))
    say_unreadable(unreadable)
    readable = [path for path in files if path not in unreadable]
    if not readable:
        raise ValueError(f"{folder} has no image that can be read.")
    print(f"Indexing {len(readable)} images.")
    index = pairclip.ImageIndex.build(tower, readable, num_workers=num_workers)
    index.save(saved)
    # Last and at once, so that it never tells of an index that is not there.
    write_json(contents, {"files": files, "unreadable": unreadable})
    return index


def image_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each image in a folder, however deep."""
    if not folder.is_dir():
        raise NotADirectoryError(f"FOLDER must be a folder of images, got '{folder}'.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
    if not images:
        raise ValueError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}).")
    others = len(files) - len(images)
    print(f"{len(images)} images in {folder}" + f", {others} other files ignored." * bool(others))
    stats = [(str(path), path.stat()) for path in images]
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats}


def problems_of(paths: list[str]) -> dict[str, str]:
    """What is wrong with each image that can't be read."""
    images = pairclip.LabelledImages((paths, [0] * len(paths)))

    def problem_of(number: int) -> str | None:
        try:
            _ = images[number]
        except ValueError as error:
            return str(error.__cause__)
        return None

    with ThreadPoolExecutor() as pool:
        problems = pool.map(problem_of, range(len(paths)))
        return {path: problem for path, problem in zip(paths, problems, strict=True) if problem}


def say_unreadable(problems: dict[str, str]) -> None:
    """Name the images that are left out."""
    if problems:
        print(f"LEFT OUT: {len(problems)} images can't be read.")
    for path, problem in list(problems.items())[:SHOWN_PROBLEMS]:
        print(f"  {path!r}: {problem}")
    if len(problems) > SHOWN_PROBLEMS:
        print(f"  and {len(problems) - SHOWN_PROBLEMS} more, listed in contents.json of the index")


def load_tower(model: str) -> pairclip.VisionTower:
    """The tower of --model."""
    device = "cuda" if torch.cuda.is_available() else None
    try:
        return pairclip.load_tower(model, device=device)
    except OSError as error:
        raise SystemExit(f"error: {error}\n{NO_NETWORK_HELP}") from error


def offline_images(folder: Path, count: int = 300) -> tuple[Path, Path]:
    """Digits of scikit-learn as image files, and one of them to search with."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    paths = [folder / "images" / str(digits.target[i]) / f"{i:04}.png" for i in range(count)]
    query = folder / "query.png"
    for path, pixels in zip([*paths, query], digits.images, strict=False):
        if not path.exists():  # a new file would look like a changed folder
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
            image.resize((64, 64), Image.Resampling.NEAREST).save(path)
    return folder / "images", query


def offline_tower() -> pairclip.VisionTower:
    """A small CLIP vision tower with random weights, the same in every call."""
    return random_tower(patch_size=4, width=64, heads=4, embedding_dim=32)


if __name__ == "__main__":
    main()
