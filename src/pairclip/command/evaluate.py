"""Say how well a tower's embeddings keep classes apart, alone or against another tower."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pairclip
from pairclip.command import data, outputs
from pairclip.command.arguments import (
    DATA_HELP,
    add_json,
    add_loading,
    add_model,
    add_page,
    add_skip,
    add_table_columns,
    number,
)
from pairclip.command.models import check_model, load_model

RESULTS = ("metrics.json", "report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    add_model(parser, "model", "the tower", metavar="MODEL")
    parser.add_argument("data", metavar="DATA", type=Path, help=DATA_HELP)
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="part of DATA: of a folder, test for instance; of a table, a value of its column "
        "split, or a column of booleans (default: DATA has no parts)",
    )
    parser.add_argument(
        "--gallery",
        type=Path,
        metavar="DATA",
        help="images to search for those of DATA, whose classes are joined by name (default: each "
        "image of DATA is searched for among the others)",
    )
    parser.add_argument(
        "--gallery-split", metavar="NAME", help="part of the gallery (default: it has no parts)"
    )
    parser.add_argument(
        "--exclude",
        metavar="COLUMN",
        help="of tables: images of a query's class that have its value in this column (a camera, "
        "a photograph) are neither finds nor misses (default: none)",
    )
    add_model(
        parser,
        "--against",
        "another tower to compare with, shown as before (default: none)",
        metavar="ID_OR_FOLDER",
    )
    parser.add_argument(
        "--false-match-rate",
        type=number(0, 1),
        metavar="SHARE",
        help="also say from which cosine on two images of DATA are called one class, if this share "
        "of the pairs of different classes may be called so: the --min-score of a search (default: "
        "none)",
    )
    add_page(parser, "the evaluation that is in OUTPUT")
    add_table_columns(parser)
    add_skip(parser)
    add_loading(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say."""
    if args.overwrite and args.output is None:
        raise ValueError("--overwrite would be ignored: there is no --output.")
    if args.gallery_split is not None and args.gallery is None:
        raise ValueError("--gallery-split would be ignored: there is no --gallery.")
    if args.output is not None:
        outputs.check_output(args.output, args, RESULTS)
    data.check_data(args, {"DATA": args.data, "--gallery": args.gallery})
    check_model("MODEL", args.model)
    if args.against is not None:
        check_model("--against", args.against)

    from pairclip._files import plain

    images = data.open_images("DATA", args.data, args, args.split)
    gallery = None
    if args.gallery is not None:
        gallery = data.open_images("--gallery", args.gallery, args, args.gallery_split)
    elif not data.has_pairs(images):
        raise ValueError(
            f"DATA '{args.data}' has one image of each class, and each would search for another "
            "one. Give more images, or a --gallery."
        )
    tower = load_model("MODEL", args.model)
    if args.output is not None:
        facts = {"tower": tower.fingerprint(), "data": data.described(images)}
        facts |= {} if gallery is None else {"gallery": data.described(gallery)}
        outputs.open_run(args.output, args, RESULTS, **facts)
    for name, model in (("MODEL", args.model), ("--against", args.against)):
        if model is not None:
            outputs.warn_if_tuned_on(name, model, args.data, args.split)
    loading = {"num_workers": args.num_workers, "batch_size": args.embed_batch_size}
    choice = None
    if args.false_match_rate is not None:
        embeddings = pairclip.embed_images(tower, images, **loading)
        choice = pairclip.choose_threshold(
            embeddings, images.labels, false_match_rate=args.false_match_rate
        )
    options = {"gallery": gallery, "exclude": args.exclude, **loading}
    before = None
    if args.against is not None:
        before = pairclip.evaluate(load_model("--against", args.against), images, **options)
    after = pairclip.evaluate(tower, images, **options)
    metrics = after.to_dict()
    if before is not None:
        metrics = {"before": before.to_dict(), "after": metrics}
    print(after.to_markdown(before))
    if choice is not None:
        metrics["threshold"] = plain(choice)
        low, high = choice.false_match_interval
        print(
            f"\nFrom a cosine of {choice.threshold:.3f} on, {choice.false_match_rate:.2%} of the "
            f"pairs of different classes match ({low:.2%} to {high:.2%} on other classes like "
            f"these), and {choice.match_rate:.1%} of those of one class."
        )
    if args.output is not None:
        note = f"Images of {args.data}"
        note += "" if gallery is None else f", searched for in {args.gallery}"
        note += f". Before: the tower {args.against}. After" if args.against else ". Evaluated"
        note += f": the tower {args.model}."
        outputs.write_json(args.output / "metrics.json", metrics)
        page = pairclip.write_report(
            args.output,
            before,
            after,
            dataset=images,
            gallery=gallery,
            tower=tower,
            title="Two towers compared" if before is not None else None,
            note=note,
        )
        print(f"\nTo look at: {page}")
    return metrics
