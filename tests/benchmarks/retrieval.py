"""Time and memory of retrieval figures and of exact search, against peers.

    pip install -e ".[bench]"
    python tests/benchmarks/retrieval.py            # all rows
    python tests/benchmarks/retrieval.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/retrieval.py --only "pairclip neighbors" --json /tmp/retrieval.json

Float32. Every row is a process of its own with a memory and a time limit. Each time is the best
of a few runs, which take turns with the bare matrix product of the same rows, in blocks of equal
size, so that "x product" doesn't depend on how busy the machine is. Memory is measured in a second
process: the highest resident memory, and what of it came after the embeddings were there.

"Figures" are precision at 1, R-precision and MAP@R. pytorch-metric-learning (PML) computes them
with its AccuracyCalculator as it comes but for the search, where its default is FAISS with
Euclidean distance: it gets its own exact cosine search. pairclip's are those of
`retrieval_figures`; or three functions called one after another.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _bench
from _bench import Criterion, Row

if TYPE_CHECKING:
    from torch import Tensor

EVALUATE = "pairclip evaluate_embeddings"
FIGURES = "pairclip figures"
FUNCTIONS = "pairclip three functions"
PML = "PML figures"
NEIGHBORS = "pairclip nearest_neighbors"
SEMANTIC = "sentence-transformers semantic_search"
FAISS = "FAISS flat"

NEAREST = 10
SMALL, LARGE = 10_000, 50_000
# Rows of the bare product that are computed at once.
_BLOCK = 512
# At least two turns, and more of them while they take no longer than this.
_SECONDS = 20.0


def evaluate(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip.evaluation import evaluate_embeddings

    found = evaluate_embeddings(embeddings, labels).to_dict()
    return {name: found[name] for name in ("recall_at_1", "mean_average_precision")}


def figures(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip import retrieval_figures

    return retrieval_figures(embeddings, labels, ("precision_at_1", "r_precision", "map_at_r"))


def three_functions(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip.retrieval import map_at_r, precision_at_k, r_precision

    return {
        "precision_at_1": precision_at_k(embeddings, labels, k=1),
        "r_precision": r_precision(embeddings, labels),
        "map_at_r": map_at_r(embeddings, labels),
    }


def pml(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    search = CustomKNN(CosineSimilarity(), batch_size=_BLOCK)
    found = AccuracyCalculator(include=names, knn_func=search).get_accuracy(embeddings, labels)
    return dict(
        zip(("precision_at_1", "r_precision", "map_at_r"), map(found.get, names), strict=True)
    )


def neighbors(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip.similarity import nearest_neighbors

    scores, _ = nearest_neighbors(embeddings, k=NEAREST)
    return {"mean_score": float(scores.mean())}


def semantic(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from sentence_transformers.util import semantic_search

    found = semantic_search(embeddings, embeddings, top_k=NEAREST + 1)
    scores = [hit["score"] for hits in found for hit in hits[1:]]
    return {"mean_score": sum(scores) / len(scores)}


def faiss(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    import faiss as library
    import torch

    library.omp_set_num_threads(torch.get_num_threads())
    unit = torch.nn.functional.normalize(embeddings).numpy()
    index = library.IndexFlatIP(unit.shape[1])
    index.add(unit)
    scores, _ = index.search(unit, NEAREST + 1)
    return {"mean_score": float(scores[:, 1:].mean())}


CONTENDERS: dict[str, tuple[Callable[[Tensor, Tensor], dict[str, float]], tuple[int, ...]]] = {
    EVALUATE: (evaluate, (SMALL, LARGE)),
    FIGURES: (figures, (SMALL, LARGE)),
    FUNCTIONS: (three_functions, (SMALL,)),
    PML: (pml, (SMALL,)),
    NEIGHBORS: (neighbors, (SMALL, LARGE)),
    SEMANTIC: (semantic, (SMALL, LARGE)),
    FAISS: (faiss, (SMALL, LARGE)),
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
    return {"time": measure_time, "memory": measure_memory}[job["measure"]](run, *rows)


def measure_time(
    run: Callable[[Tensor, Tensor], dict[str, float]], embeddings: Tensor, labels: Tensor
) -> Row:
    products: list[float] = []
    times: list[float] = []
    while len(times) < 2 or sum(times) + sum(products) < _SECONDS:
        products.append(seconds_of(lambda: product(embeddings)))
        times.append(seconds_of(lambda: run(embeddings, labels)))
        if times[0] > _SECONDS:
            break
    return {"seconds": min(times), "product_seconds": min(products)}


def product(embeddings: Tensor) -> None:
    import torch

    out = torch.empty(_BLOCK, len(embeddings))
    for block in embeddings.split(_BLOCK):
        torch.mm(block, embeddings.T, out=out[: len(block)])


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


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
    shared = {name: getattr(arguments, name) for name in ("classes", "width", "threads")}
    return [
        _bench.run_worker(
            __file__,
            {"contender": name, "rows": rows, "measure": what} | shared,
            limits,
            environment,
        )
        for name in arguments.only
        for rows in CONTENDERS[name][1]
        if rows in arguments.rows
        for what in ("time", "memory")
    ]


class Results:
    """The rows by contender, number of embeddings and what was measured."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {(row["contender"], row["rows"], row["measure"]): row for row in rows}

    def get(self, contender: str, rows: int, key: str) -> float | None:
        what = "memory" if key.endswith("_bytes") else "time"
        return self._rows.get((contender, rows, what), {}).get(key)

    def times_product(self, contender: str, rows: int) -> float | None:
        seconds = self.get(contender, rows, "seconds")
        return _bench.ratio(seconds, self.get(contender, rows, "product_seconds"))

    def difference(self, one: str, other: str, rows: int) -> float | None:
        """Largest difference of the figures of two contenders."""
        mine, theirs = (
            self._rows.get((name, rows, "memory"), {}).get("values") for name in (one, other)
        )
        if not mine or not theirs:
            return None
        return max(abs(mine[name] - theirs[name]) for name in mine)

    def outcome(self, contender: str, rows: int) -> str:
        return self._rows.get((contender, rows, "time"), {}).get("outcome", "")


def report(results: Results, rows: list[int]) -> str:
    headers = ["contender", "N", "seconds", "x product", "peak MiB", "of it own"]
    mebibyte = 2.0**20
    return _bench.table(
        headers,
        [
            [
                name,
                str(count),
                _bench.number(results.get(name, count, "seconds")) or results.outcome(name, count),
                _bench.number(results.times_product(name, count)),
                *(
                    _bench.number(_bench.ratio(results.get(name, count, key), mebibyte))
                    for key in ("peak_bytes", "own_bytes")
                ),
            ]
            for name, (_, sizes) in CONTENDERS.items()
            for count in sizes
            if count in rows
        ],
    )


def criteria_of(results: Results) -> list[Criterion]:
    """What issue 5 asks for."""

    def gain(key: str, one: str, other: str, rows: int) -> float | None:
        return _bench.ratio(results.get(other, rows, key), results.get(one, rows, key))

    return [
        Criterion(
            "figures, N = 10000: PML takes x",
            20,
            gain("seconds", FIGURES, PML, SMALL),
            at_least=True,
        ),
        Criterion(
            "figures, N = 10000: PML's memory x",
            10,
            gain("own_bytes", FIGURES, PML, SMALL),
            at_least=True,
        ),
        Criterion(
            "figures, N = 10000: difference from PML", 1e-6, results.difference(FIGURES, PML, SMALL)
        ),
        Criterion(
            "evaluate_embeddings, N = 10000: x product", 6, results.times_product(EVALUATE, SMALL)
        ),
        Criterion(
            "evaluate_embeddings, N = 50000: GB of memory",
            2,
            _bench.ratio(results.get(EVALUATE, LARGE, "peak_bytes"), 1e9),
        ),
        Criterion(
            "nearest_neighbors, N = 50000: x product",
            1.35,
            results.times_product(NEIGHBORS, LARGE),
        ),
        Criterion(
            "nearest_neighbors, N = 50000: semantic_search takes x",
            1,
            gain("seconds", NEIGHBORS, SEMANTIC, LARGE),
            at_least=True,
        ),
    ]


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[SMALL, LARGE], help="N")
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
    print(report(results, arguments.rows))
    return _bench.finish(arguments, rows, criteria_of(results))


if __name__ == "__main__":
    sys.exit(main())
