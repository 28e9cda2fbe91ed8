"""What the training loop costs, in time and memory, against a bare loop and other trainers.

    pip install -e ".[bench,datasets]"
    python tests/benchmarks/finetuner.py            # all rows
    python tests/benchmarks/finetuner.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/finetuner.py --only small --rounds 2 --json /tmp/finetuner.json

loop: seconds per step on the same weights, images and batches, with the same loss, clipping and
fused AdamW, in float32 on the CPU, with data loading and preprocessing in the step. "bare" is a
hand-written loop over a DataLoader. The other two are the trainers of pytorch-metric-learning (PML)
and sentence-transformers, which gets the images through `datasets` undecoded and preprocesses a
batch in one call. They train pairclip's tower, and once more the model of `transformers` inside it
("of the model"), as one does without pairclip. Each has a process of its own, and they take turns
after every few steps, in orders in which each follows each other as often, while the rest wait. The
first turns are not counted, nor the last, in which sentence-transformers, a batch ahead, has
nothing to load. Compared are medians over all steps. "tiny" is there for the milliseconds that a
step costs more.

features: a whole epoch of `Finetuner(head, loss).fit(features)` with the last 2 of 12 blocks of a
ViT-B/32, opening of the file and float16 included, against those blocks alone: forward, loss,
backward and AdamW, without clipping, on batches of float32 that are in memory already.

memory: the highest resident memory of two steps less that before the first, in a process of its
own in which freed tensors go back to the system at once.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _bench
from _bench import Criterion, Row
from contenders import bare, ours, pml, sbert
from contenders.task import RATE, Work

PAIRCLIP, BARE, PML, SBERT = "pairclip", "bare", "PML", "sentence-transformers"
OF_MODEL = " of the model"
CONTENDERS = (PAIRCLIP, *(of + which for which in ("", OF_MODEL) for of in (BARE, PML, SBERT)))
_CLASSES = 8
_MIB = 2**20

# With a fixed threshold every large tensor is a mapping of its own, gone when it is freed.
RETURN_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


class Tower(NamedTuple):
    """Settings of a CLIP image tower, and the side of the images that it is given."""

    hidden: int
    blocks: int
    size: int
    patch: int
    projection: int
    images: int


TOWERS = {
    "ViT-B/32": Tower(768, 12, 224, 32, 512, 256),
    "small": Tower(192, 4, 32, 8, 128, 32),
    "tiny": Tower(32, 2, 16, 8, 12, 16),
    # Activations are a hundred times the pixels, and a step with 1,024 images takes seconds.
    "memory": Tower(192, 4, 64, 8, 128, 64),
}
_BATCH = {"ViT-B/32": "vit_batch", "small": "batch", "tiny": "batch"}
_STEPS = {"ViT-B/32": 1, "small": 8, "tiny": 40}
_WARM_TURNS = 2


def tower_named(name: str, folder: str = "") -> Any:
    """The tower, with random weights; `folder` keeps the one of real size."""
    from pairclip import load_tower
    from pairclip.towers import random_tower

    if folder and (Path(folder) / "config.json").exists():
        return load_tower(folder)
    settings = TOWERS[name]
    tower = random_tower(
        image_size=settings.size,
        patch_size=settings.patch,
        width=settings.hidden,
        depth=settings.blocks,
        heads=max(2, settings.hidden // 64),
        embedding_dim=settings.projection,
        intermediate_size=4 * settings.hidden,
    )
    if folder:
        tower.save_pretrained(folder)
    return tower


def images_for(name: str, count: int) -> tuple[Any, list[int]]:
    import numpy as np

    side = TOWERS[name].images
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, [i % _CLASSES for i in range(count)]


def batches_of(count: int, batch: int, steps: int) -> list[list[int]]:
    """Batches of indices, all classes alike in each."""
    return [[(step * batch + i) % count for i in range(batch)] for step in range(steps)]


RUNS: dict[str, Callable[[Work], None]] = {
    PAIRCLIP: ours.train,
    BARE: bare.train,
    PML: pml.train,
    SBERT: sbert.train,
}


def measure(job: Row) -> Row:
    import torch

    torch.set_num_threads(job["threads"])
    measured = {"features": measure_features, "memory": measure_memory}
    return measured[job["measure"]](job)


def of_model(tower: Any) -> Any:
    """The model of `transformers` inside the tower, from pixels to embeddings."""
    import torch

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tower.model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values=pixel_values).image_embeds

    return Embedder()


def train_in_turns(job: Row, turns: _bench.Turns) -> None:
    """Be one contender, in a process of its own."""
    import torch

    from pairclip import AllPairsCosineLoss

    torch.set_num_threads(job["threads"])
    name, batch, contender = job["tower"], job["batch"], job["contender"]
    images, labels = images_for(name, 4 * batch)
    tower = tower_named(name, job["folder"])
    who = contender.removesuffix(OF_MODEL)
    work = Work(
        tower=tower,
        module=tower if contender == who else of_model(tower),
        loss=AllPairsCosineLoss(negatives="squared"),
        images=images,
        labels=labels,
        batches=batches_of(4 * batch, batch, job["steps"] * job["turns"]),
        tick=turns.step_done,
    )
    RUNS[who](work)


def run_loop(job: Row, limits: _bench.Limits, environment: dict[str, str]) -> Row:
    """One process for each contender, which take turns."""
    contenders, turns = job["contenders"], _WARM_TURNS + job["rounds"] + 1
    jobs = {who: job | {"contender": who, "turns": turns} for who in contenders}
    # Nobody more often comes after the same other one, whose threads and caches it finds (Williams
    # 1949, "Experimental designs balanced for the estimation of residual effects of treatments").
    zigzag = [(i + 1) // 2 * (-1) ** (i + 1) for i in range(len(contenders))]
    # An odd number of contenders is balanced by the reversed orders only.
    orders = [
        [
            contenders[(place + number) % len(contenders)]
            for place in (zigzag[::-1] if number // len(contenders) % 2 else zigzag)
        ]
        for number in range(turns)
    ]
    row = _bench.run_in_turns(__file__, jobs, orders, limits, environment)
    seconds = {
        who: [second for turn in of[_WARM_TURNS:-1] for second in turn]
        for who, of in row.pop("seconds", {}).items()
    }
    return job | row | {"step_seconds": seconds}


def measure_features(job: Row) -> Row:
    import torch

    from pairclip import AllPairsCosineLoss, Finetuner, cache_features

    name, batch, steps = job["tower"], job["batch"], job["steps"]
    tower = tower_named(name, job["folder"])
    loss = AllPairsCosineLoss(negatives="squared")
    trunk, head = tower.split(job["blocks"])
    parameters = [p for p in head.parameters() if p.requires_grad]
    seconds: dict[str, list[float]] = {PAIRCLIP: [], BARE: []}
    with tempfile.TemporaryDirectory() as folder:
        features = cache_features(trunk, images_for(name, batch * steps), folder)
        in_memory = torch.stack([features[i][0] for i in range(len(features))]).float()
        labels = features.labels

        def blocks_alone(count: int) -> None:
            optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
            head.train()
            slices = zip(in_memory.split(batch), labels.split(batch), strict=True)
            for (pixels, classes), _ in zip(slices, range(count), strict=False):
                optimizer.zero_grad()
                loss(head(pixels), classes).backward()
                optimizer.step()

        def finetuner(count: int) -> None:
            Finetuner(head, loss, learning_rate=RATE, schedule="constant", warmup_ratio=0.0).fit(
                features, sampler=batches_of(batch * steps, batch, count)
            )

        runs = {PAIRCLIP: finetuner, BARE: blocks_alone}
        for run in runs.values():
            run(1)
        for number in range(job["rounds"]):
            for contender in runs if number % 2 == 0 else reversed(runs):
                head.zero_grad()
                gc.collect()
                start = time.perf_counter()
                runs[contender](steps)
                seconds[contender].append(time.perf_counter() - start)
    return {"epoch_seconds": seconds}


def measure_memory(job: Row) -> Row:
    from pairclip import AllPairsCosineLoss, Finetuner

    batch, name = job["batch"], job["tower"]
    tower = tower_named(name)
    images, labels = images_for(name, job["images"])

    def fit(size: int, micro_batch_size: int | None, steps: int) -> None:
        Finetuner(
            tower, AllPairsCosineLoss(negatives="squared"), micro_batch_size=micro_batch_size
        ).fit((images, labels), sampler=batches_of(len(images), size, steps))

    # Code is mapped when it first runs, and threads start: a small batch sees to both.
    fit(8, 4, 2)
    gc.collect()
    before = _bench.resident_bytes()
    _bench.reset_peak()
    start = time.perf_counter()
    fit(batch, job["micro_batch_size"], 2)
    side = TOWERS[name].size
    return {
        "peak_bytes": _bench.peak_bytes() - before,
        "pixel_bytes": batch * 3 * side**2 * 4,
        "embedding_bytes": batch * tower.embedding_dim * 4,
        "step_seconds": (time.perf_counter() - start) / 2,
    }


def jobs(arguments: Any) -> Iterator[Row]:
    threads = {"threads": arguments.threads}
    timed = threads | {"rounds": arguments.rounds}
    for name in ("small", "tiny", "ViT-B/32"):
        if name in arguments.only:
            yield {
                "measure": "loop",
                "tower": name,
                "batch": getattr(arguments, _BATCH[name]),
                "steps": _STEPS[name],
                "contenders": arguments.contenders,
                "folder": arguments.tower if name == "ViT-B/32" else "",
            } | timed
    if "features" in arguments.only:
        yield {
            "measure": "features",
            "tower": "ViT-B/32",
            "blocks": 2,
            "batch": arguments.vit_batch,
            "steps": 6,
            "rounds": 4,
            "folder": arguments.tower,
        } | threads
    if "memory" in arguments.only:
        for batch, micro in [(32, None), (1024, 32), (1024, None)]:
            yield {
                "measure": "memory",
                "tower": "memory",
                "batch": batch,
                "micro_batch_size": micro,
                "images": 1024,
            } | threads


def _run_worker(job: Row, limits: _bench.Limits, environment: dict[str, str]) -> Row:
    return _bench.run_worker(__file__, job, limits, environment)


def run_all(arguments: Any) -> list[Row]:
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds)
    rows = []
    for job in jobs(arguments):
        environment = {"OMP_NUM_THREADS": str(arguments.threads)}
        if job["measure"] == "memory":
            environment |= RETURN_MEMORY
        run = run_loop if job["measure"] == "loop" else _run_worker
        row = run(job, limits, environment)
        rows.append(row)
        for detail in sorted(set(row.get("missing", {}).values())):
            rows.append({"outcome": _bench.NOT_INSTALLED, "detail": detail})
    return rows


class Results:
    """The rows by what they measure."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if row["outcome"] == _bench.MEASURED]

    def of(self, measure: str) -> list[Row]:
        return [row for row in self.rows if row["measure"] == measure]

    def loop(self, tower: str, contender: str) -> list[float]:
        """Seconds of each step; empty if not measured."""
        found = [row["step_seconds"] for row in self.of("loop") if row["tower"] == tower]
        return found[0].get(contender, []) if found else []

    def speed(self, tower: str, contender: str) -> float | None:
        """How many times as many images a second pairclip trains on as a contender."""
        return quotient(self.loop(tower, contender), self.loop(tower, PAIRCLIP))

    def features(self) -> float | None:
        found = [row["epoch_seconds"] for row in self.of("features")]
        return quotient(found[0][PAIRCLIP], found[0][BARE]) if found else None

    def memory(self, batch: int, micro_batch_size: int | None) -> Row | None:
        wanted = (batch, micro_batch_size)
        found = [r for r in self.of("memory") if (r["batch"], r["micro_batch_size"]) == wanted]
        return found[0] if found else None

    def memory_ratio(self) -> float | None:
        """Peak with micro-batches, less the batch's pixels and embeddings, by that of one."""
        large, small = self.memory(1024, 32), self.memory(32, None)
        if large is None or small is None:
            return None
        own = large["peak_bytes"] - large["pixel_bytes"] - large["embedding_bytes"]
        return float(own / small["peak_bytes"])


def quotient(
    one: list[float], other: list[float], of: Callable[[list[float]], float] = statistics.median
) -> float | None:
    return of(one) / of(other) if one and other else None


def report(results: Results) -> str:
    parts = []
    for row in results.of("loop"):
        parts.append(f"\n{row['tower']}, batches of {row['batch']}\n\n{loop_table(results, row)}")
    for row in results.of("features"):
        lines = [
            [who, *(_bench.number(x) for x in (statistics.median(of), min(of), max(of)))]
            for who, of in row["epoch_seconds"].items()
        ]
        title = f"{row['tower']}, last {row['blocks']} blocks, {row['steps']} x {row['batch']}"
        table = _bench.table(["s per epoch", "median", "lowest", "highest"], lines)
        parts.append(f"\n{title} features\n\n{table}")
    if results.of("memory"):
        parts.append(f"\n{memory_table(results)}")
    return "\n".join(parts)


def loop_table(results: Results, row: Row) -> str:
    own = row["step_seconds"][PAIRCLIP]
    lines = []
    for contender, seconds in row["step_seconds"].items():
        median = statistics.median(seconds)
        lines.append(
            [
                contender,
                _bench.number(1000 * median),
                _bench.number(1000 * min(seconds)),
                _bench.number(row["batch"] / median),
                _bench.number(1000 * (statistics.median(own) - median)),
                _bench.number(quotient(seconds, own)),
                _bench.number(quotient(seconds, own, min)),
            ]
        )
    headers = ["trainer", "ms/step", "lowest", "images/s"]
    return _bench.table([*headers, "pairclip + ms", "pairclip speed x", "of the lowest"], lines)


def memory_table(results: Results) -> str:
    lines = [
        [
            str(row["batch"]),
            str(row["micro_batch_size"] or "whole"),
            *(_bench.number(row[f"{of}_bytes"] / _MIB) for of in ("peak", "pixel", "embedding")),
            _bench.number(row["step_seconds"]),
        ]
        for row in results.of("memory")
    ]
    headers = ["batch", "micro-batch", "peak MiB", "pixels MiB", "embeddings MiB", "s/step"]
    return _bench.table(headers, lines)


def criteria_of(results: Results, only: list[str]) -> list[Criterion]:
    """What issue 4 asks for."""
    limits = {BARE: 0.97}
    limits |= {trainer + which: 1.0 for which in ("", OF_MODEL) for trainer in (SBERT, PML)}
    criteria = [
        Criterion(
            f"{tower}: images/s x {contender}",
            limit,
            results.speed(tower, contender),
            at_least=True,
        )
        for tower in ("ViT-B/32", "small")
        for contender, limit in limits.items()
        if tower in only
    ]
    if "features" in only:
        criteria.append(
            Criterion("cached features, 2 of 12 blocks: epoch x blocks", 1.15, results.features())
        )
    if "memory" in only:
        criteria.append(
            Criterion("1,024 by 32: peak less its data x that of 32", 1.2, results.memory_ratio())
        )
    return criteria


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parts = ["small", "tiny", "ViT-B/32", "features", "memory"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, help="what to measure")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--tower", default="/tmp/vitb32", help="folder of the ViT-B/32; made once")
    parser.add_argument("--batch", type=int, default=128, help="of the small towers")
    parser.add_argument("--vit-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(seconds=1200)
    arguments = parser.parse_args()
    if arguments.worker and "contender" in json.loads(arguments.worker):
        _bench.serve_in_turns(arguments.worker, train_in_turns)
        return 0
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    rows = run_all(arguments)
    results = Results(rows)
    print(report(results))
    return _bench.finish(arguments, rows, criteria_of(results, arguments.only))


if __name__ == "__main__":
    sys.exit(main())
