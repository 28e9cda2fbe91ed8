"""Time and memory of an index of a million images on the disk.

    pip install -e ".[bench]"
    python tests/benchmarks/index.py            # all rows
    python tests/benchmarks/index.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/index.py --rows 50000 --json /tmp/index.json

The index is float16, with a path and a label for every image, written once into --folder (1.1 GB)
and removed at the end. Every row is a process of its own with a memory and a time limit. The time
of a search is the median of repeated ones after a first, so the file is in the system's cache.
Beside it is the bare product: the same rows from a mapping of the same file, in blocks of the same
size, made float32 and multiplied with the queries. Peak is the highest resident memory of the whole
process from loading on, with Python, imports and the pages of the file that are mapped.
"""

from __future__ import annotations

import shutil
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
_BLOCK = 2048  # rows that pairclip compares at once
_REPEATS = 5


def write_index(folder: str, rows: int, width: int) -> None:
    """Random unit rows; made in a worker, so that the memory is its own."""
    import torch

    from pairclip.index import ImageIndex

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.empty(rows, width, dtype=torch.float16)
    for piece in embeddings.split(65536):
        drawn = torch.randn(piece.shape, generator=generator)
        piece.copy_(torch.nn.functional.normalize(drawn))
    index = ImageIndex(
        embeddings,
        labels=torch.arange(rows) % 1000,
        class_names=[f"class {i}" for i in range(1000)],
        paths=[f"/data/images/class_{i % 1000:03}/{i:09}.jpg" for i in range(rows)],
        fingerprint="0" * 64,
    )
    index.save(folder)


def measure(job: Row) -> Row:
    if job["measure"] == "write":
        start = time.perf_counter()
        write_index(job["folder"], job["rows"], job["width"])
        return {"seconds": time.perf_counter() - start}
    import torch

    from pairclip.index import ImageIndex

    torch.set_num_threads(job["threads"])
    queries = torch.randn(job["queries"], job["width"], generator=torch.Generator().manual_seed(1))
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
    jobs: list[Row] = [{"measure": "write"}]
    jobs += [
        {"measure": kind, "queries": queries, "threads": arguments.threads}
        for queries in arguments.queries
        for kind in ("search", "product")
    ]
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


def criteria_of(rows: list[Row], arguments: Any) -> list[Criterion]:
    """What issue 5 asks for."""
    name = f"{arguments.rows:,} x {arguments.width}"
    return [
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


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images in the index")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--queries", type=int, nargs="+", default=[10, 1000])
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
    return _bench.finish(arguments, rows, criteria_of(rows, arguments))


if __name__ == "__main__":
    sys.exit(main())
