"""Time per index of the samplers against peers, and their memory with ten million labels.

    pip install -e ".[bench]"
    pip install open-metric-learning omegaconf && pip install "numpy>=2"  # for OML's row
    python tests/benchmarks/samplers.py            # all rows
    python tests/benchmarks/samplers.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/samplers.py --labels 20000 --many 50000 --json /tmp/samplers.json

Every row is a process of its own with a memory and a time limit. Set-up is the constructor; the
time per index is that of whole passes, at least a second of them, over the indices that came.
Batches hold 128 indices: 64 pairs, or 32 classes of 4, where the sampler lets one choose. Peak is
the highest memory of the whole process from set-up on, with Python, imports and labels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _bench
from _bench import Criterion, Row
from contenders import oml, ours, pml, sbert
from contenders.task import Factory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Labels = npt.NDArray[np.int64]

M_PER_CLASS = "PML MPerClassSampler"
BALANCE = "OML BalanceSampler"
GROUP_BY_LABEL = "sentence-transformers GroupByLabel"
OURS = ("PairSampler", "PairSampler, class_balanced", "ClassBalancedSampler")

FACTORIES: dict[str, Callable[[], Factory]] = {
    OURS[0]: ours.pair_sampler,
    OURS[1]: lambda: ours.pair_sampler(class_balanced=True),
    OURS[2]: ours.class_balanced_sampler,
    M_PER_CLASS: pml.m_per_class,
    BALANCE: oml.balance,
    GROUP_BY_LABEL: sbert.group_by_label,
}
PEERS = tuple(name for name in FACTORIES if name not in OURS)


def labels_of(count: int, classes: int) -> Labels:
    import numpy as np

    labels = np.arange(count) % classes
    np.random.default_rng(0).shuffle(labels)
    return labels


def measure(job: Row) -> Row:
    factory = FACTORIES[job["sampler"]]()
    labels = labels_of(job["labels"], job["classes"])
    before = _bench.resident_bytes()
    _bench.reset_peak()
    start = time.perf_counter()
    one_pass = factory(labels)
    set_up = time.perf_counter() - start
    indices, seconds = 0, 0.0
    while seconds < job["pass_seconds"]:
        start = time.perf_counter()
        indices += one_pass()
        seconds += time.perf_counter() - start
    peak = _bench.peak_bytes()
    return {
        "set_up_seconds": set_up,
        "indices": indices,
        "seconds_per_index": seconds / indices,
        "peak_bytes": peak,
        "beyond_labels_bytes": peak - before,
    }


def run_all(arguments: Any) -> list[Row]:
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds)
    jobs = [(name, arguments.labels) for name in FACTORIES]
    jobs += [(name, arguments.many) for name in OURS]
    shared = {"classes": arguments.classes, "pass_seconds": arguments.pass_seconds}
    return [
        _bench.run_worker(__file__, {"sampler": name, "labels": count} | shared, limits)
        for name, count in jobs
    ]


def report(rows: list[Row]) -> str:
    headers = ["sampler", "labels", "set-up s", "ns per index", "PML x", "OML x", "s-t x"]
    headers += ["peak MB", "beyond imports and labels MB"]
    times = {(row["sampler"], row["labels"]): row.get("seconds_per_index") for row in rows}
    outcomes = {(row["sampler"], row["labels"]): row["outcome"] for row in rows}

    def peers_of(row: Row) -> list[str]:
        """How many times as long each peer takes; what became of it where it has no time."""
        if row["sampler"] not in OURS:
            return [""] * len(PEERS)
        own = row["seconds_per_index"]
        keys = [(peer, row["labels"]) for peer in PEERS]
        return [
            _bench.number(_bench.ratio(times.get(key), own)) or outcomes.get(key, "")
            for key in keys
        ]

    def line_of(row: Row) -> list[str]:
        start = [row["sampler"], f"{row['labels']:,}"]
        if row["outcome"] != _bench.MEASURED:
            return [*start, row["outcome"], *[""] * (len(headers) - 3)]
        return [
            *start,
            _bench.number(row["set_up_seconds"]),
            _bench.number(1e9 * row["seconds_per_index"]),
            *peers_of(row),
            _bench.number(row["peak_bytes"] / 1e6),
            _bench.number(row["beyond_labels_bytes"] / 1e6),
        ]

    return _bench.table(headers, map(line_of, rows))


def criteria_of(rows: list[Row], labels: int, many: int) -> list[Criterion]:
    """What issue 3 asks for."""
    by_key = {(row["sampler"], row["labels"]): row for row in rows}

    def measured(sampler: str, count: int, field: str) -> float | None:
        return by_key[sampler, count].get(field)

    gain = _bench.ratio(
        measured(M_PER_CLASS, labels, "seconds_per_index"),
        measured(OURS[0], labels, "seconds_per_index"),
    )
    return [
        Criterion(f"PairSampler, {labels:,} labels: PML takes x", 10, gain, at_least=True),
        *(
            Criterion(
                f"{sampler}, {many:,} labels: peak MB of the process",
                1000,
                _bench.ratio(measured(sampler, many, "peak_bytes"), 1e6),
            )
            for sampler in OURS
        ),
    ]


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("--labels", type=int, default=1_000_000, help="labels for all samplers")
    parser.add_argument("--many", type=int, default=10_000_000, help="labels for pairclip's alone")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--pass-seconds", type=float, default=1, help="of passes at least")
    arguments = parser.parse_args()
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    rows = run_all(arguments)
    print(f"\n{report(rows)}")
    criteria = criteria_of(rows, arguments.labels, arguments.many)
    return _bench.finish(arguments, rows, criteria)


if __name__ == "__main__":
    sys.exit(main())
