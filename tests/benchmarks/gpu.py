"""What a GPU gives: training, embedding, losses and evaluation, in images per second and memory.

    pip install -e ".[bench]"
    python tests/benchmarks/gpu.py            # under eight minutes on one GPU; less on a CPU
    python tests/benchmarks/gpu.py --tiny     # what runs where, at a size that says nothing

Towers have random weights, images are noise. "share" is the part of the device's measured matrix
rate that is used: the operations of the matrix products that are needed, by those of a product of
two matrices of 8,192 x 8,192 in the same time. Of a tower they are in bfloat16 (float32 on a CPU),
without those of attention's scores, and times three for training; of a loss and an evaluation in
float32: all pairs' products, and their gradients (squared: of D x D; linear has none). Peak is what
PyTorch had allocated on the device.

loss: forward and backward, D = 512. embed: `embed_images` of bytes that lie on the device or in the
memory of the host, and of JPEG files of twice the tower's size, which are resized on the device or
where they are read. train: steps of a fit without its loading, beside a loop written by hand with
the same loss, autocast, clipping and fused AdamW; in pieces, and with the tower compiled. "x bare"
is the time of a step by that of the loop as it is. evaluate: `evaluate_embeddings`, D = 512.

The first steps are not counted. What takes too much memory, fails, or would begin after --seconds,
is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import numpy as np
import torch
from _bench import Row
from contenders.task import CLIP, RATE, backward_of
from PIL import Image
from torch import Tensor, nn

from pairclip import (
    AllPairsCosineLoss,
    Finetuner,
    VisionTower,
    embed_images,
    evaluate_embeddings,
)
from pairclip.finetuner.accelerators import new_accelerator
from pairclip.finetuner.step import Trainer
from pairclip.towers import random_tower


class Shape(NamedTuple):
    """A CLIP image tower."""

    image: int
    patch: int
    width: int
    depth: int
    embedding: int

    @property
    def operations(self) -> float:
        """Floating-point operations of an image's matrix products, but for attention's scores."""
        tokens = (self.image // self.patch) ** 2 + 1
        blocks = self.depth * 12 * self.width**2
        return 2 * tokens * (blocks + 3 * self.patch**2 * self.width)

    def tower(self, device: torch.device) -> VisionTower:
        return random_tower(
            image_size=self.image,
            patch_size=self.patch,
            width=self.width,
            depth=self.depth,
            heads=max(1, self.width // 64),
            embedding_dim=self.embedding,
            intermediate_size=4 * self.width,
        ).to(device)


SHAPES = {
    "ViT-B/32": Shape(224, 32, 768, 12, 512),
    "ViT-L/14": Shape(224, 14, 1024, 24, 768),
    "tiny": Shape(16, 8, 32, 2, 12),
}


class Sizes(NamedTuple):
    """How much of everything."""

    towers: tuple[str, ...]
    batch: int
    micro: int
    steps: int
    embedded: int
    files: int
    losses: tuple[int, ...]
    evaluated: int
    matrix: int


LARGE = Sizes(("ViT-B/32", "ViT-L/14"), 1024, 128, 6, 16_384, 2048, (8192, 65_536), 100_000, 8192)
# What a processor does in minutes.
ON_CPU = Sizes(("ViT-B/32",), 16, 8, 3, 48, 48, (8192,), 10_000, 2048)
TINY = Sizes(("tiny",), 16, 8, 2, 64, 16, (64, 128), 500, 256)
_WARM = 2  # steps, which compile and fill caches
_WIDTH = 512  # D of losses and evaluations
_FULL = re.compile(r"out of memory|ALLOC_FAILED|allocate memory")


class Bench:
    """Measures on one device until the time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.sizes = TINY if args.tiny else LARGE if self.on_gpu else ON_CPU
        self.end = time.monotonic() + args.seconds
        self.rows: list[Row] = []
        kinds = (torch.float32, torch.bfloat16) if self.on_gpu else (torch.float32,)
        self.rates = {str(kind).removeprefix("torch."): self._matrix_rate(kind) for kind in kinds}

    def _matrix_rate(self, kind: torch.dtype) -> float:
        """Floating-point operations per second of a product of square matrices."""
        size = self.sizes.matrix
        a, b = (torch.randn(size, size, device=self.device, dtype=kind) for _ in range(2))
        self.timed(lambda: a @ b)
        return 2 * size**3 / min(self.timed(lambda: a @ b) for _ in range(5))

    def timed(self, step: Callable[[], Any]) -> float:
        """Seconds until the device has done it."""
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def add(self, measure: Callable[[], Row], **what: Any) -> None:
        """A row: what, and what is measured or stands against it."""
        row: Row = {"outcome": _bench.TIMED_OUT}
        if time.monotonic() < self.end:
            if self.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                row = {"outcome": _bench.MEASURED, **measure()}
            except Exception as error:  # of one row, which others don't have
                full = isinstance(error, MemoryError) or _FULL.search(str(error))
                row = {"outcome": _bench.OUT_OF_MEMORY}
                if not full:
                    row = {"outcome": _bench.FAILED, "detail": f"{type(error).__name__}: {error}"}
            torch.compiler.reset()
            if self.on_gpu:
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row = {**what, **row}
        self.rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)

    def of_images(
        self, count: int, seconds: float, operations: float | None, *, exact: bool = False
    ) -> Row:
        """Images per second, and what part of the matrix rate the operations are in that time."""
        row: Row = {"seconds": seconds, "images_per_second": count / seconds}
        if operations:
            rate = self.rates["bfloat16" if self.on_gpu and not exact else "float32"]
            row["share"] = operations / seconds / rate
        return row


def training(bench: Bench) -> None:
    """Steps of a fit beside those of a loop written by hand."""
    for name in bench.sizes.towers:
        shape = SHAPES[name]
        ways: dict[str, Row] = {
            "bare": {"bare": True},
            "pairclip": {},
            "pairclip, in pieces": {"micro": bench.sizes.micro},
            "bare, compiled": {"bare": True, "compiled": True},
            "pairclip, compiled": {"compiled": True},
        }
        for way, how in ways.items():
            measure = partial(train, bench, shape, **how)
            bench.add(measure, part="train", tower=name, way=way, batch=bench.sizes.batch)


def train(
    bench: Bench,
    shape: Shape,
    *,
    bare: bool = False,
    micro: int | None = None,
    compiled: bool = False,
) -> Row:
    sizes = bench.sizes
    tower = shape.tower(bench.device)
    if compiled:
        tower.compile(backend="inductor" if bench.on_gpu else "eager")
    pixels = tower.preprocess.on_device(noise(bench, shape, sizes.batch), bench.device)
    labels = torch.arange(sizes.batch, device=bench.device) % max(2, sizes.batch // 8)
    loss = AllPairsCosineLoss(negatives="squared")
    if bare:
        step = bare_step(bench, tower, loss, pixels, labels)
        taken = [step() for _ in range(_WARM + sizes.steps)][_WARM:]
    else:
        settings = Finetuner(tower, loss, learning_rate=RATE, micro_batch_size=micro).settings
        accelerator = new_accelerator("auto")
        trainer = Trainer(tower, loss, settings, accelerator, _WARM + sizes.steps)
        with trainer.training():
            taken = [
                bench.timed(partial(trainer, pixels, labels, None, number + 1))
                for number in range(_WARM + sizes.steps)
            ][_WARM:]
    return bench.of_images(
        sizes.batch, statistics.median(taken), 3 * sizes.batch * shape.operations
    )


def bare_step(
    bench: Bench, tower: nn.Module, loss: nn.Module, pixels: Tensor, labels: Tensor
) -> Callable[[], float]:
    """A step as one writes it by hand."""
    optimizer = torch.optim.AdamW(tower.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    tower.train()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.on_gpu):
            embeddings = tower(pixels)
        loss(embeddings.float(), labels).backward()
        nn.utils.clip_grad_norm_(tower.parameters(), CLIP)
        optimizer.step()

    return lambda: bench.timed(step)


def embedding(bench: Bench) -> None:
    """Images that lie on the device, in the memory of the host, and in files."""
    sizes = bench.sizes
    side = 2 * max(SHAPES[name].image for name in sizes.towers)
    with tempfile.TemporaryDirectory() as folder:
        pictures = np.random.default_rng(0).integers(0, 256, (32, side, side * 4 // 3, 3), np.uint8)
        files = [Path(folder) / f"{number}.jpg" for number in range(sizes.files)]
        for number, file in enumerate(files):
            if number < len(pictures):
                Image.fromarray(pictures[number]).save(file, quality=90)
            else:
                shutil.copyfile(files[number % len(pictures)], file)
        for name in sizes.towers:
            shape = SHAPES[name]
            tower = shape.tower(bench.device)
            there = partial(noise, bench, shape, sizes.embedded)
            workers = {"num_workers": 0 if bench.args.tiny else bench.args.workers}
            ways: dict[str, tuple[Callable[[], Any], Row]] = {
                "bytes on the device": (there, {"on_device": True}),
                "bytes of the host": (lambda there=there: there().cpu(), {"on_device": True}),
                "files, computed on the device": (lambda: files, {"on_device": True, **workers}),
                "files, computed by workers": (lambda: files, workers),
            }
            for way, (images, options) in ways.items():
                measure = partial(embed, bench, shape, tower, images, options)
                bench.add(measure, part="embed", tower=name, way=way, batch=sizes.micro)


def embed(
    bench: Bench, shape: Shape, tower: VisionTower, given: Callable[[], Any], options: Row
) -> Row:
    images, options = given(), {"batch_size": bench.sizes.micro, **options}
    embed_images(tower, images[: 2 * bench.sizes.micro], **options)
    seconds = bench.timed(lambda: embed_images(tower, images, **options))
    return bench.of_images(len(images), seconds, len(images) * shape.operations)


def losses(bench: Bench) -> None:
    """Forward and backward of the losses on all pairs."""
    for rows in bench.sizes.losses:
        embeddings = torch.randn(rows, _WIDTH, device=bench.device, requires_grad=True)
        labels = torch.arange(rows, device=bench.device) % (rows // 8)
        squared = 6 * rows * _WIDTH * min(rows, _WIDTH)
        needed = {"linear": None, "squared": squared, "hinge": 3 * rows**2 * _WIDTH}
        for negatives, operations in needed.items():
            margin = {"margin": 0.2} if negatives == "hinge" else {}
            loss = AllPairsCosineLoss(negatives=negatives, **margin)
            step = backward_of(partial(loss, embeddings, labels), embeddings)
            measure = partial(repeated, bench, step, rows, operations)
            bench.add(measure, part="loss", way=negatives, batch=rows)


def repeated(bench: Bench, step: Callable[[], None], images: int, operations: float | None) -> Row:
    step()
    seconds = statistics.median(bench.timed(step) for _ in range(5))
    return bench.of_images(images, seconds, operations, exact=True)


def evaluation(bench: Bench) -> None:
    """All metrics of an evaluation."""
    rows = bench.sizes.evaluated
    labels = torch.arange(rows) % (rows // 50)
    embeddings = torch.randn(rows, _WIDTH) + 2 * torch.randn(rows // 50, _WIDTH)[labels]
    where = {"host": (embeddings, labels)}
    if bench.on_gpu:
        where["device"] = (embeddings.to(bench.device), labels.to(bench.device))
    for way, given in reversed(where.items()):
        # The host has another matrix rate than the device.
        operations = None if bench.on_gpu and way == "host" else 2 * rows**2 * _WIDTH
        measure = partial(once, bench, partial(evaluate_embeddings, *given), rows, operations)
        bench.add(measure, part="evaluate", way=f"on the {way}", batch=rows)


def once(bench: Bench, step: Callable[[], Any], images: int, operations: float | None) -> Row:
    return bench.of_images(images, bench.timed(step), operations, exact=True)


def noise(bench: Bench, shape: Shape, count: int) -> Tensor:
    """Bytes ``[N, 3, H, W]`` on the device."""
    generator = torch.Generator(bench.device).manual_seed(0)
    size = (count, 3, shape.image, shape.image)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=bench.device, generator=generator)


def report(rows: list[Row]) -> str:
    headers = ["part", "tower", "way", "batch", "s", "images/s", "share", "x bare", "peak GB"]
    bare = {row["tower"]: row.get("seconds") for row in rows if row.get("way") == "bare"}

    def line_of(row: Row) -> list[str]:
        what = [row["part"], row.get("tower", ""), row["way"], f"{row['batch']:,}"]
        if row["outcome"] != _bench.MEASURED:
            return [*what, row["outcome"], "", "", "", ""]
        times = None
        if row["part"] == "train":
            times = _bench.ratio(row["seconds"], bare.get(row["tower"]))
        numbers = [row["seconds"], row["images_per_second"], row.get("share"), times]
        return [*what, *map(_bench.number, [*numbers, row.get("peak_gb")])]

    return _bench.table(headers, map(line_of, rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--seconds", type=float, default=420, help="no row begins after them")
    workers = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=workers, help="processes that read files")
    parser.add_argument("--json", type=Path, help="where the rows go, too")
    args = parser.parse_args()
    bench = Bench(args)
    for part in (losses, embedding, training, evaluation):
        part(bench)
    device = torch.cuda.get_device_name() if bench.on_gpu else _bench.describe_machine()
    rates = ", ".join(f"{rate / 1e12:.3g} in {kind}" for kind, rate in bench.rates.items())
    print(f"\n{report(bench.rows)}\n\n{device}: TFLOP/s of a matrix product {rates}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "rows": bench.rows}, indent=1) + "\n")
    return int(any(row["outcome"] == _bench.FAILED for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
