"""Find the images of an index that are most similar to one or several images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pairclip
from pairclip.command.arguments import add_json, add_model, number, whole_number
from pairclip.command.index import CONTENTS, read_contents
from pairclip.command.models import check_model, load_model
from pairclip.command.outputs import check_new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    parser.add_argument(
        "index", metavar="INDEX", type=Path, help="folder that `pairclip index` wrote"
    )
    parser.add_argument(
        "queries",
        metavar="QUERY",
        type=Path,
        nargs="+",
        help="images to search with; one that is in the index is left out of what it finds",
    )
    parser.add_argument(
        "-k", type=whole_number(1), default=12, metavar="N", help="number of images to find"
    )
    parser.add_argument(
        "--min-score",
        type=number(-1, 1, ends=True),
        metavar="COSINE",
        help="leave out less similar images; `pairclip evaluate --false-match-rate` says from "
        "which one on two images are called one class (default: none)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FOLDER",
        help="write a page there, search.html, too (default: results are only printed)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the page that is in the folder of --html"
    )
    add_model(
        parser,
        "--model",
        "the tower of the index, if it has moved (default: where it was)",
        metavar="ID_OR_FOLDER",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Do what the arguments say."""
    if not (args.index / CONTENTS).is_file():
        raise ValueError(
            f"INDEX '{args.index}' is no index. Make one: pairclip index MODEL FOLDER --output "
            f"{args.index}"
        )
    check_queries(args.queries)
    if args.html is not None and args.html.exists() and not args.html.is_dir():
        raise ValueError(f"--html '{args.html}' is a file. Give a folder for the page.")
    if args.html is not None:
        check_new("--html", args.html / "search.html", args.overwrite)
    elif args.overwrite:
        raise ValueError("--overwrite would be ignored: there is no --html.")
    contents = read_contents(args.index)
    model = args.model or contents["model"]
    check_model("--model", model)
    tower = load_model("--model", model)
    index = pairclip.ImageIndex.load(args.index, tower)
    answers = [search(index, query, args.k, args.min_score) for query in args.queries]
    for query, matches in zip(args.queries, answers, strict=True):
        say(query, matches)
    if args.html is not None:
        page = write_page(args.html, args.queries, answers, len(index), model)
        print(f"\nTo look at: {page}")
    return [
        {"query": str(query), "matches": [{"path": m.path, "score": m.score} for m in matches]}
        for query, matches in zip(args.queries, answers, strict=True)
    ]


def check_queries(queries: list[Path]) -> None:
    """Raise where one is not there."""
    for query in queries:
        if not query.is_file():
            what = "is a folder" if query.is_dir() else "does not exist"
            raise ValueError(f"QUERY '{query}' {what}. Give an image.")


def search(
    index: pairclip.ImageIndex, query: Path, k: int, min_score: float | None
) -> list[pairclip.Match]:
    """What is most similar to the query, which does not find itself."""
    image, _ = pairclip.LabelledImages(([query], [0]))[0]
    matches = index.search(image, k=min(k + 1, len(index)))
    own = query.resolve()
    others = [match for match in matches if match.path is None or Path(match.path).resolve() != own]
    return [match for match in others[:k] if min_score is None or match.score >= min_score]


def say(query: Path, matches: list[pairclip.Match]) -> None:
    """Print what was found."""
    print(f"\nNearest to {str(query)!r}:\n")
    for place, match in enumerate(matches, 1):
        print(f"{place:4}.  {match.score:.3f}  {match.path!r}")
    if not matches:
        print("Nothing.")


def write_page(
    folder: Path,
    queries: list[Path],
    answers: list[list[pairclip.Match]],
    count: int,
    model: str,
) -> Path:
    """The page that shows queries and what they found."""
    from pairclip.report.search_page import Result, Search, write_searches

    folders = {os.path.dirname(str(match.path)) for matches in answers for match in matches}
    root = os.path.commonpath(folders) if folders else None
    searches = []
    for query, matches in zip(queries, answers, strict=True):
        paths = [str(query), *(str(match.path) for match in matches)]
        images = pairclip.LabelledImages((paths, [0] * len(paths)))
        results = [
            Result(images[place][0], os.path.relpath(paths[place], root), match.score, paths[place])
            for place, match in enumerate(matches, 1)
        ]
        searches.append(Search(images[0][0], results, path=str(query)))
    note = f"Among {count:,} images, by the tower {model}."
    return write_searches(folder, searches, note=note)
