"""The images that a command line names, opened, with words for each thing that goes wrong."""

from __future__ import annotations

import argparse
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pairclip
from pairclip.command.arguments import DATA_HELP

_TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
TEST_FRACTION = 0.2
_HELD_OUT = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Split:
    """Images to train on and to evaluate on.

    Attributes:
        train: The former.
        test: The latter.
        held_out: Of classes that are not trained on, or None.
        said: How they came to be, for a person.
    """

    train: Any
    test: Any
    held_out: Any
    said: str


def open_images(
    name: str, path: Path, args: argparse.Namespace, split: str | None = None
) -> pairclip.LabelledImages:
    """A labelled dataset.

    Args:
        name: What the path is called on the command line.
        path: A folder of class folders, or a table.
        args: With the columns of a table.
        split: Which of its parts; None where it has none.

    Returns:
        The images.

    Raises:
        ValueError: If it is something else, in words on what to do about it.
        FileNotFoundError: If there is nothing.
    """
    check_there(name, path)
    if split is not None and path.is_file():
        return _labelled(_table(name, path, args, split), args)
    parts = [*_table_parts(name, path, args)] if path.is_file() else _parts(path)
    if split is not None and split not in parts:
        raise ValueError(f"{name} '{path}' has no part {split!r}: {' and '.join(parts) or 'none'}.")
    if split is None and len(parts) > 1:
        flag = "--gallery-split" if name == "--gallery" else "--split"
        raise ValueError(
            f"{name} '{path}' has {' and '.join(parts)}: choose one, {flag} {parts[-1]} for "
            "instance."
        )
    if path.is_file():
        return _labelled(_table(name, path, args), args)
    return _open_folder(name, path / (split or (parts[0] if parts else "")), args)


def open_split(name: str, path: Path, args: argparse.Namespace) -> Split:
    """A dataset in two parts: its own train and test, or a random share of each class held out."""
    parts = open_parts(name, path, args)
    names = list(parts)
    if names[0] == "train" and len(names) > 1:
        if args.test_fraction != TEST_FRACTION:
            raise ValueError(
                f"--test-fraction {args.test_fraction:g} would be ignored: {name} '{path}' has "
                f"{' and '.join(names)}."
            )
        said = f"trained on {names[0]}, evaluated on {names[1]}"
        said += "".join(f"; {part} is not used" for part in names[2:])
        return divide(parts["train"], parts[names[1]], said, args)
    if len(names) > 1:
        raise ValueError(f"{name} '{path}' has {' and '.join(names)}, but no train to train on.")
    return split_at_random(parts[names[0]], args)


def split_at_random(images: pairclip.LabelledImages, args: argparse.Namespace) -> Split:
    """Hold out --test-fraction of each class, then what else the arguments say."""
    labels = images.labels.numpy()
    generator = np.random.default_rng(args.seed)
    train, test = [], []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        # A class of one image can't be searched for, so it is trained on.
        count = min(max(1, round(args.test_fraction * len(rows))), len(rows) - 1)
        test.append(rows[:count])
        train.append(rows[count:])
    said = f"{args.test_fraction:.0%} of each class held out at random (seed {args.seed})"
    train_rows, test_rows = (np.sort(np.concatenate(each)).tolist() for each in (train, test))
    if not test_rows:
        raise ValueError("Each class has one image alone, so none can be held out to evaluate on.")
    return divide(_subset(images, train_rows), _subset(images, test_rows), said, args)


def open_parts(
    name: str, path: Path, args: argparse.Namespace
) -> dict[str, pairclip.LabelledImages]:
    """All images by the name of their part, undivided where there are no parts."""
    check_there(name, path)
    if path.is_file():
        tables = _table_parts(name, path, args) or {"all": _table(name, path, args)}
        return {part: _labelled(table, args) for part, table in tables.items()}
    parts = {part: _open_folder(name, path / part, args) for part in _parts(path)}
    return parts or {"all": _open_folder(name, path, args)}


def divide(train: Any, test: Any, said: str, args: argparse.Namespace) -> Split:
    """Take out the held-out classes, and as many images of each class as were asked for."""
    classes = [name for name in (args.hold_out_classes or "").split(",") if name]
    train, test = pairclip.LabelledImages(train), pairclip.LabelledImages(test)
    if unknown := sorted(set(classes) - {*(train.class_names or []), *(test.class_names or [])}):
        raise ValueError(
            f"--hold-out-classes has {unknown}; the classes are {_some(train.class_names or [])}."
        )
    trained = [name for name in train.class_names or [] if name not in classes]
    if train.class_names and not trained:
        raise ValueError("--hold-out-classes leaves no class to train on.")
    split = Split(
        train=_some_of(train, classes, False, args.train_per_class, args.seed),
        test=_some_of(test, classes, False, args.test_per_class, args.seed),
        held_out=_some_of(test, classes, True, args.test_per_class, args.seed) if classes else None,
        said=said,
    )
    _check_sizes(split, args)
    return split


def _check_sizes(split: Split, args: argparse.Namespace) -> None:
    """Raise where there is nothing to learn or to find, before anything is embedded."""
    classes = np.unique(pairclip.labels_of(split.train).numpy(), return_counts=True)[1]
    if len(classes) < 2 or classes.max() < 2:
        one, more = ("class", "classes") if len(classes) < 2 else ("image of each class", "images")
        raise ValueError(
            f"There is one {one} to train on ({split.said}), and pairs need two. Give more {more}."
        )
    for images, which in ((split.test, ""), (split.held_out, " of --hold-out-classes")):
        if images is not None and not has_pairs(images):
            raise ValueError(
                f"There is one image of each class{which} to evaluate on ({split.said}), and it "
                f"would search for another one. Give a larger --test-fraction than "
                f"{args.test_fraction:g} where images are held out, or more images."
            )


def has_pairs(images: Any) -> bool:
    """Whether a class has two images, so that one can be searched for with the other."""
    counts = np.unique(pairclip.labels_of(images).numpy(), return_counts=True)[1]
    return bool(counts.max() > 1)


def described(dataset: Any) -> dict[str, Any]:
    """What a run folder says of a dataset."""
    images = pairclip.LabelledImages(dataset)
    return {
        "images": len(images),
        "classes": len(images.labels.unique()),
        "checksum": _fingerprint(images),
    }


def _fingerprint(images: pairclip.LabelledImages) -> str:
    """A checksum of what a dataset has: names and sizes of its files, and their classes."""
    digest = hashlib.sha256(images.labels.numpy().tobytes())
    digest.update(repr(images.class_names).encode("utf-8", "surrogatepass"))
    for index in range(len(images)):
        path = images.source.path(index)
        if path is None:
            return f"{digest.hexdigest()[:16]} (labels alone)"
        size = os.stat(path).st_size if os.path.exists(path) else 0
        name = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def check_data(args: argparse.Namespace, paths: dict[str, Path | None]) -> None:
    """Raise where data can't be opened, or an argument would be ignored; nothing is loaded."""
    given = {name: path for name, path in paths.items() if path is not None}
    for name, path in given.items():
        check_there(name, path)
    if all(path.is_dir() for path in given.values()):
        for flag, default in (("image_column", "image"), ("label_column", "label"), ("root", None)):
            if getattr(args, flag) != default:
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(args, flag)} would be ignored: it is of "
                    f"a table, and {' and '.join(given)} is a folder."
                )


def check_there(name: str, path: Path) -> None:
    """Raise where a path can be no data, before anything heavy is loaded."""
    if not path.exists():
        raise FileNotFoundError(f"{name} '{path}' does not exist. Give {DATA_HELP}.")
    if path.is_dir():
        return
    if path.suffix.lower() in _ARCHIVES:
        raise ValueError(f"{name} '{path}' is an archive. Unpack it, and give the folder.")
    if path.suffix.lower() not in _TABLES:
        raise ValueError(f"{name} '{path}' is neither a folder nor a table. Give {DATA_HELP}.")


def _labelled(dataset: Any, args: argparse.Namespace) -> pairclip.LabelledImages:
    if getattr(args, "skip_unreadable", False):
        return pairclip.LabelledImages(dataset, on_error="skip", num_workers=args.num_workers)
    return pairclip.LabelledImages(dataset)


def _parts(folder: Path) -> list[str]:
    """Names of the splits that a folder has, train first; a class may have such a name, too."""
    return [
        part
        for part in ("train", *_HELD_OUT)
        if (folder / part).is_dir() and any(entry.is_dir() for entry in (folder / part).iterdir())
    ]


def _open_folder(name: str, folder: Path, args: argparse.Namespace) -> pairclip.LabelledImages:
    """The images of its class folders; an error where images lie flat, or there are none."""
    from pairclip.datasets import image_files

    if any(entry.is_dir() and entry.name[0] not in "._" for entry in folder.iterdir()):
        return _labelled(str(folder), args)
    if count := len(image_files(folder)):
        raise ValueError(
            f"{name} '{folder}' has {count:,} images but no subfolders, so nothing says their "
            "classes. Move the images of each class into a folder of its own, or give a CSV file "
            "with the columns image and label."
        )
    raise ValueError(f"{name} '{folder}' has no images. Give {DATA_HELP}.")


def _table(name: str, path: Path, args: argparse.Namespace, split: str | None = None) -> Any:
    try:
        return pairclip.TableDataset(
            path, image=args.image_column, label=args.label_column, root=args.root, split=split
        )
    except (ValueError, TypeError, FileNotFoundError) as error:
        flag = "--gallery-split" if name == "--gallery" else "--split"
        words = (
            str(error)
            .replace("`table` ", "")
            .replace(f"'{path}' ", "")
            .replace("`root=`", "--root")
        )
        words = words.replace("`split`", flag).replace(", or a dict from columns to values", "")
        if "has no column" in words:
            words += " Name its columns with --image-column and --label-column."
        raise type(error)(f"{name} '{path}': {words}") from error


def _table_parts(name: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of each part, train first, of a table that has a column `split`."""
    parts = {}
    for part in ("train", *_HELD_OUT):
        # A table without that part, or without the column, is opened as a whole below.
        with suppress(ValueError):
            parts[part] = _table(name, path, args, part)
    return parts


def _some_of(
    images: pairclip.LabelledImages, names: list[str], among: bool, per_class: int | None, seed: int
) -> Any:
    """A random subset of the classes among these names, or not among them, in order."""
    labels = images.labels.numpy()
    named = {label for label, name in enumerate(images.class_names or []) if name in names}
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    chosen = [
        shuffled[labels[shuffled] == label][:per_class]
        for label in np.unique(labels).tolist()
        if (label in named) == among
    ]
    if not chosen:
        raise ValueError("--hold-out-classes leaves no class to evaluate on.")
    return _subset(images, np.sort(np.concatenate(chosen)).tolist())


def _subset(images: pairclip.LabelledImages, rows: list[int]) -> Any:
    from torch.utils.data import Subset

    return Subset(images, rows)


def _some(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
