"""Fine-tune a CLIP vision tower on CIFAR-10, or on your own folder of images.

    python examples/cifar10.py                                # CIFAR-10 and CLIP, downloaded
    python examples/cifar10.py --data FOLDER --model FOLDER   # your images, a local tower
    python examples/cifar10.py --offline                      # no network: drawings, a small tower
    accelerate launch examples/cifar10.py                     # on all GPUs

Writes the metrics, a page, pictures before and after, and the tuned tower into --output. The work
is that of the subcommand `pairclip tune`; `pairclip.command.tune` shows which pieces of the library
do it. This file adds two datasets: CIFAR-10, and drawings where there is no network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pairclip.command import data, tune
from pairclip.command.arguments import (
    CLIP,
    DATA_HELP,
    HelpFormatter,
    add_json,
    add_model,
    add_table_columns,
)
from pairclip.command.models import load_model
from pairclip.command.running import obey

OFFLINE_NOTE = (
    "offline stand-in: drawings made by a program and a small tower trained on Tiny-ImageNet, "
    "not CIFAR-10 and CLIP"
)
OFFLINE = Path(__file__).parent / "offline"
# In place of the defaults, so that it takes about a minute on one processor core.
OFFLINE_SETTINGS = {"max_steps": 40, "batch_size": 96, "test_fraction": 1 / 3}
NO_NETWORK_HELP = (
    "Without a network, use --offline, or --data FOLDER with your images and --model FOLDER with "
    "a tower that transformers saved."
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments; nothing heavy is loaded for them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--offline",
        action="store_true",
        help="needs no network: drawings, a small tower, about a minute on one core",
    )
    parser.add_argument("--data", type=Path, help=f"{DATA_HELP} (default: CIFAR-10, downloaded)")
    add_model(parser, "--model", "the tower to tune", default=CLIP, metavar="ID_OR_FOLDER")
    parser.add_argument(
        "--download-dir", type=Path, default=Path("runs/data"), help="where CIFAR-10 goes"
    )
    tune.add_settings(parser, output=Path("runs/cifar10"))
    add_table_columns(parser)
    add_json(parser)
    parser.set_defaults(subcommand="examples/cifar10.py")
    args = parser.parse_args(arguments)
    if not args.offline:
        return args
    for flag, given in (
        ("--data", args.data),
        ("--model", args.model != CLIP),
        ("--image-size", args.image_size),
    ):
        if given:
            parser.error(f"--offline brings its own images and tower: leave out {flag}")
    args.model = str(OFFLINE / "tower")
    for name, value in OFFLINE_SETTINGS.items():
        epochs_given = name == "max_steps" and args.epochs != parser.get_default("epochs")
        if getattr(args, name) == parser.get_default(name) and not epochs_given:
            setattr(args, name, value)
    return args


def run(args: argparse.Namespace) -> None:
    """Do the work for parsed arguments."""
    tune.check(args)
    note = None
    if args.offline:
        import torch

        note = OFFLINE_NOTE
        torch.set_num_threads(1)  # a tower this small only waits for more
        print(f"OFFLINE: {OFFLINE_NOTE}. This takes about a minute.", file=sys.stderr, flush=True)
        split = offline_split(args)
    elif args.data is not None:
        split = data.open_split("--data", args.data, args)
    else:
        split = cifar10_split(args)

    def load(device: Any) -> Any:
        return load_model("--model", args.model, device, args.image_size)

    tune.tune(args, split, load, note)


def cifar10_split(args: argparse.Namespace) -> data.Split:
    """CIFAR-10, downloaded once, by one process."""
    from accelerate import PartialState
    from torchvision.datasets import CIFAR10

    try:
        with PartialState().local_main_process_first():
            train, test = (
                CIFAR10(args.download_dir, train=train, download=True) for train in (True, False)
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"CIFAR-10 could not be downloaded: {error} {NO_NETWORK_HELP}") from error
    return data.divide(train, test, "CIFAR-10's own division", args)


def offline_split(args: argparse.Namespace) -> data.Split:
    """Sixty drawings of each kind."""
    sys.path.insert(0, str(OFFLINE))
    from drawings import drawings

    from pairclip import LabelledImages

    return data.split_at_random(LabelledImages(drawings(per_class=60)), args)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, fine-tune, evaluate again, and write what changed; the exit code."""
    return obey(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
