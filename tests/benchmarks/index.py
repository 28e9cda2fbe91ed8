"""Time and memory of an index of a million images on the disk, exact and by FAISS.

    pip install -e ".[bench]"
    python tests/benchmarks/index.py            # all rows
    python tests/benchmarks/index.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/index.py --rows 50000 --json /tmp/index.json

The index is float16, with a path and a label for every image, written once into --folder (1.1 GB)
and removed at the end. Every row is a process of its own with a memory and a time limit. The time
of a search is the median of repeated ones after a first, so the file is in the system's cache. The
rows are made up: points around --classes centres, all within 64 dimensions, and a little noise in
every dimension; queries are other such points.

Beside it is the bare product: the same rows from a mapping of the same file, in blocks of the same
size, made float32 and multiplied with the queries. Peak is the highest resident memory of the whole
process from loading on, with Python, imports and the pages of the file that are mapped.

approximate: the exact search and `to_faiss` of the same index take turns in one process with one
thread each. FAISS looks at the least power of two of cells with which `search_recall` on 200
queries is at least 0.95 of the exact 10 nearest.

"add" embeds 1,000 images by a tiny tower, adds them and saves; "kills" does that in processes that
are killed at random moments, after each of which the index is verified and must have what was saved
before, or that and the new images.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _bench
from _bench import Criterion, Row

if TYPE_CHECKING:
    from torch import Tensor

K = 10
RECALL = 0.95
_DIMENSIONS = 64  # that the rows fill, as embeddings of images fill few of theirs
_BLOCK = 2048  # rows that pairclip compares at once
_REPEATS = 5
_JUDGED = 200  # queries that recall is measured with
_ADDED, _KILLS = 1000, 50


def new_tower(width: int) -> Any:
    """A tiny tower, always the same."""
    from pairclip.towers import random_tower

    return random_tower(image_size=8, patch_size=4, embedding_dim=width)


def new_images() -> tuple[Any, list[str]]:
    """What is added, with labels that there are."""
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (_ADDED, 8, 8, 3), dtype=np.uint8)
    return images, [f"class {i}" for i in range(_ADDED)]


def clustered(count: int, job: Row, *, seed: int) -> Tensor:
    """Unit rows around the centres, the same centres for every seed."""
    import torch

    fixed = torch.Generator().manual_seed(0)
    centers = torch.randn(job["classes"], _DIMENSIONS, generator=fixed)
    spread = torch.randn(_DIMENSIONS, job["width"], generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, job["width"], dtype=torch.float16)
    for piece in rows.split(65536):
        chosen = torch.randint(job["classes"], (len(piece),), generator=generator)
        points = centers[chosen]
        points += 0.7 * torch.randn(points.shape, generator=generator)
        drawn = points @ spread + torch.randn(piece.shape, generator=generator)
        piece.copy_(torch.nn.functional.normalize(drawn))
    return rows


def paths_of(rows: int) -> list[str]:
    return [f"/data/images/class_{i % 1000:03}/{i:09}.jpg" for i in range(rows)]


def write_index(job: Row) -> None:
    """Made in a worker, so that the memory is its own."""
    import torch

    from pairclip.index import ImageIndex

    rows = job["rows"]
    embeddings = clustered(rows, job, seed=1)
    index = ImageIndex(
        embeddings,
        labels=torch.arange(rows) % 1000,
        class_names=[f"class {i}" for i in range(1000)],
        paths=paths_of(rows),
        fingerprint=new_tower(job["width"]).fingerprint(),
    )
    index.save(job["folder"])


def measure(job: Row) -> Row:
    if job["measure"] == "write":
        start = time.perf_counter()
        write_index(job)
        return {"seconds": time.perf_counter() - start}
    if job["measure"] == "approximate":
        return measure_approximate(job)
    import torch

    from pairclip.index import ImageIndex

    # A fork of a process whose threads have worked hangs.
    torch.set_num_threads(1 if job["measure"] == "kills" else job["threads"])
    if job["measure"] == "add":
        return measure_add(job)
    if job["measure"] == "kills":
        return measure_kills(job)
    queries = clustered(job["queries"], job, seed=2).float()
    imports = _bench.resident_bytes()
    _bench.reset_peak()
    start = time.perf_counter()
    index = ImageIndex.load(job["folder"])
    load = time.perf_counter() - start
    if job["measure"] == "search":
        seconds = _median_seconds(lambda: index.nearest_neighbors(queries, k=K))
    else:
        seconds = _median_seconds(lambda: bare_product(queries, index.embeddings))
    return {
        "load_seconds": load,
        "seconds": seconds,
        "imports_bytes": imports,
        "peak_bytes": _bench.peak_bytes(),
    }


def measure_approximate(job: Row) -> Row:
    import faiss
    import torch

    from pairclip.index import ImageIndex, search_recall

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    exact = ImageIndex.load(job["folder"])
    start = time.perf_counter()
    index = exact.to_faiss(job["factory"])
    made = time.perf_counter() - start
    queries = clustered(max(_JUDGED, *job["queries"]), job, seed=2).float()
    recall, cells = search_recall(exact, index, queries[:_JUDGED], k=K), 1
    while recall < RECALL and cells < index.faiss.nlist:
        cells *= 2
        index.faiss.nprobe = cells
        recall = search_recall(exact, index, queries[:_JUDGED], k=K)
    times: Row = {}
    for count in job["queries"]:
        some = queries[:count]
        turns: dict[str, list[float]] = {"exact": [], "approximate": []}
        for turn in range(1 + (_REPEATS if count < 100 else 1)):
            for name, its in (("exact", exact), ("approximate", index)):
                start = time.perf_counter()
                its.nearest_neighbors(some, k=K)
                if turn:
                    turns[name].append(time.perf_counter() - start)
        times[str(count)] = {name: statistics.median(taken) for name, taken in turns.items()}
    return {"made_seconds": made, "recall": recall, "cells": cells, "times": times}


def measure_add(job: Row) -> Row:
    from pairclip.index import ImageIndex

    images = new_images()
    index = ImageIndex.load(job["folder"], new_tower(job["width"]))
    written, start = written_bytes(), time.perf_counter()
    index.add(images)
    added = time.perf_counter()
    index.save(job["folder"])
    return {
        "add_seconds": added - start,
        "save_seconds": time.perf_counter() - added,
        "written_bytes": written_bytes() - written,
    }


def written_bytes() -> int:
    """What this process has written to files."""
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def measure_kills(job: Row) -> Row:
    import numpy as np

    from pairclip.index import ImageIndex

    folder, rows = str(Path(job["folder"], "killed")), job["rows"] // 50
    write_index(job | {"folder": folder, "rows": rows})
    images, tower = new_images(), new_tower(job["width"])
    paths = ImageIndex.load(folder).paths
    chance = np.random.default_rng(0)
    lost, grown, seconds = 0, 0, 0.0
    for number in range(_KILLS + 1):
        start = time.perf_counter()
        child = os.fork()
        if not child:
            index = ImageIndex.load(folder, tower)
            index.add(images)
            index.save(folder)
            os._exit(0)
        if number:  # the first is let go on, to know how long it takes
            time.sleep(chance.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seconds = seconds or time.perf_counter() - start
        index = ImageIndex.load(folder)
        index.verify()
        known = (index.paths or [])[: len(paths or ())]
        lost += len(index) not in (rows, rows + _ADDED) or known != paths
        grown += len(index) != rows
        rows = len(index)
    return {"lost": lost, "grown": grown, "kills": _KILLS}


def bare_product(queries: Tensor, rows: Tensor) -> None:
    for piece in rows.split(_BLOCK):
        _ = queries @ piece.float().T


def _median_seconds(step: Callable[[], Any]) -> float:
    step()
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def run_all(arguments: Any, folder: str) -> list[Row]:
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds)
    index = {"folder": folder, "rows": arguments.rows, "width": arguments.width}
    index["classes"] = arguments.classes
    jobs: list[Row] = [{"measure": "write"}]
    jobs += [
        {"measure": kind, "queries": queries, "threads": arguments.threads}
        for queries in arguments.queries
        for kind in ("search", "product")
    ]
    jobs += [
        {"measure": "approximate", "factory": factory, "queries": arguments.queries}
        for factory in arguments.factories
    ]
    jobs += [{"measure": kind, "threads": arguments.threads} for kind in ("add", "kills")]
    return [_bench.run_worker(__file__, {**job, **index}, limits) for job in jobs]


def measured(rows: list[Row], kind: str, queries: int, field: str) -> float | None:
    for row in rows:
        if (row["measure"], row.get("queries")) == (kind, queries):
            return row.get(field)
    return None


def report(rows: list[Row], arguments: Any) -> str:
    headers = ["queries", "load s", "search s", "product s", "search x product", "peak MB"]
    headers += ["of that imports MB"]

    def line_of(queries: int) -> list[str]:
        search, product = (
            measured(rows, kind, queries, "seconds") for kind in ("search", "product")
        )
        memory = [
            _bench.ratio(measured(rows, "search", queries, field), 1e6)
            for field in ("peak_bytes", "imports_bytes")
        ]
        load = measured(rows, "search", queries, "load_seconds")
        numbers = [load, search, product, _bench.ratio(search, product), *memory]
        return [f"{queries:,}", *map(_bench.number, numbers)]

    return _bench.table(headers, map(line_of, arguments.queries))


def times_faster(row: Row, queries: int) -> float | None:
    times = row["times"][str(queries)]
    return _bench.ratio(times["exact"], times["approximate"])


def report_approximate(rows: list[Row]) -> str:
    headers = ["factory", "cells", "recall at 10", "made in s", "queries", "exact s"]
    headers += ["approximate s", "times faster"]
    lines = []
    for row in rows:
        if row["measure"] != "approximate" or "times" not in row:
            continue
        first = [row["factory"], f"{row['cells']}", f"{row['recall']:.3f}"]
        first.append(_bench.number(row["made_seconds"]))
        for queries in row["queries"]:
            times = row["times"][str(queries)]
            numbers = [times["exact"], times["approximate"], times_faster(row, queries)]
            lines.append([*first, f"{queries:,}", *map(_bench.number, numbers)])
    return _bench.table(headers, lines)


def criteria_of(rows: list[Row], arguments: Any) -> list[Criterion]:
    """What is asked of the exact index, and of FAISS beside it."""
    name = f"{arguments.rows:,} x {arguments.width}"
    few = min(arguments.queries)
    approximate = [
        Criterion(
            f"{name}, {row['factory']} at recall {RECALL}, {few} queries: times faster",
            10,
            times_faster(row, few) if row.get("recall", 0) >= RECALL else None,
            at_least=True,
        )
        for row in rows
        if row["measure"] == "approximate"
    ]
    of_kind = {row["measure"]: row for row in rows}
    add = of_kind["add"]
    growing = [
        Criterion(
            f"{name}: add of {_ADDED:,} and save, s",
            2,
            add.get("add_seconds", math.nan) + add.get("save_seconds", math.nan),
        ),
        Criterion(f"{name}: MB written for them", 100, _bench.ratio(add.get("written_bytes"), 1e6)),
        Criterion(f"{_KILLS} kills during add and save: lost", 0, of_kind["kills"].get("lost")),
    ]
    return (
        approximate
        + growing
        + [
            criterion
            for queries in arguments.queries
            for criterion in (
                Criterion(f"{name}: load, s", 1, measured(rows, "search", queries, "load_seconds")),
                Criterion(
                    f"{name}, {queries:,} queries: peak MB of the process",
                    2000,
                    _bench.ratio(measured(rows, "search", queries, "peak_bytes"), 1e6),
                ),
            )
        ]
    )


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images in the index")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--queries", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--classes", type=int, default=4096, help="centres of the rows")
    parser.add_argument("--factories", nargs="*", default=["IVF1024,Flat"], help="of FAISS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    folder = tempfile.mkdtemp(prefix="pairclip-index-", dir=arguments.folder)
    arguments.folder = str(arguments.folder)
    try:
        rows = run_all(arguments, folder)
    finally:
        shutil.rmtree(folder)
    print(f"\n{report(rows, arguments)}")
    print(f"\n{report_approximate(rows)}")
    return _bench.finish(arguments, rows, criteria_of(rows, arguments))


if __name__ == "__main__":
    sys.exit(main())
