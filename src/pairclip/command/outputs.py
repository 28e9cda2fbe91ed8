"""A folder for the results of one run, which says how they were made."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pairclip

RUN = "run.json"
_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "numpy", "scipy", "pillow")


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
        ValueError: If the folder is a file, or holds another run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is a file. Give a folder for the results.")
    # run.json alone is of a run that failed before it wrote anything.
    existing = [name for name in results if (folder / name).exists()]
    resume = getattr(args, "resume", False)
    if existing and not (args.overwrite or resume):
        more = "" if not hasattr(args, "resume") else ", or --resume to continue that run"
        raise ValueError(
            f"--output '{folder}' holds another run{_made_when(folder / RUN)} "
            f"({', '.join(existing[:4])}). Give another folder, or --overwrite{more}."
        )
    if args.overwrite and not resume:
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
