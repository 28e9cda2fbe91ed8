"""Time and memory of retrieval metrics and of exact search, against peers.

    pip install -e ".[bench]"
    python tests/benchmarks/retrieval.py            # all rows
    python tests/benchmarks/retrieval.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/retrieval.py --only "pairclip neighbors" --json /tmp/retrieval.json

Float32. Every row is a process of its own with a memory and a time limit. Each time is the best
of a few runs, which take turns with the bare matrix product of the same rows, in blocks of equal
size, so that "x product" doesn't depend on how busy the machine is; with ``--threads 1`` times are
the processor's, for the same reason. Memory is measured in a second
process: the highest resident memory, and what of it came after the embeddings were there.

"Metrics" are precision at 1, R-precision and MAP@R. pytorch-metric-learning (PML) computes them
with its AccuracyCalculator as it comes but for the search, where its default is FAISS with
Euclidean distance: it gets its own exact cosine search. pairclip's are those of
`retrieval_figures`. Each is also asked for alone, of PML by its `include`; recall at 1 is what PML
calls precision at 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import _bench
from _bench import Criterion, Row
from contenders import faiss_flat, ours, pml, sbert
from contenders.task import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

EVALUATE = "pairclip evaluate_embeddings"
METRICS = "pairclip metrics"
SINGLE = {
    "recall_at_1": "precision_at_1",
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "map_at_r",
}
PML = "PML metrics"
NEIGHBORS = "pairclip nearest_neighbors"
SEMANTIC = "sentence-transformers semantic_search"
FAISS = "FAISS flat"

SMALL, LARGE = "small", "large"


CONTENDERS: dict[str, tuple[Callable[[Tensor, Tensor], dict[str, float]], tuple[str, ...]]] = {
    EVALUATE: (ours.evaluate, (SMALL, LARGE)),
    METRICS: (ours.metrics, (SMALL, LARGE)),
    PML: (pml.metrics, (SMALL,)),
    **{f"pairclip {name}": (partial(ours.metric, name=name), (SMALL,)) for name in SINGLE},
    **{f"PML {name}": (partial(pml.metrics, names=[name]), (SMALL,)) for name in pml.METRICS},
    NEIGHBORS: (ours.neighbors, (SMALL, LARGE)),
    SEMANTIC: (sbert.semantic, (SMALL, LARGE)),
    FAISS: (faiss_flat.neighbors, (SMALL, LARGE)),
}


def rows_of(count: int, classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise around class centres, so that the nearest are often but not always of one class."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    embeddings = torch.randn(count, width, generator=generator)
    return embeddings.add_(centres.mul_(0.15)[labels]), labels


def measure(job: Row) -> Row:
    import torch

    torch.set_num_threads(job["threads"])
    run, _ = CONTENDERS[job["contender"]]
    # Code is mapped when it first runs, and threads start: a small set sees to both.
    run(*rows_of(512, job["classes"], job["width"]))
    rows = rows_of(job["rows"], job["classes"], job["width"])
    if job["measure"] == "memory":
        return measure_memory(run, *rows)
    return measure_time(run, *rows, at_least=job["turns_seconds"])


def measure_time(
    run: Callable[[Tensor, Tensor], dict[str, float]],
    embeddings: Tensor,
    labels: Tensor,
    at_least: float,
) -> Row:
    products: list[float] = []
    times: list[float] = []
    while len(times) < 2 or sum(times) + sum(products) < at_least:
        products.append(seconds_of(lambda: product(embeddings)))
        times.append(seconds_of(lambda: run(embeddings, labels)))
        if times[0] > at_least:
            break
    return {"seconds": min(times), "product_seconds": min(products)}


def product(embeddings: Tensor) -> None:
    import torch

    out = torch.empty(BLOCK, len(embeddings))
    for block in embeddings.split(BLOCK):
        torch.mm(block, embeddings.T, out=out[: len(block)])


def seconds_of(step: Callable[[], object]) -> float:
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def measure_memory(
    run: Callable[[Tensor, Tensor], dict[str, float]], embeddings: Tensor, labels: Tensor
) -> Row:
    before = _bench.resident_bytes()
    _bench.reset_peak()
    values = run(embeddings, labels)
    peak = _bench.peak_bytes()
    return {"peak_bytes": peak, "own_bytes": peak - before, "values": values}


def run_all(arguments: Any) -> list[Row]:
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds)
    environment = {"OMP_NUM_THREADS": str(arguments.threads)}
    shared = {
        name: getattr(arguments, name) for name in ("classes", "width", "threads", "turns_seconds")
    }
    return [
        _bench.run_worker(
            __file__,
            {"contender": name, "size": size, "rows": getattr(arguments, size), "measure": what}
            | shared,
            limits,
            environment,
        )
        for name in arguments.only
        for size in CONTENDERS[name][1]
        if size in arguments.sizes
        for what in ("time", *["memory"] * (name.split()[-1] not in SINGLE))
    ]


class Results:
    """The rows by contender, size and what was measured."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {(row["contender"], row["size"], row["measure"]): row for row in rows}

    def get(self, contender: str, size: str, key: str) -> float | None:
        what = "memory" if key.endswith("_bytes") else "time"
        return self._rows.get((contender, size, what), {}).get(key)

    def times_product(self, contender: str, size: str) -> float | None:
        seconds = self.get(contender, size, "seconds")
        return _bench.ratio(seconds, self.get(contender, size, "product_seconds"))

    def difference(self, one: str, other: str, size: str) -> float | None:
        """Largest difference of the metrics of two contenders."""
        mine, theirs = (
            self._rows.get((name, size, "memory"), {}).get("values") for name in (one, other)
        )
        if not mine or not theirs:
            return None
        return max(abs(mine[name] - theirs[name]) for name in mine)

    def outcome(self, contender: str, size: str) -> str:
        return self._rows.get((contender, size, "time"), {}).get("outcome", "")


def report(results: Results, arguments: Any) -> str:
    headers = ["contender", "N", "seconds", "x product", "peak MiB", "of it own"]
    mebibyte = 2.0**20
    return _bench.table(
        headers,
        [
            [
                name,
                f"{getattr(arguments, size):,}",
                _bench.number(results.get(name, size, "seconds")) or results.outcome(name, size),
                _bench.number(results.times_product(name, size)),
                *(
                    _bench.number(_bench.ratio(results.get(name, size, key), mebibyte))
                    for key in ("peak_bytes", "own_bytes")
                ),
            ]
            for name, (_, sizes) in CONTENDERS.items()
            for size in sizes
            if size in arguments.sizes
        ],
    )


def criteria_of(results: Results) -> list[Criterion]:
    """What is asked of it."""

    def gain(key: str, one: str, other: str, size: str) -> float | None:
        return _bench.ratio(results.get(other, size, key), results.get(one, size, key))

    return [
        Criterion(
            "metrics, small: PML takes x",
            20,
            gain("seconds", METRICS, PML, SMALL),
            at_least=True,
        ),
        *(
            Criterion(
                f"{name}, small: PML takes x",
                20,
                gain("seconds", f"pairclip {name}", f"PML {theirs}", SMALL),
                at_least=True,
            )
            for name, theirs in SINGLE.items()
        ),
        Criterion(
            "metrics, small: PML's memory x",
            10,
            gain("own_bytes", METRICS, PML, SMALL),
            at_least=True,
        ),
        Criterion(
            "metrics, small: difference from PML", 1e-6, results.difference(METRICS, PML, SMALL)
        ),
        Criterion(
            "evaluate_embeddings, small: x product", 5, results.times_product(EVALUATE, SMALL)
        ),
        Criterion(
            "evaluate_embeddings, large: GB of memory",
            2,
            _bench.ratio(results.get(EVALUATE, LARGE, "peak_bytes"), 1e9),
        ),
        Criterion(
            "nearest_neighbors, large: x product",
            1.35,
            results.times_product(NEIGHBORS, LARGE),
        ),
        Criterion(
            "nearest_neighbors, large: semantic_search takes x",
            1,
            gain("seconds", NEIGHBORS, SEMANTIC, LARGE),
            at_least=True,
        ),
    ]


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("--sizes", nargs="+", default=[SMALL, LARGE], choices=[SMALL, LARGE])
    parser.add_argument("--small", type=int, default=10_000, help="N of all contenders")
    parser.add_argument("--large", type=int, default=50_000, help="N of those who can")
    parser.add_argument(
        "--turns-seconds", type=float, default=20, help="at least two turns, and more within this"
    )
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), help="rows to run")
    arguments = parser.parse_args()
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    rows = run_all(arguments)
    results = Results(rows)
    print(report(results, arguments))
    return _bench.finish(arguments, rows, criteria_of(results))


if __name__ == "__main__":
    sys.exit(main())
