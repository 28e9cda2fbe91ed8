"""Say what is in a collection before anything is trained on it: faults, copies, doubtful labels."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairclip.command import data, outputs
from pairclip.command.arguments import (
    DATA_HELP,
    add_json,
    add_loading,
    add_model,
    add_table_columns,
    number,
)
from pairclip.command.models import load_model

if TYPE_CHECKING:
    from pairclip.command.collection import Check

RESULTS = ("check.html", "check.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    parser.add_argument("data", metavar="DATA", type=Path, help=DATA_HELP)
    add_model(
        parser,
        "--model",
        "a tower that looks for wrong labels (default: none, which doesn't look for them)",
        metavar="ID_OR_FOLDER",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write a page there (default: print alone)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the check that is in OUTPUT"
    )
    parser.add_argument(
        "--write-clean",
        type=Path,
        metavar="FILE.csv",
        help="write a table without unreadable images and copies, which other subcommands take as "
        "DATA (default: none)",
    )
    parser.add_argument(
        "--same-image",
        type=number(0, 1, ends=True),
        default=0.98,
        metavar="COSINE",
        help="of small copies of two images, from which they are the same",
    )
    parser.add_argument(
        "--doubtful",
        type=float,
        default=0.4,
        metavar="SCORE",
        help="how much better another class must fit, about 0 to 1, for a label to be listed",
    )
    add_table_columns(parser)
    add_loading(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    from pairclip.command.checking import check_collection

    if args.overwrite and args.output is None:
        raise ValueError("--overwrite would be ignored: there is no --output.")
    clean = args.write_clean
    if clean is not None and (clean.suffix.lower() != ".csv" or clean.is_dir()):
        raise ValueError(f"--write-clean '{clean}' must be a file that ends in .csv.")
    file = sys.stderr if args.json else sys.stdout
    parts = data.open_parts("DATA", args.data, args)
    tower = None if args.model is None else load_model("--model", args.model)
    if args.output is not None:
        outputs.open_run(args.output, args, RESULTS)
    check = check_collection(
        parts,
        tower,
        same_image=args.same_image,
        doubtful=args.doubtful,
        batch_size=args.embed_batch_size,
        num_workers=args.num_workers,
    )
    say(check, file)
    if tower is None:
        print("\nLabels were not looked at: that needs a --model.", file=file)
    if args.output is not None:
        from pairclip.report.check_page import write_check_report

        outputs.write_json(args.output / "check.json", check.to_dict())
        note = f"The images of {args.data}."
        print(f"\nTo look at: {write_check_report(args.output, check, note=note)}", file=file)
    if clean is not None:
        outputs.write_text(clean, clean_table(check))
        left = len(check.items) - len(check.drop)
        print(f"\n{left:,} of {len(check.items):,} images are in {clean}.", file=file)
    if args.json:
        print(json.dumps(check.to_dict()))


def say(check: Check, file: Any, most: int = 10) -> None:
    """Print what was found."""
    found = check.to_dict()
    for part, classes in found["classes"].items():
        counts = list(classes.values())
        print(
            f"{part}: {sum(counts):,} images of {len(counts):,} classes, {min(counts):,} to "
            f"{max(counts):,} of each.",
            file=file,
        )
    sizes = [item.size for item in check.items if item.problem is None]
    if sizes:
        shorter = np.min(sizes, axis=1)
        print(
            f"The shorter sides have {shorter.min()} to {shorter.max()} pixels, "
            f"{np.median(shorter):.0f} in the middle.",
            file=file,
        )
    for title, problems in found["problems"].items():
        print(f"\n{title}: {len(problems):,}", file=file)
        for problem in problems[:most]:
            print(f"  {': '.join([problem['detail'], *problem['images'][:4]])}", file=file)
        if len(problems) > most:
            print(f"  and {len(problems) - most:,} more", file=file)
    if not found["problems"]:
        print("\nNothing to look at.", file=file)


def clean_table(check: Check) -> str:
    """The images that are left, as a CSV table of absolute paths."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["image", "label", "split", "doubt"])
    for place, item in enumerate(check.items):
        if place not in check.drop and item.path is not None:
            doubt = check.suspicion[place]
            row = [Path(item.path).resolve(), item.class_name, item.part]
            table.writerow([*row, "" if np.isnan(doubt) else f"{doubt:.3f}"])
    return file.getvalue()
