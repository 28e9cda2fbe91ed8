"""Fine-tune a tower on labelled images; write what changed, as numbers, pages and pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

import pairclip
from pairclip.command import data, outputs
from pairclip.command.arguments import (
    CLIP,
    DATA_HELP,
    add_json,
    add_loading,
    add_model,
    add_table_columns,
    number,
    whole_number,
)
from pairclip.command.data import Split
from pairclip.command.models import load_model

HELD_OUT = "classes that were not trained on"
RESULTS = (
    *("tower", "metrics.json", "report.html", "history.json", "history.png"),
    *("similarity_before.png", "similarity_after.png"),
    *("class_similarity_before.png", "class_similarity_after.png", "checkpoints"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this subcommand takes."""
    parser.add_argument("data", metavar="DATA", type=Path, help=DATA_HELP)
    add_model(parser, "--model", "the tower to tune", default=CLIP, metavar="ID_OR_FOLDER")
    add_settings(parser, output=None)
    add_table_columns(parser)
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
        choices=["fixed"],
        default="fixed",
        help="fixed: train as the options below say",
    )
    count, share = whole_number(1), number(0, 1)
    add("--epochs", type=count, default=2, metavar="N", help="passes over the training images")
    add("--max-steps", type=count, metavar="N", help="steps to train, instead of --epochs")
    add(
        "--batch-size",
        type=whole_number(2),
        default=128,
        metavar="N",
        help="images in a batch, over all processes",
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
    add("--margin", type=float, metavar="COSINE", help="of the hinge (default: 0.2)")
    add(
        "--pairs",
        choices=["all", "sampled"],
        default="all",
        help="pairs of a batch that count",
    )
    add(
        "--positive-fraction",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="weight of the pairs of one class, between 0 and 1; or their share, where sampled",
    )
    add("--image-size", type=count, metavar="PIXELS", help="(default: the tower's own)")
    add(
        "--test-fraction",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="of each class, held out where DATA has no test part",
    )
    add("--train-per-class", type=count, metavar="N", help="images trained on (default: all)")
    add("--test-per-class", type=count, default=200, metavar="N", help="images evaluated on")
    add(
        "--hold-out-classes",
        metavar="A,B",
        help="not trained on, and evaluated apart (default: none)",
    )
    add_loading(parser)
    add("--seed", type=whole_number(0), default=0, metavar="N", help="decides split and batches")


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    check(args)
    split = data.open_split("DATA", args.data, args)
    tune(args, split, lambda device: load_model("--model", args.model, device, args.image_size))


def check(args: argparse.Namespace) -> None:
    """Raise where arguments don't go together."""
    if args.overwrite and args.resume:
        raise ValueError("--overwrite starts anew and --resume continues: give one of them.")
    if args.pairs == "sampled" and args.batch_size % 2:
        raise ValueError(f"--batch-size must be even for sampled pairs, got {args.batch_size}.")
    if args.negatives != "hinge" and args.margin is not None:
        raise ValueError(
            f"--margin {args.margin:g} would be ignored: it is for --negatives hinge, got "
            f"{args.negatives!r}."
        )


def tune(args: argparse.Namespace, split: Split, load: Any, note: str | None = None) -> None:
    """Evaluate, fine-tune, evaluate again, and write what changed.

    Args:
        args: Of the command line.
        split: The images.
        load: Gives the tower on a device.
        note: A sentence for pages and pictures on what these images and the tower are.
    """
    import torch
    from accelerate import Accelerator

    process = Accelerator()  # one of several under `accelerate launch`
    say = _printer(args, quiet=not process.is_main_process)
    torch.manual_seed(args.seed)
    tower = load(process.device)
    if args.train_blocks is not None:
        tower.freeze(all_but_last=args.train_blocks)
    finetuner, options = _prepare(tower, split.train, args)
    if process.is_main_process:
        facts = {
            "tower": tower.fingerprint(),
            "data": {"train": _described(split.train), "test": _described(split.test)},
            "learning_rate": finetuner.learning_rate,
        }
        outputs.open_run(args.output, args, RESULTS, **facts | ({"note": note} if note else {}))
    process.wait_for_everyone()
    counts = f"{len(split.train):,} images to train on, {len(split.test):,} to evaluate on"
    say(f"{counts}: {split.said}.")

    loading = {"num_workers": args.num_workers, "batch_size": args.embed_batch_size}
    also = {} if split.held_out is None else {HELD_OUT: split.held_out}
    pictures = _pictures_to_show(split.test)
    say("Evaluating before.")
    before = pairclip.evaluate(tower, split.test, also=also, **loading)
    similarity = {"before": pairclip.similarity_matrix(pairclip.embed_images(tower, pictures))}
    say(
        f"Recall at 1 is {before.recall_at_1:.3f}, mean average precision "
        f"{before.mean_average_precision:.3f}. Fine-tuning with a rate of "
        f"{finetuner.learning_rate:g}."
    )
    try:
        history = finetuner.fit(split.train, num_workers=args.num_workers, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "The same command continues from the last checkpoint."
            if args.resume
            else "With --resume there would be checkpoints to continue from."
        ) from None
    if not process.is_main_process:
        return
    # First of all, so that no failing picture loses the run.
    tower.save_pretrained(args.output / "tower")
    history.to_json(args.output / "history.json")
    say("Evaluating after.")
    after = pairclip.evaluate(tower, split.test, also=also, **loading)
    similarity["after"] = pairclip.similarity_matrix(pairclip.embed_images(tower, pictures))
    metrics = {"before": before.to_dict(), "after": after.to_dict()}
    outputs.write_json(args.output / "metrics.json", metrics)
    say("\n" + after.to_markdown(before))
    page = pairclip.write_report(
        args.output, before, after, dataset=split.test, history=history, note=note
    )
    _draw(args.output, before, after, history, pictures, similarity, note, say)
    say(f"\nThe tuned tower and the results are in {args.output}. Open {page} to see it all.")
    if args.json:
        print(json.dumps(metrics))


def _printer(args: argparse.Namespace, *, quiet: bool) -> Any:
    file = sys.stderr if args.json else sys.stdout
    return lambda text: None if quiet else print(text, file=file, flush=True)


def _described(dataset: Any) -> dict[str, Any]:
    images = pairclip.LabelledImages(dataset)
    return {
        "images": len(images),
        "classes": len(images.labels.unique()),
        "checksum": data.fingerprint(images),
    }


def _prepare(
    tower: pairclip.VisionTower, dataset: Any, args: argparse.Namespace
) -> tuple[pairclip.Finetuner, dict[str, Any]]:
    """A Finetuner and how it fits: sampled pairs, or all pairs of class-balanced batches."""
    margin = args.margin if args.margin is not None or args.negatives != "hinge" else 0.2
    form = {"negatives": args.negatives, "margin": margin or 0.0}
    options: dict[str, Any] = (
        {"epochs": args.epochs} if args.max_steps is None else {"max_steps": args.max_steps}
    )
    if args.pairs == "sampled":
        loss: Any = pairclip.CosinePairLoss(**form)
        options["sampler"] = pairclip.PairSampler(
            pairclip.labels_of(dataset),
            args.batch_size // 2,
            positive_fraction=args.positive_fraction,
            seed=args.seed,
        )
    else:
        loss = pairclip.AllPairsCosineLoss(positive_fraction=args.positive_fraction, **form)
        options["batch_size"] = args.batch_size
    if args.resume:
        options |= {"checkpoint_dir": args.output / "checkpoints", "resume": True}
    finetuner = pairclip.Finetuner(
        tower,
        loss,
        learning_rate=args.learning_rate or default_rate(tower),
        micro_batch_size=args.micro_batch_size,
        callbacks=[pairclip.CollapseMonitor()],
        seed=args.seed,
    )
    return finetuner, options


def default_rate(tower: pairclip.VisionTower) -> float:
    """What served best for small towers; for large ones, unmeasured, what is customary for CLIP."""
    size = sum(parameter.numel() for parameter in tower.parameters())
    return 6e-4 if size < 10_000_000 else 1e-5


def _pictures_to_show(dataset: Any, count: int = 8) -> list[Any]:
    """The first images of the first classes, two of each."""
    images = pairclip.LabelledImages(dataset)
    labels = images.labels
    chosen = [i for label in labels.unique() for i in (labels == label).nonzero()[:2, 0].tolist()]
    return [images[i][0] for i in chosen[:count]]


def _draw(
    folder: Path,
    before: pairclip.Evaluation,
    after: pairclip.Evaluation,
    history: pairclip.History,
    pictures: list[Any],
    similarity: dict[str, Any],
    note: str | None,
    say: Any,
) -> None:
    """The pictures; what can't be drawn is said."""
    below = f"\n({shorten(note, 60, placeholder='…')})" if note else ""
    from pairclip.evaluation.showing import with_clearest_classes

    clearest = (before, after)[with_clearest_classes((before, after))]
    try:
        for when, evaluation in (("before", before), ("after", after)):
            pairclip.plot_similarity_matrix(
                pictures,
                similarity[when],
                title=f"Similarity of held-out images {when} fine-tuning{below}",
                path=folder / f"similarity_{when}.png",
            )
            pairclip.plot_class_similarity(
                evaluation,
                order=clearest,
                title=f"Mean similarity of classes {when} fine-tuning{below}",
                path=folder / f"class_similarity_{when}.png",
            )
        pairclip.plot_history(history, title=f"Fine-tuning{below}", path=folder / "history.png")
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        say(f"\nSome pictures are missing; the page and the tower are there. {error}")
