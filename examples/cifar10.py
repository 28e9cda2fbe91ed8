"""Fine-tune a CLIP vision tower on CIFAR-10, or on your own folder of images.

    python examples/cifar10.py                                # CIFAR-10 and CLIP, downloaded
    python examples/cifar10.py --data FOLDER --model FOLDER   # your images, a local tower
    python examples/cifar10.py --offline                      # no network: digits, a tiny tower
    accelerate launch examples/cifar10.py                     # on all GPUs

Writes the figures, pictures before and after, and the tuned tower into --output.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Subset

import pairclip
from pairclip._files import write_json
from pairclip.towers import random_tower

OFFLINE_NOTE = (
    "offline stand-in: scikit-learn's digits and a small random tower, not CIFAR-10 and CLIP"
)
HELD_OUT = "classes that were not trained on"
NO_NETWORK_HELP = (
    "Without a network, use --offline, or --data FOLDER with your images and --model FOLDER with "
    "a tower that transformers saved."
)


@dataclass
class Data:
    """The images to train on, to evaluate on, and of classes that are not trained on."""

    train: Any
    test: Any
    held_out: Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments, with the defaults that depend on --offline filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    clip, folder = "openai/clip-vit-base-patch32", Path("runs/cifar10")

    def add(flag: str, help_text: str, default: Any = None, **options: Any) -> None:
        shown = "" if default in (None, "") else f" (default: {default})"
        parser.add_argument(flag, help=help_text + shown, default=default, **options)

    parser.add_argument(
        "--offline", action="store_true", help="needs no network: digits and a small random tower"
    )
    add("--data", "folder with train/ and test/, or with a folder for each class", type=Path)
    add("--model", "hub id or folder of the tower", clip)
    add(
        "--test-fraction",
        "share to hold out if there is no test/ (default: 0.2; offline 1/3)",
        type=float,
    )
    add("--train-per-class", "training images of each class (default: all)", type=int)
    add("--test-per-class", "evaluated images of each class", 200, type=int)
    add("--epochs", "(default: 2; offline 90)", type=int)
    add("--batch-size", "images per batch, over all processes", 128, type=int)
    add("--micro-batch-size", "images encoded at once, to save memory (default: all)", type=int)
    add("--train-blocks", "train the last K blocks and what follows (default: all)", type=int)
    add(
        "--learning-rate",
        "(default: 6e-4 below 10 million parameters, else 1e-5; offline 1e-3)",
        type=float,
    )
    add("--negatives", "cost of unlike pairs", "squared", choices=["linear", "hinge", "squared"])
    add("--margin", "of the hinge (default: 0.2)", type=float)
    add("--pairs", "pairs of a batch that count", "all", choices=["sampled", "all"])
    add("--positive-fraction", "weight or share of pairs of one class", 0.2, type=float)
    add("--image-size", "pixels (default: the tower's own)", type=int)
    add("--hold-out-classes", "not trained on, evaluated apart", "", metavar="A,B")
    add("--download-dir", "where CIFAR-10 goes", Path("runs/data"), type=Path)
    add("--num-workers", "processes that load images", 0, type=int)
    add("--seed", "decides split, batches and offline weights", 0, type=int)
    add("--output", "where results go", folder, type=Path)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="write checkpoints into OUTPUT/checkpoints, and continue from those that are there",
    )
    args = parser.parse_args(arguments)
    for flag, least in [("train_per_class", 1), ("test_per_class", 1), ("seed", 0)]:
        number = getattr(args, flag)
        if number is not None and number < least:
            name = flag.replace("_", "-")
            parser.error(f"--{name} must be at least {least}, got {number}")
    if args.pairs == "sampled" and args.batch_size % 2:
        parser.error(f"--batch-size must be even for sampled pairs, got {args.batch_size}")
    for flag, given in [
        ("--data", args.data),
        ("--model", args.model != clip),
        ("--image-size", args.image_size),
    ]:
        if args.offline and given:
            parser.error(f"--offline brings its own images and tower: leave out {flag}")
    if args.test_fraction is None:
        args.test_fraction = 1 / 3 if args.offline else 0.2
    if args.epochs is None:
        args.epochs = 90 if args.offline else 2
    if args.margin is None:
        args.margin = 0.2 if args.negatives == "hinge" else 0.0
    return args


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, fine-tune, evaluate again, and write what changed."""
    args = parse(arguments)
    process = Accelerator()  # one of several under `accelerate launch`
    if args.offline:
        process.print(f"OFFLINE: {OFFLINE_NOTE}.")
    try:
        run(args, process)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


def run(args: argparse.Namespace, process: Accelerator) -> None:
    """Do the work for parsed arguments; the main process alone writes and prints."""
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    with process.main_process_first():  # downloads once
        data = offline_data(args) if args.offline else load_data(args)
        tower = offline_tower(args.seed) if args.offline else load_tower(args, process.device)
    if args.learning_rate is None:
        args.learning_rate = default_rate(tower, args)
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    if args.offline:
        config |= {"data": "scikit-learn digits", "model": "random", "note": OFFLINE_NOTE}
    settings = (f"{name}={v}" for name, v in config.items() if v not in (None, "", False))
    process.print("Settings:", ", ".join(settings))
    if args.train_blocks is not None:
        tower.freeze(all_but_last=args.train_blocks)
    finetuner, options = prepare(tower, data.train, args)
    process.print(f"{len(data.train)} images to train on, {len(data.test)} to evaluate on.")

    also = {} if data.held_out is None else {HELD_OUT: data.held_out}
    before = pairclip.evaluate(tower, data.test, num_workers=args.num_workers, also=also)
    shown = pictures_to_show(data.test)
    similarity_before = pairclip.similarity_matrix(pairclip.embed_images(tower, shown))

    history = finetuner.fit(data.train, epochs=args.epochs, num_workers=args.num_workers, **options)
    if not process.is_main_process:
        return

    after = pairclip.evaluate(tower, data.test, num_workers=args.num_workers, also=also)
    similarity_after = pairclip.similarity_matrix(pairclip.embed_images(tower, shown))
    print("\n" + after.to_markdown(before))
    metrics = {"before": before.to_dict(), "after": after.to_dict(), "config": config}
    note = "\n(offline: digits, random tower)" if args.offline else ""
    write_json(output / "metrics.json", metrics, indent=1)
    for when, similarity, evaluation in [
        ("before", similarity_before, before),
        ("after", similarity_after, after),
    ]:
        pairclip.plot_similarity_matrix(
            shown,
            similarity,
            title=f"Similarity of held-out images {when} fine-tuning{note}",
            path=output / f"similarity_{when}.png",
        )
        pairclip.plot_class_similarity(
            evaluation,
            order=before,
            title=f"Mean similarity of classes {when} fine-tuning{note}",
            path=output / f"class_similarity_{when}.png",
        )
    pairclip.plot_history(history, title=f"Fine-tuning{note}", path=output / "history.png")
    page = pairclip.write_report(
        output,
        before,
        after,
        dataset=data.test,
        history=history,
        note=f"{OFFLINE_NOTE[:1].upper()}{OFFLINE_NOTE[1:]}." if args.offline else None,
    )
    tower.save_pretrained(output / "tower")
    print(f"\nFigures, pictures and the tuned tower are in {output}. Open {page} to see it all.")


def prepare(
    tower: pairclip.VisionTower, dataset: Any, args: argparse.Namespace
) -> tuple[pairclip.Finetuner, dict[str, Any]]:
    """A Finetuner and how it fits: sampled pairs, or all pairs of class-balanced batches."""
    form = {"negatives": args.negatives, "margin": args.margin}
    if args.pairs == "sampled":
        loss: Any = pairclip.CosinePairLoss(**form)
        sampler = pairclip.PairSampler(
            pairclip.labels_of(dataset),
            args.batch_size // 2,
            positive_fraction=args.positive_fraction,
            seed=args.seed,
        )
        options: dict[str, Any] = {"sampler": sampler}
    else:
        loss = pairclip.AllPairsCosineLoss(positive_fraction=args.positive_fraction, **form)
        options = {"batch_size": args.batch_size}
    if args.resume:
        options |= {"checkpoint_dir": args.output / "checkpoints", "resume": True}
    finetuner = pairclip.Finetuner(
        tower,
        loss,
        learning_rate=args.learning_rate,
        micro_batch_size=args.micro_batch_size,
        # The random tower of --offline starts collapsed.
        callbacks=[] if args.offline else [pairclip.CollapseMonitor()],
        seed=args.seed,
    )
    return finetuner, options


def pictures_to_show(dataset: Any, count: int = 8) -> list[Any]:
    """The first images of the first classes, two of each."""
    labels = pairclip.labels_of(dataset)
    chosen = [i for label in labels.unique() for i in (labels == label).nonzero()[:2, 0].tolist()]
    images = pairclip.LabelledImages(dataset)
    return [images[i][0] for i in chosen[:count]]


def default_rate(tower: pairclip.VisionTower, args: argparse.Namespace) -> float:
    """What served best for small towers; for large ones, unmeasured, what is customary for CLIP."""
    if args.offline:
        return 1e-3
    size = sum(parameter.numel() for parameter in tower.parameters())
    return 6e-4 if size < 10_000_000 else 1e-5


def load_tower(args: argparse.Namespace, device: torch.device) -> pairclip.VisionTower:
    """The tower of --model."""
    try:
        return pairclip.load_tower(args.model, device=device, image_size=args.image_size)
    except OSError as error:
        raise SystemExit(f"error: {error}\n{NO_NETWORK_HELP}") from error


def load_data(args: argparse.Namespace) -> Data:
    """The images of --data, or CIFAR-10."""
    from torchvision.datasets import CIFAR10, ImageFolder

    if args.data is None:
        try:
            train = CIFAR10(args.download_dir, train=True, download=True)
            test = CIFAR10(args.download_dir, train=False, download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(
                f"error: CIFAR-10 could not be downloaded: {error}\n{NO_NETWORK_HELP}"
            ) from error
        return divide(train, test, args)
    if (args.data / "train").is_dir() and (args.data / "test").is_dir():
        train, test = (ImageFolder(args.data / part) for part in ("train", "test"))
        if train.classes != test.classes:
            raise ValueError(f"train/ and test/ of {args.data} must have the same classes.")
        return divide(train, test, args)
    images = ImageFolder(args.data / "train" if (args.data / "train").is_dir() else args.data)
    return split(images, args)


def split(images: Any, args: argparse.Namespace) -> Data:
    """Hold out --test-fraction of each class."""
    if not 0 < args.test_fraction < 1:
        raise ValueError(f"--test-fraction must be between 0 and 1, got {args.test_fraction}.")
    labels = pairclip.labels_of(images).numpy()
    shuffled = np.random.default_rng(args.seed).permutation(len(labels))
    test = np.concatenate(
        [
            # A class of one image can't be searched for, so it is trained on.
            of_class[: min(max(1, round(args.test_fraction * len(of_class))), len(of_class) - 1)]
            for label in np.unique(labels)
            for of_class in [shuffled[labels[shuffled] == label]]
        ]
    )
    train = np.setdiff1d(shuffled, test)
    return divide(Subset(images, train.tolist()), Subset(images, np.sort(test).tolist()), args)


def divide(train: Any, test: Any, args: argparse.Namespace) -> Data:
    """Take out the held-out classes, and as many images per class as were asked for."""
    held_out = [name for name in args.hold_out_classes.split(",") if name]
    classes = pairclip.class_names_of(train) or []
    unknown = sorted(set(held_out) - set(classes))
    if unknown:
        raise ValueError(f"--hold-out-classes has {unknown}; the classes are {classes}.")
    unseen = {classes.index(name) for name in held_out}
    seen = set(range(len(classes))) - unseen
    if not seen:
        raise ValueError("--hold-out-classes leaves no class to train on.")
    return Data(
        train=some_of(train, seen, args.train_per_class, args.seed),
        test=some_of(test, seen, args.test_per_class, args.seed),
        held_out=some_of(test, unseen, args.test_per_class, args.seed) if unseen else None,
    )


def some_of(dataset: Any, classes: set[int], per_class: int | None, seed: int) -> Any:
    """A random subset of the classes' images, in the dataset's order."""
    labels = pairclip.labels_of(dataset).numpy()
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    chosen = [shuffled[labels[shuffled] == label][:per_class] for label in sorted(classes)]
    return Subset(dataset, np.sort(np.concatenate(chosen)).tolist())


def offline_data(args: argparse.Namespace) -> Data:
    """Digits of scikit-learn, 8 x 8 pixels, with a third held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)
    return split((images, [str(digit) for digit in digits.target]), args)


def offline_tower(seed: int) -> pairclip.VisionTower:
    """A small CLIP vision tower with random weights."""
    return random_tower(patch_size=4, width=64, heads=4, embedding_dim=32, seed=seed)


if __name__ == "__main__":
    main()
