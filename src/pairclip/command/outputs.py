"""A folder for the results of one run, which says how they were made."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pairclip

RUN = "run.json"
_UNFINISHED = ("checkpoints", "recipes", "recipes.json")  # what there is before a tower is written
# These don't decide the results. Paths aren't compared either, but the tower and images are.
_MAY_DIFFER = (
    *("model", "overwrite", "resume", "json"),
    *("num_workers", "embed_batch_size", "micro_batch_size"),
)
_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "numpy", "scipy", "pillow")


def check_output(folder: Path, args: argparse.Namespace, results: tuple[str, ...]) -> list[str]:
    """Look whether a run may go into a folder, before anything heavy is loaded.

    Args:
        folder: Where it would go.
        args: Of the command line, with `overwrite`, and perhaps `resume`.
        results: Names of the files and folders that the run will write.

    Returns:
        Those that are there.

    Raises:
        ValueError: If the folder is a file, or holds a run that is neither to be replaced nor can
            be continued.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is a file. Give a folder for the results.")
    check_writable("--output", folder)
    # run.json alone is of a run that failed before it wrote anything.
    existing = [name for name in results if (folder / name).exists()]
    if not existing or args.overwrite:
        return existing
    another = f"run{_made_when(folder / RUN)} ({', '.join(existing[:4])})"
    finished = any(name not in _UNFINISHED for name in existing)
    resume = getattr(args, "resume", None)  # None where there is no such option
    if resume:
        if finished and not _has_checkpoint(folder):
            raise ValueError(
                f"--output '{folder}' holds a finished {another} without checkpoints, so there is "
                "nothing to continue. Give another folder, or --overwrite instead of --resume."
            )
        return existing
    offer = resume is not None and not finished and place_to_continue(folder) is not None
    more = ", or --resume to continue that run" if offer else ""
    raise ValueError(
        f"--output '{folder}' holds another {another}. Give another folder, or --overwrite{more}."
    )


def check_new(name: str, path: Path, overwrite: bool) -> None:
    """Look whether a file may be written.

    Args:
        name: What the path is called on the command line.
        path: The file.
        overwrite: Whether it may replace another one.

    Raises:
        ValueError: If it is there, or can't be written.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{name} '{path}' is there already. Give another place, or --overwrite.")
    check_writable(name, path.parent)


def check_writable(name: str, folder: Path) -> None:
    """Raise unless files can be made in a folder, or in what is there of the way to it."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions alone don't tell
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{name}: nothing can be written into '{there}': {reason}. Give another place."
        ) from error


def place_to_continue(folder: Path) -> str | None:
    """What the run in a folder can be continued from, in words; None where that is nothing."""
    if _has_checkpoint(folder):
        return "the last checkpoint"
    if any((folder / "recipes").glob("trial-*.json")):
        return "the last recipe tried"
    return None


def open_run(
    folder: Path, args: argparse.Namespace, results: tuple[str, ...], **facts: Any
) -> dict[str, Any]:
    """Prepare a folder for a run, before anything takes long.

    Args:
        folder: Made if it isn't there.
        args: Of the command line: they are written down; `overwrite` and `resume` are obeyed.
        results: Names of the files and folders that the run will write.
        facts: Written down too, such as a checksum of the data.

    Returns:
        What ``run.json`` says.

    Raises:
        ValueError: If `check_output` does, or a run of other settings would be continued.
    """
    existing = check_output(folder, args, results)
    if args.overwrite:
        for name in existing:
            _remove(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": args.subcommand,
        "folder": os.getcwd(),
        "arguments": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if key not in {"run", "subcommand"}
        },
        **facts,
        "versions": {
            "pairclip": pairclip.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }
    if getattr(args, "resume", False) and (folder / RUN).is_file():
        if place_to_continue(folder) is None:
            print(f"Nothing was kept of the run in '{folder}', so it starts from the beginning.")
        else:
            _check_same_settings(folder, args, run)
    write_json(folder / RUN, run)
    return run


def warn_if_tuned_on(name: str, model: str, data: Path, part: str | None) -> None:
    """Warn where the tower of a run is about to be evaluated on images that it was tuned on."""
    from pairclip import _files

    try:
        run = _files.read_json(Path(model).parent / RUN)
        whole = Path(run["folder"], run["arguments"]["data"]).resolve()
        split = run["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not the tower of a run
    if (data / (part or "")).resolve() in (whole, whole / "train"):
        warnings.warn(
            f"{name} was tuned on {split['train']['images']:,} of the images of '{data}', so these "
            f"metrics are too good. Those of the {split['test']['images']:,} that were held out "
            f"are in '{Path(model).parent / 'metrics.json'}'.",
            stacklevel=2,
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    from pairclip import _files

    _files.write_json(path, _files.plain(value), indent=1)


def _has_checkpoint(folder: Path) -> bool:
    saved = folder / "checkpoints"
    # Looked for first, because a look inside takes torch.
    return any(saved.glob("step-*")) and pairclip.newest_checkpoint(saved) is not None


def _check_same_settings(folder: Path, args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Raise if `run` is not the one that is written down in the folder."""
    from pairclip import _files

    try:
        saved = _files.read_json(folder / RUN)
        before, now = ({**each["arguments"]} for each in (saved, run))
        facts = {"--model": (saved["tower"], run["tower"]), "DATA": (saved["data"], run["data"])}
    except (OSError, ValueError, KeyError, TypeError):
        return  # the fit compares what decides its steps
    different = []
    for name, value in now.items():
        free = name in _MAY_DIFFER or isinstance(getattr(args, name), Path)
        if name in before and before[name] != value and not free:
            was = "not given" if before[name] is None else before[name]
            different.append(f"--{name.replace('_', '-')} was {was}")
    if not different:  # some of which decide which images of DATA are taken
        different = [f"{name} is another one" for name, (was, is_) in facts.items() if was != is_]
    if different:
        raise ValueError(
            f"--resume continues the run of {saved.get('made')} in '{folder}', which had other "
            f"settings: {'; '.join(different)}. Give the same ones, or another folder."
        )


def _made_when(path: Path) -> str:
    from pairclip import _files

    try:
        return f" of {_files.read_json(path)['made']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
