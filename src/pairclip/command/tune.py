"""Fine-tune a tower on labelled images; write what changed, as numbers, pages and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pairclip.command import data
from pairclip.command.arguments import (
    CLIP,
    DATA_HELP,
    add_json,
    add_loading,
    add_model,
    add_skip,
    add_table_columns,
    number,
    whole_number,
)
from pairclip.command.models import check_model, load_model
from pairclip.command.outputs import check_output
from pairclip.command.tuning import RECIPES, RESULTS, tune

# What a recipe decides; None in the arguments where it wasn't given.
_OF_RECIPES = ("max_steps", "learning_rate", "train_blocks", *RECIPES["plain"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    parser.add_argument("data", metavar="DATA", type=Path, help=DATA_HELP)
    add_model(parser, "--model", "the tower to tune", default=CLIP, metavar="ID_OR_FOLDER")
    add_settings(parser, output=None)
    add_table_columns(parser)
    add_skip(parser)
    add_json(parser)


def add_settings(parser: argparse.ArgumentParser, *, output: Path | None) -> None:
    """Add how it is trained and evaluated, and where the results go.

    Args:
        parser: Takes them.
        output: The default of `--output`; None requires one.
    """
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=output,
        required=output is None,
        metavar="FOLDER",
        help="where the results go; made if it isn't there",
    )
    add("--overwrite", action="store_true", help="replace the run that is in OUTPUT")
    add(
        "--resume",
        action="store_true",
        help="keep checkpoints in OUTPUT/checkpoints; after an interruption, the same command "
        "continues from the last one",
    )
    add(
        "--recipe",
        choices=sorted(RECIPES),
        default="preserving",
        help="what --batch-size, --preserve-... and --blend are by default: preserving keeps what "
        "the tower can do on other classes, plain trains without a thought for that",
    )
    add(
        "--compare",
        action="store_true",
        help="first try several recipes on some classes, look at the others too, and train by the "
        "best one, or not at all where none is worth it; takes several times as long",
    )
    count, share = whole_number(1), number(0, 1)
    add(
        "--compare-steps",
        type=count,
        metavar="N",
        help="bound on the steps of all trainings of --compare together (default: as many as they "
        "need)",
    )
    weight = number(0, ends=True)
    add("--epochs", type=count, default=4, metavar="N", help="passes over the training images")
    add(
        "--max-steps",
        type=count,
        metavar="N",
        help="steps to train, instead of --epochs (default: what --epochs makes)",
    )
    add(
        "--batch-size",
        type=whole_number(2),
        metavar="N",
        help="images in a batch, over all processes (default: 256; plain 128; fewer, where there "
        "are fewer)",
    )
    add(
        "--micro-batch-size",
        type=count,
        metavar="N",
        help="images encoded at once, to save memory (default: the whole batch)",
    )
    add(
        "--learning-rate",
        type=number(0),
        metavar="RATE",
        help="peak rate of AdamW (default: 6e-4 below 10 million parameters, else 1e-5)",
    )
    add(
        "--train-blocks",
        type=whole_number(0),
        metavar="K",
        help="train the last K blocks and what follows (default: all)",
    )
    add(
        "--negatives",
        choices=["linear", "hinge", "squared"],
        default="squared",
        help="cost of two images of different classes, of their cosine",
    )
    add(
        "--margin",
        type=number(-1, 1, ends=True),
        metavar="COSINE",
        help="cosine from which the hinge costs something (default: 0.2)",
    )
    add(
        "--pairs",
        choices=["all", "sampled"],
        default="all",
        help="pairs of a batch that count: all of them, or those that were drawn",
    )
    add(
        "--positive-fraction",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="weight of the pairs of one class, between 0 and 1; or their share, where sampled",
    )
    add(
        "--preserve-similarities",
        type=weight,
        metavar="WEIGHT",
        help="weight of keeping the similarities that the untouched tower gives "
        "(default: 0.35; plain 0)",
    )
    add(
        "--preserve-embeddings",
        type=weight,
        metavar="WEIGHT",
        help="weight of keeping each embedding where it was (default: 0.15; plain 0)",
    )
    add(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="images of other things, whose embeddings stay where they are; a fourth of each batch "
        "(default: none)",
    )
    add(
        "--blend",
        type=number(0, 1, ends=True),
        metavar="SHARE",
        help="share of the trained weights in the tower that is written, the rest being of the "
        "untouched one (default: 0.8; plain 1)",
    )
    add(
        "--image-size",
        type=count,
        metavar="PIXELS",
        help="side of the images that the tower gets (default: its own)",
    )
    add(
        "--test-fraction",
        type=share,
        default=data.TEST_FRACTION,
        metavar="SHARE",
        help="share of each class that is held out where DATA has no test part",
    )
    add(
        "--train-per-class",
        type=whole_number(2),
        metavar="N",
        help="images of each class to train on (default: all)",
    )
    add(
        "--test-per-class",
        type=whole_number(2),
        default=200,
        metavar="N",
        help="images of each class to evaluate on, at most",
    )
    add(
        "--hold-out-classes",
        metavar="A,B",
        help="names of classes that are not trained on, and are evaluated apart (default: none)",
    )
    add_loading(parser)
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="decides the random choices: split and batches",
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Do what the arguments say."""
    check(args)
    data.check_data(args, {"DATA": args.data})
    split = data.open_split("DATA", args.data, args)
    return tune(
        args, split, lambda device: load_model("--model", args.model, device, args.image_size)
    )


def check(args: argparse.Namespace) -> None:
    """Raise where arguments don't go together, and fill in what the recipe says of the rest."""
    if args.overwrite and args.resume:
        raise ValueError("--overwrite starts anew and --resume continues: give one of them.")
    check_output(args.output, args, RESULTS)
    check_model("--model", args.model)
    if args.negatives != "hinge" and args.margin is not None:
        raise ValueError(
            f"--margin {args.margin:g} would be ignored: it is for --negatives hinge, got "
            f"{args.negatives!r}."
        )
    if args.compare:
        _check_compare(args)
    elif args.compare_steps is not None:
        raise ValueError("--compare-steps would be ignored: there is no --compare.")
    if args.pairs == "sampled":
        for flag in ("preserve_similarities", "preserve_embeddings"):
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(args, flag):g} needs all pairs of a "
                    "batch: leave out --pairs sampled."
                )
        args.recipe = "plain"
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.pairs == "sampled" and args.batch_size % 2:
        raise ValueError(f"--batch-size must be even for sampled pairs, got {args.batch_size}.")
    if args.blend == 0:
        raise ValueError("--blend 0 would leave the tower as it is: give a share above 0.")
    if args.keep is not None and not args.preserve_embeddings:
        raise ValueError(
            f"--keep {args.keep} would be ignored: it needs --preserve-embeddings above 0."
        )
    if args.keep is not None and not args.keep.is_dir():
        what = "is a file" if args.keep.exists() else "does not exist"
        raise ValueError(f"--keep '{args.keep}' {what}. Give a folder of images.")


def _check_compare(args: argparse.Namespace) -> None:
    """Raise for what a comparison decides by itself."""
    chosen = {name: getattr(args, name) is not None for name in _OF_RECIPES}
    chosen |= {"pairs": args.pairs != "all", "negatives": args.negatives != "squared"}
    for name, given in chosen.items():
        if given:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {getattr(args, name)} would be ignored: --compare chooses among recipes "
                f"that have their own. Leave out {flag}, or --compare."
            )
