"""What the training loop and the index cost against an older commit, both in one process, in turn.

    pip install -e ".[bench]"
    python tests/benchmarks/against.py 6718aec            # all rows
    python tests/benchmarks/against.py 6718aec --check    # exit with 1 if one is over 3 % slower
    python tests/benchmarks/against.py HEAD --only tiny load --budget 10

The commit's source comes out of git under the name `pairclip_before`. Each row is a process of its
own, with one thread, in which both take turns for --budget seconds, first one and then the other
way round. Compared is the processor time of such two turns, by the median of the ratios; what
follows "+-" is that median's standard error.

small, tiny, ViT-B/32: a step of a fit, as in `finetuner.py`, with data loading and preprocessing.
checkpoints: a step of the small tower's fit that writes one, with a batch of 8; resume: a fit that
goes on from such a one with its last step.
features: an epoch of the last 2 of 12 blocks on cached features.
memory: highest resident memory of two steps less that before the first, in a process for each.
save, load, find, verify, search, add: of an index as in `index.py`; "search" gives the 10 nearest
of many queries, "find" loads it and gives those of one with their paths, "add" adds 1,000 images
and saves.
"""

from __future__ import annotations

import copy
import gc
import importlib
import io
import math
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench
import finetuner
import index
from _bench import Criterion, Row
from contenders.task import CLIP, RATE

BEFORE, NOW = "pairclip_before", "pairclip"
SLOWER = 1.03
LOOPS = {"small": "small", "tiny": "tiny", "ViT-B/32": "ViT-B/32", "checkpoints": "small"}
MEMORY = {"memory 32": (32, None), "memory 1,024 by 32": (1024, 32), "memory 1,024": (1024, None)}
_LEAST_TURNS = 5
_MANY = 100_000

Step = Callable[[], Any]


def check_out(commit: str, folder: Path) -> None:
    """Put the package of a commit there, under the other name."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "archive", commit, "src/pairclip"]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    package = (folder / "src" / NOW).rename(folder / BEFORE)
    for file in package.rglob("*.py"):
        file.write_text(re.sub(rf"\b(from|import) {NOW}\b", rf"\1 {BEFORE}", file.read_text()))


def folder_of(package: Any, job: Row) -> Path:
    return Path(job["folder"], package.__name__)


def tower_of(package: Any, name: str) -> Any:
    """The same tower in each."""
    tower = finetuner.tower_named(name)
    model = copy.deepcopy(tower.model)
    return package.load_tower(model, image_processor=tower.image_processor)


def trainer(package: Any, tower: Any, **options: Any) -> Any:
    loss = package.AllPairsCosineLoss(negatives="squared")
    options = {"learning_rate": RATE, "schedule": "constant", "warmup_ratio": 0.0} | options
    return package.Finetuner(tower, loss, **options)


def loop(package: Any, job: Row) -> Step:
    """A fit in a thread, which goes on to the end of its next step at each call."""
    name, saves = LOOPS[job["row"]], job["row"] == "checkpoints"
    batch = 8 if saves else job["vit_batch"] if name == "ViT-B/32" else job["batch"]
    options = {"checkpoint_dir": folder_of(package, job), "checkpoint_every": 1} if saves else {}
    images = finetuner.images_for(name, 4 * batch)
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    failed: list[BaseException] = []

    class Baton(package.Callback):  # type: ignore[misc, name-defined]
        def on_step(self, fit: Any) -> None:
            done.release()
            go.acquire()

    def fit() -> None:
        try:
            go.acquire()
            fitted = trainer(
                package, tower_of(package, name), max_grad_norm=CLIP, callbacks=[Baton()]
            )
            fitted.fit(images, sampler=finetuner.batches_of(4 * batch, batch, _MANY), **options)
        except BaseException as error:
            failed.append(error)
            done.release()

    # It never ends: an Accelerator at its end would take the state of the other's away.
    threading.Thread(target=fit, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()
        if failed:
            raise failed[0]

    return step


def resume(package: Any, job: Row) -> Step:
    folder, images = folder_of(package, job), finetuner.images_for("small", 32)
    tower, last = tower_of(package, "small"), folder / "step-00000004"
    options = {"sampler": finetuner.batches_of(32, 8, 4), "checkpoint_every": 1}

    def go_on() -> None:
        shutil.rmtree(last, ignore_errors=True)
        trainer(package, tower).fit(images, **options, checkpoint_dir=folder, resume=True)

    return go_on


def features(package: Any, job: Row) -> Step:
    batch, steps = job["vit_batch"], 6
    trunk, head = tower_of(package, "ViT-B/32").split(2)
    images = finetuner.images_for("ViT-B/32", batch * steps)
    cached = package.cache_features(trunk, images, folder_of(package, job))
    batches = finetuner.batches_of(batch * steps, batch, steps)
    return lambda: trainer(package, head).fit(cached, sampler=batches)


def index_step(package: Any, job: Row) -> Step | None:
    import torch

    kind = importlib.import_module(f"{package.__name__}.index").ImageIndex
    what, rows = job["row"], job["rows"]
    folder = folder_of(package, job)
    tower = tower_of(package, "tiny") if what == "add" else None
    width = job["width"] if tower is None else tower.embedding_dim
    made = {"rows": rows, "width": width, "classes": job["classes"]}
    embeddings = index.clustered(rows, made, seed=1)
    labels, paths = torch.arange(rows) % 1000, index.paths_of(rows)
    names = [f"class {i}" for i in range(1000)]

    def new() -> Any:
        fingerprint = "0" * 64 if tower is None else tower.fingerprint()
        its = {"labels": labels, "class_names": names, "paths": paths, "fingerprint": fingerprint}
        return kind(embeddings, **its)

    if what == "save":
        return lambda: new().save(folder)
    new().save(folder)
    opened = kind.load(folder, tower)
    if what == "add":
        if not hasattr(kind, "add"):
            return None
        images = index.new_images()

        def add() -> None:
            opened.add(images)
            opened.save(folder)

        return add
    queries = {count: index.clustered(count, made, seed=2).float() for count in (10, 1000)}
    return {
        "load": lambda: kind.load(folder),
        "find": lambda: kind.load(folder).search(queries[10][0]),
        "verify": opened.verify,
        "search 10": lambda: opened.nearest_neighbors(queries[10], k=index.K),
        "search 1,000": lambda: opened.nearest_neighbors(queries[1000], k=index.K),
    }[what]


def steps_of(package: Any, job: Row) -> Step | None:
    if job["row"] in LOOPS:
        return loop(package, job)
    return {"features": features, "resume": resume}.get(job["row"], index_step)(package, job)


ROWS = (*LOOPS, "resume", "features", *MEMORY, "save", "load", "find", "verify", "search 10")
ROWS = (*ROWS, "search 1,000", "add")


def measure(job: Row) -> Row:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, job["source"])
    if "package" in job:
        return measure_memory(importlib.import_module(job["package"]), job)
    steps = {name: steps_of(importlib.import_module(name), job) for name in (BEFORE, NOW)}
    seconds: dict[str, list[float]] = {BEFORE: [], NOW: []}
    if None in steps.values():
        return {"seconds": seconds}
    for step in steps.values():
        for _ in range(3 if job["row"] in LOOPS else 1):
            step()
    end = time.monotonic() + job["budget"]
    while len(seconds[NOW]) < _LEAST_TURNS or time.monotonic() < end:
        # Who comes second finds other caches.
        both = dict.fromkeys(seconds, 0.0)
        for name in (BEFORE, NOW, NOW, BEFORE):
            start = time.process_time()
            steps[name]()
            both[name] += (time.process_time() - start) / 2
        for name, of_step in both.items():
            seconds[name].append(of_step)
    return {"seconds": seconds}


def measure_memory(package: Any, job: Row) -> Row:
    batch, micro = MEMORY[job["row"]]
    tower = tower_of(package, "memory")
    images, labels = finetuner.images_for("memory", 1024)

    def fit(size: int, micro_batch_size: int | None) -> None:
        trainer(package, tower, micro_batch_size=micro_batch_size).fit(
            (images, labels), sampler=finetuner.batches_of(1024, size, 2)
        )

    # Code is mapped when it first runs, and threads start: a small batch sees to both.
    fit(8, 4)
    gc.collect()
    before = _bench.resident_bytes()
    _bench.reset_peak()
    fit(batch, micro)
    return {"peak_bytes": _bench.peak_bytes() - before}


def run_row(name: str, arguments: Any, source: str, limits: _bench.Limits) -> Row:
    with tempfile.TemporaryDirectory(prefix="pairclip-against-", dir=arguments.folder) as folder:
        job = {"row": name, "folder": folder, "source": source, "budget": arguments.budget}
        job |= {name: getattr(arguments, name) for name in ("rows", "width", "classes")}
        job |= {name: getattr(arguments, name) for name in ("batch", "vit_batch")}
        environment = {"OMP_NUM_THREADS": "1"}
        if name not in MEMORY:
            return _bench.run_worker(__file__, job, limits, environment)
        environment |= finetuner.RETURN_MEMORY
        both = [
            _bench.run_worker(__file__, job | {"package": package}, limits, environment)
            for package in (BEFORE, NOW)
        ]
    peaks = {row["package"]: row.get("peak_bytes", math.nan) for row in both}
    return both[0] | both[1] | {"peaks": peaks}


def ratio_of(row: Row) -> float | None:
    """How many times as much as before."""
    if "peaks" in row:
        return float(row["peaks"][NOW] / row["peaks"][BEFORE])
    ratios = ratios_of(row)
    return statistics.median(ratios) if ratios else None


def ratios_of(row: Row) -> list[float]:
    seconds = row.get("seconds", {})
    return [n / b for b, n in zip(*(seconds.get(name, []) for name in (BEFORE, NOW)), strict=True)]


def line_of(row: Row) -> list[str]:
    ratio = _bench.number(ratio_of(row))
    if "peaks" in row:
        megabytes = [f"{_bench.number(row['peaks'][name] / 1e6)} MB" for name in (BEFORE, NOW)]
        return [row["row"], *megabytes, ratio, "", ""]
    ratios = ratios_of(row)
    if not ratios:
        return [row["row"], "not there", "", "", "", ""]
    medians = [
        f"{_bench.number(1000 * statistics.median(row['seconds'][name]))} ms"
        for name in (BEFORE, NOW)
    ]
    # Of a median of n values that scatter normally, but for some that something else disturbed.
    first, _, third = statistics.quantiles(ratios, n=4)
    error = math.sqrt(math.pi / 2 / len(ratios)) * (third - first) / 1.349
    return [row["row"], *medians, ratio, _bench.number(error), str(len(ratios))]


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("commit", nargs="?", default="HEAD", help="what to compare with")
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--budget", type=float, default=40, help="seconds of turns of each row")
    parser.add_argument("--batch", type=int, default=128, help="of the small towers")
    parser.add_argument("--vit-batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=200_000, help="images in the index")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--classes", type=int, default=4096, help="centres of the rows")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds + 3 * arguments.budget)
    with tempfile.TemporaryDirectory(prefix="pairclip-before-") as source:
        check_out(arguments.commit, Path(source))
        rows = [run_row(name, arguments, source, limits) for name in arguments.only]
    arguments.folder = str(arguments.folder)
    print(f"\n{_bench.table(['row', 'before', 'now', 'ratio', '+-', 'turns'], map(line_of, rows))}")
    measured = [row for row in rows if row["outcome"] != _bench.MEASURED or ratio_of(row)]
    criteria = [Criterion(f"{row['row']}: x before", SLOWER, ratio_of(row)) for row in measured]
    return _bench.finish(arguments, rows, criteria)


if __name__ == "__main__":
    sys.exit(main())
