"""Say how well a tower's embeddings keep classes apart, alone or against another tower."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pairclip
from pairclip.command import data, outputs
from pairclip.command.arguments import (
    DATA_HELP,
    add_json,
    add_loading,
    add_model,
    add_table_columns,
)
from pairclip.command.models import load_model

RESULTS = ("metrics.json", "report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    add_model(parser, "model", "the tower", metavar="MODEL")
    parser.add_argument("data", metavar="DATA", type=Path, help=DATA_HELP)
    add_model(parser, "--against", "another tower, shown as before", metavar="ID_OR_FOLDER")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write a page there (default: print alone)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the evaluation that is in OUTPUT"
    )
    add_table_columns(parser)
    add_loading(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    if args.overwrite and args.output is None:
        raise ValueError("--overwrite would be ignored: there is no --output.")
    images = data.open_images("DATA", args.data, args)
    tower = load_model("MODEL", args.model)
    if args.output is not None:
        described = {"images": len(images), "checksum": data.fingerprint(images)}
        outputs.open_run(args.output, args, RESULTS, tower=tower.fingerprint(), data=described)
    loading = {"num_workers": args.num_workers, "batch_size": args.embed_batch_size}
    before = None
    if args.against is not None:
        before = pairclip.evaluate(load_model("--against", args.against), images, **loading)
    after = pairclip.evaluate(tower, images, **loading)
    metrics = after.to_dict()
    if before is not None:
        metrics = {"before": before.to_dict(), "after": metrics}
    file = sys.stderr if args.json else sys.stdout
    print(after.to_markdown(before), file=file)
    if args.output is not None:
        note = f"The images of {args.data}; the tower {args.model}"
        note += f", and before it {args.against}." if args.against else "."
        outputs.write_json(args.output / "metrics.json", metrics)
        page = pairclip.write_report(
            args.output,
            before,
            after,
            dataset=images,
            title="Two towers compared" if before is not None else None,
            note=note,
        )
        print(f"\nTo look at: {page}", file=file)
    if args.json:
        print(json.dumps(metrics))
