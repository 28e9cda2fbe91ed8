"""Say what is in a collection before anything is trained on it: faults, copies, doubtful labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pairclip.command import data, outputs
from pairclip.command.arguments import (
    DATA_HELP,
    add_json,
    add_loading,
    add_model,
    add_page,
    add_table_columns,
    number,
)
from pairclip.command.models import check_model, load_model

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
    add_page(parser, "the check that is in OUTPUT, and the file of --write-clean")
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
        help="two images are the same from this cosine of small copies of them on",
    )
    parser.add_argument(
        "--doubtful",
        type=number(-10, 10, ends=True),
        default=0.4,
        metavar="SCORE",
        help="how much better another class must fit, about 0 to 1, for a label to be listed "
        "(needs --model)",
    )
    add_table_columns(parser)
    add_loading(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say."""
    clean = args.write_clean
    if args.overwrite and args.output is None and clean is None:
        raise ValueError("--overwrite would be ignored: there is no --output or --write-clean.")
    if clean is not None:
        if clean.suffix.lower() != ".csv" or clean.is_dir():
            raise ValueError(f"--write-clean '{clean}' must be a file that ends in .csv.")
        outputs.check_new("--write-clean", clean, args.overwrite)
    if args.output is not None:
        outputs.check_output(args.output, args, RESULTS)
    data.check_data(args, {"DATA": args.data})
    if args.model is not None:
        check_model("--model", args.model)
    elif args.doubtful != 0.4:
        raise ValueError(f"--doubtful {args.doubtful:g} would be ignored: there is no --model.")

    import pairclip
    from pairclip.report import write_check_report

    parts = data.open_parts("DATA", args.data, args)
    tower = None if args.model is None else load_model("--model", args.model)
    if args.output is not None:
        outputs.open_run(args.output, args, RESULTS)
    check = pairclip.check_collection(
        parts,
        tower,
        same_image=args.same_image,
        doubtful=args.doubtful,
        batch_size=args.embed_batch_size,
        num_workers=args.num_workers,
    )
    print(check.to_text())
    if tower is None:
        print("\nWhether labels are right was not looked at: that needs --model.")
    if args.output is not None:
        outputs.write_json(args.output / "check.json", check.to_dict())
        page = write_check_report(args.output, check, note=f"The images of {args.data}.")
        print(f"\nTo look at: {page}")
    if clean is not None:
        clean.parent.mkdir(parents=True, exist_ok=True)
        count = check.write_clean(clean)
        print(f"\nImages in {clean}: {count:,} of {len(check.items):,}.")
    return check.to_dict()
