"""The work of `pairclip tune`: evaluate, compare recipes if asked, train, evaluate, write."""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import pairclip
from pairclip.command import data, outputs
from pairclip.command.data import Split
from pairclip.command.index import image_files

# Defaults by recipe. Those of "preserving" served best in docs/forgetting.md.
RECIPES: dict[str, dict[str, Any]] = {
    "preserving": {
        "batch_size": 256,
        "preserve_similarities": 0.35,
        "preserve_embeddings": 0.15,
        "blend": 0.8,
    },
    "plain": {
        "batch_size": 128,
        "preserve_similarities": 0.0,
        "preserve_embeddings": 0.0,
        "blend": 1.0,
    },
}

HELD_OUT = "classes that were not trained on"
RESULTS = (
    *("tower", "metrics.json", "report.html", "history.json", "history.png"),
    *("similarity_before.png", "similarity_after.png"),
    *("class_similarity_before.png", "class_similarity_after.png", "checkpoints"),
    *("recipes.json", "recipes"),
)


def tune(
    args: argparse.Namespace, split: Split, load: Any, note: str | None = None
) -> dict[str, Any] | None:
    """Evaluate, fine-tune, evaluate again, and write what changed.

    Args:
        args: Of the command line.
        split: The images.
        load: Gives the tower on a device.
        note: A sentence for pages and pictures on what these images and the tower are.

    Returns:
        The metrics before and after; None if nothing was trained, or another process has them.

    Raises:
        KeyboardInterrupt: After Ctrl-C, in words on how it goes on.
    """
    try:
        return _tune(args, split, load, note)
    except KeyboardInterrupt:
        place = outputs.place_to_continue(args.output)
        if place is not None:
            command = "The same command" + " with --resume" * (not args.resume)
            raise KeyboardInterrupt(f"{command} continues from {place}.") from None
        raise KeyboardInterrupt(
            "No checkpoint was written yet: the same command starts from the beginning."
            if args.resume
            else "With --resume there would be checkpoints to continue from."
        ) from None


def _tune(
    args: argparse.Namespace, split: Split, load: Any, note: str | None
) -> dict[str, Any] | None:
    import torch
    from accelerate import Accelerator

    process = Accelerator()  # one of several under `accelerate launch`
    say: Any = partial(process.print, flush=True)  # by the main one alone
    torch.manual_seed(args.seed)
    tower = load(process.device)
    if args.learning_rate is None:
        args.learning_rate = default_rate(tower)
    said = "" if args.compare else _fit_batch_size(args, split.train, process.num_processes)
    if process.is_main_process:
        facts = {
            "tower": tower.fingerprint(),
            "data": {"train": data.described(split.train), "test": data.described(split.test)},
        }
        outputs.open_run(args.output, args, RESULTS, **facts | ({"note": note} if note else {}))
    process.wait_for_everyone()
    counts = f"{len(split.train):,} images to train on, {len(split.test):,} to evaluate on"
    say(f"{counts}: {split.said}.{said}")
    about = f"The tower {args.model}. {counts}: {split.said}."
    about += f" {note[:1].upper()}{note[1:]}." if note else ""
    if args.compare and not _compare(tower, split, args, process.num_processes, say):
        return None
    if args.train_blocks is not None:
        tower.freeze(all_but_last=args.train_blocks)
    untouched = copy.deepcopy(tower) if args.blend < 1 else None
    finetuner, options = _prepare(tower, split.train, args)

    loading = {"num_workers": args.num_workers, "batch_size": args.embed_batch_size}
    also = {} if split.held_out is None else {HELD_OUT: split.held_out}
    pictures, names = _pictures_to_show(split.test)
    say("Evaluating before.")
    before = pairclip.evaluate(tower, split.test, also=also, **loading)
    similarity = {"before": pairclip.similarity_matrix(pairclip.embed_images(tower, pictures))}
    say(
        f"Recall at 1 is {before.recall_at_1:.3f}, mean average precision "
        f"{before.mean_average_precision:.3f}. Fine-tuning with a rate of "
        f"{finetuner.learning_rate:g}."
    )
    history = finetuner.fit(split.train, num_workers=args.num_workers, **options)
    if untouched is not None:
        tower = pairclip.interpolate(untouched, tower, args.blend)
    if process.is_main_process:
        # First of all, so that no failing picture loses the run.
        tower.save_pretrained(args.output / "tower")
        history.to_json(args.output / "history.json")
    say("Evaluating after.")
    # All processes embed together.
    after = pairclip.evaluate(tower, split.test, also=also, **loading)
    similarity["after"] = pairclip.similarity_matrix(pairclip.embed_images(tower, pictures))
    metrics = None
    if process.is_main_process:
        metrics = {"before": before.to_dict(), "after": after.to_dict()}
        outputs.write_json(args.output / "metrics.json", metrics)
        say("\n" + after.to_markdown(before))
        page = pairclip.write_report(
            args.output,
            before,
            after,
            dataset=split.test,
            tower=tower,
            history=history,
            note=about,
        )
        _draw(args.output, before, after, history, pictures, names, similarity, note, say)
        say(f"\nThe tuned tower and the results are in {args.output}. Open {page} to see it all.")
    # A process that ends while another still works takes that one with it.
    process.wait_for_everyone()
    process.end_training()
    return metrics


def _compare(
    tower: pairclip.VisionTower, split: Split, args: argparse.Namespace, processes: int, say: Any
) -> bool:
    """Try several recipes, and write the best one over the arguments; False if none is worth it."""
    if processes > 1:
        raise ValueError(f"--compare works in one process, got {processes}.")
    keep = None if args.keep is None else list(image_files("--keep", args.keep))
    comparison = pairclip.compare_recipes(
        tower,
        split.train,
        others=split.held_out,
        keep=keep,
        folder=args.output / "recipes",
        budget=args.compare_steps,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    say("\n" + comparison.to_markdown())
    comparison.to_json(args.output / "recipes.json")
    best = comparison.best
    if best is None:
        say(f"\nNothing was trained; the comparison is in {args.output / 'recipes.json'}.")
        return False
    args.max_steps, args.batch_size = best.steps, best.batch_size
    args.learning_rate, args.train_blocks = best.learning_rate, best.train_blocks
    args.preserve_similarities = best.preserve_similarities
    args.preserve_embeddings = best.preserve_embeddings
    args.blend = best.blend
    if not best.keep_share:
        args.keep = None
    return True


def _fit_batch_size(args: argparse.Namespace, dataset: Any, processes: int) -> str:
    """Lower the batch size that nobody chose to what few images make up; a sentence says so."""
    from pairclip.samplers import batch_size_within  # not for --help

    labels = pairclip.labels_of(dataset)
    if args.batch_size != RECIPES[args.recipe]["batch_size"]:
        if args.batch_size > 2 * len(labels):
            raise ValueError(
                f"--batch-size must be at most two per image, got {args.batch_size} for the "
                f"{len(labels)} images to train on."
            )
    elif args.batch_size > len(labels):
        args.batch_size = batch_size_within(labels, args.batch_size, processes)
        return f" Batches have {args.batch_size} of them."
    return ""


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
        if args.preserve_similarities:
            weight = args.preserve_similarities
            loss = pairclip.PreservingLoss(loss, weight=weight, what="similarities")
        if args.preserve_embeddings:
            loss = pairclip.PreservingLoss(loss, weight=args.preserve_embeddings)
        if args.keep is not None:
            options["keep"] = list(image_files("--keep", args.keep))
        options["batch_size"] = args.batch_size
    if args.resume:
        options |= {"checkpoint_dir": args.output / "checkpoints", "resume": True}
    finetuner = pairclip.Finetuner(
        tower,
        loss,
        learning_rate=args.learning_rate,
        micro_batch_size=args.micro_batch_size,
        callbacks=[pairclip.CollapseMonitor()],
        seed=args.seed,
    )
    return finetuner, options


def default_rate(tower: pairclip.VisionTower) -> float:
    """What served best for small towers; for large ones, unmeasured, what is customary for CLIP."""
    size = sum(parameter.numel() for parameter in tower.parameters())
    return 6e-4 if size < 10_000_000 else 1e-5


def _pictures_to_show(dataset: Any, count: int = 8) -> tuple[list[Any], list[str]]:
    """The first images of the first classes, two of each, and the names of their classes."""
    images = pairclip.LabelledImages(dataset)
    labels = images.labels
    places = [i for label in labels.unique() for i in (labels == label).nonzero()[:2, 0].tolist()]
    pictures, ids = zip(*(images[i] for i in places[:count]), strict=True)
    names = images.class_names
    return list(pictures), [str(i) if names is None else names[i] for i in ids]


def _draw(
    folder: Path,
    before: pairclip.Evaluation,
    after: pairclip.Evaluation,
    history: pairclip.History,
    pictures: list[Any],
    names: list[str],
    similarity: dict[str, Any],
    note: str | None,
    say: Any,
) -> None:
    """The pictures; what can't be drawn is said."""
    from pairclip.evaluation.showing import with_clearest_classes  # not for --help

    below = f"\n({note})" if note else ""
    clearest = (before, after)[with_clearest_classes((before, after))]
    try:
        for when, evaluation in (("before", before), ("after", after)):
            pairclip.plot_similarity_matrix(
                pictures,
                similarity[when],
                names=names,
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
