"""Time and memory of the losses over all pairs of a batch, against peers.

    pip install -e ".[bench]"
    python tests/benchmarks/losses.py            # all rows
    python tests/benchmarks/losses.py --check    # and exit with 1 if a criterion fails
    python tests/benchmarks/losses.py --batches 128 256 --classes 10 --json /tmp/losses.json

Forward and backward in float32. Every row is a process of its own with a memory and a time limit;
"out of memory" and "timed out" are results. Time is the median of repeated steps, under the
system's allocator as it is. Memory is measured in a second process, in which freed tensors go
back to the system at once: the highest resident memory of two steps less that before the first.

pytorch-metric-learning (PML) is its ContrastiveLoss with cosine similarity as it comes. "PML-sum"
has its cheapest reduction, whose gradient is pairclip's but for a factor. It has no squared form,
so that form is compared with the faster of its other two. sentence-transformers'
OnlineContrastiveLoss takes a list of pairs and builds none: it gets the batch as B / 2 pairs, half
of them matching, and so does far less than the others. "targets" is the loss on targets, K being D,
which only plain PyTorch has too.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import _bench
from _bench import Criterion, Row
from contenders import bare, ours, pml, sbert
from contenders.task import Step, backward_of

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("linear", "squared", "hinge")
NORMALIZE = "F.normalize"
ONLINE = "sentence-transformers online"
TARGETS = "targets"
PML_FORMS = {
    "linear": ("linear",),
    "squared": ("linear", "hinge"),
    "hinge": ("hinge",),
    TARGETS: (),
}

# With a fixed threshold every large tensor is a mapping of its own, gone when it is freed.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_WARM_UP_SECONDS = 0.2
# A median of at least `_MANY` steps where they are quick, of two where they are slow.
_QUICK_SECONDS, _SLOW_SECONDS, _MANY = 0.5, 5.0, 7


def contenders() -> list[str]:
    pml = [f"{kind} {form}" for kind in ("PML", "PML-sum") for form in ("linear", "hinge")]
    forms = (*FORMS, TARGETS)
    ours, plain = ([f"{kind} {form}" for form in forms] for kind in ("pairclip", "plain"))
    return [*ours, *pml, *plain, ONLINE, NORMALIZE]


def build(contender: str, embeddings: Tensor, labels: Tensor) -> Step:
    """The forward and backward pass of a contender on this batch."""
    if contender == NORMALIZE:
        return bare.normalize(embeddings)
    if contender == ONLINE:
        return sbert.online(embeddings)
    kind, form = contender.split()
    losses = {"pairclip": ours.loss, "PML": pml.loss, "PML-sum": pml.loss_of_sums}
    losses["plain"] = bare.loss
    leaf = embeddings.requires_grad_()
    if form == TARGETS:
        target_loss = {"pairclip": ours.target_loss, "plain": bare.target_loss}[kind]()
        targets = embeddings.detach().flip(0).contiguous()
        return backward_of(lambda: target_loss(leaf, targets), leaf)
    loss = losses[kind](form)
    return backward_of(lambda: loss(leaf, labels), leaf)


def batch_of(rows: int, classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise around class centres that lean one way, so that part of the hinges are active."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    lean = torch.randn(width, generator=generator)
    embeddings = torch.randn(rows, width, generator=generator)
    embeddings += (centres + lean).mul_(0.5)[labels]
    return embeddings, labels


def measure(job: Row) -> Row:
    import torch

    torch.set_num_threads(job["threads"])
    measured = {"time": measure_time, "memory": measure_memory}[job["measure"]]
    return measured(job["contender"], job["rows"], job["classes"], job["width"])


def measure_time(contender: str, rows: int, classes: int, width: int) -> Row:
    step = build(contender, *batch_of(rows, classes, width))
    warm_up = seconds_of(step)
    while warm_up < _WARM_UP_SECONDS:
        warm_up += seconds_of(step)
    times: list[float] = []
    while len(times) < 2 or sum(times) < (_QUICK_SECONDS if len(times) >= _MANY else _SLOW_SECONDS):
        times.append(seconds_of(step))
    return {"seconds": statistics.median(times), "steps": len(times)}


def seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_memory(contender: str, rows: int, classes: int, width: int) -> Row:
    # Code is mapped when it first runs, and threads start: a small batch sees to both.
    build(contender, *batch_of(min(rows, 2 * width), classes, width))()
    embeddings, labels = batch_of(rows, classes, width)
    size = embeddings.nbytes
    step = build(contender, embeddings, labels)
    del embeddings, labels
    before = _bench.resident_bytes()
    _bench.reset_peak()
    step()
    step()
    peak = _bench.peak_bytes() - before
    return {"peak_bytes": peak, "multiples": peak / size}


def run_all(arguments: Any) -> list[Row]:
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds)
    rows = []
    for job in jobs(arguments):
        environment = {"OMP_NUM_THREADS": str(arguments.threads)}
        if job["measure"] == "memory":
            environment |= _RETURN_MEMORY
        rows.append(_bench.run_worker(__file__, job, limits, environment))
    return rows


def jobs(arguments: Any) -> list[Row]:
    shared = {"width": arguments.width, "threads": arguments.threads}
    return [
        {"contender": contender, "rows": rows, "classes": classes, "measure": what} | shared
        for classes in arguments.classes
        for rows in arguments.batches
        for contender in arguments.only
        for what in ("time", "memory")
        if what == "time" or rows >= arguments.memory_from
    ]


class Results:
    """The rows by contender, rows of the batch and classes."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {
            (row["contender"], row["rows"], row["classes"], row["measure"]): row for row in rows
        }

    def seconds(self, contender: str, rows: int, classes: int) -> float | None:
        return self._row(contender, rows, classes, "time").get("seconds")

    def multiples(self, contender: str, rows: int, classes: int) -> float | None:
        return self._row(contender, rows, classes, "memory").get("multiples")

    def outcome(self, contender: str, rows: int, classes: int, what: str) -> str:
        return self._row(contender, rows, classes, what).get("outcome", "")

    def pml_seconds(self, form: str, rows: int, classes: int) -> float | None:
        times = [self.seconds(f"PML {peer}", rows, classes) for peer in PML_FORMS[form]]
        return min((seconds for seconds in times if seconds is not None), default=None)

    def _row(self, contender: str, rows: int, classes: int, what: str) -> Row:
        return self._rows.get((contender, rows, classes, what), {})


def report(results: Results, batches: list[int], classes: int) -> str:
    """The table of one number of classes; the columns after the time are ratios."""
    headers = ["loss", "B", "ms", "x F.normalize", "PML x", "online x", "plain x", "memory x input"]
    lines = [
        [contender, str(rows), *line_of(results, contender, rows, classes)]
        for rows in batches
        for contender in contenders()
    ]
    return f"\n{classes} classes\n\n{_bench.table(headers, lines)}"


def line_of(results: Results, contender: str, rows: int, classes: int) -> list[str]:
    seconds = results.seconds(contender, rows, classes)
    own_cost = _bench.ratio(seconds, results.seconds(NORMALIZE, rows, classes))
    return [
        results.outcome(contender, rows, classes, "time")
        if seconds is None
        else _bench.number(1000 * seconds),
        _bench.number(own_cost),
        *peers_of(results, contender, rows, classes),
        _bench.number(results.multiples(contender, rows, classes))
        or results.outcome(contender, rows, classes, "memory"),
    ]


def peers_of(results: Results, contender: str, rows: int, classes: int) -> list[str]:
    """How many times as long each peer takes; what became of it where it has no time."""
    kind, _, form = contender.partition(" ")
    if kind != "pairclip":
        return ["", "", ""]
    seconds = results.seconds(contender, rows, classes)
    peers = [
        (f"PML {next(iter(PML_FORMS[form]), '')}", results.pml_seconds(form, rows, classes)),
        (ONLINE, results.seconds(ONLINE, rows, classes)),
        (f"plain {form}", results.seconds(f"plain {form}", rows, classes)),
    ]
    return [
        results.outcome(peer, rows, classes, "time")
        if taken is None
        else _bench.number(_bench.ratio(taken, seconds))
        for peer, taken in peers
    ]


def criteria_of(results: Results) -> list[Criterion]:
    """What issue 3 asks for."""
    faster = {"linear": 300, "squared": 25, "hinge": 5}
    memory = {"linear": 6, "squared": 8, "hinge": 10}
    large = [("linear", 32768, 10), ("squared", 8192, 1000), ("hinge", 32768, 10)]

    def gain(form: str, rows: int) -> float | None:
        ours = results.seconds(f"pairclip {form}", rows, 10)
        return _bench.ratio(results.pml_seconds(form, rows, 10), ours)

    return [
        *(
            Criterion(f"{form}, B = 8192: PML takes x", times, gain(form, 8192), at_least=True)
            for form, times in faster.items()
        ),
        *(
            Criterion(
                f"{form}, B = {rows}, {classes} classes: memory x input",
                memory[form],
                results.multiples(f"pairclip {form}", rows, classes),
            )
            for form, rows, classes in [*((form, 8192, 10) for form in FORMS), *large]
        ),
        Criterion(
            "linear, B = 8192: x F.normalize",
            2,
            _bench.ratio(
                results.seconds("pairclip linear", 8192, 10), results.seconds(NORMALIZE, 8192, 10)
            ),
        ),
        Criterion(
            "targets, B = 8192: plain takes x",
            10,
            _bench.ratio(
                results.seconds("plain targets", 8192, 10),
                results.seconds("pairclip targets", 8192, 10),
            ),
            at_least=True,
        ),
        Criterion(
            "targets, B = 8192: memory x input", 8, results.multiples("pairclip targets", 8192, 10)
        ),
        *(
            Criterion(f"{form}, B = 128: PML takes x", 1, gain(form, 128), at_least=True)
            for form in FORMS
        ),
    ]


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[128, 256, 1024, 8192, 32768], help="B"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--memory-from", type=int, default=8192, help="smallest B whose memory is more than noise"
    )
    parser.add_argument("--only", nargs="+", default=contenders(), help="losses to run")
    arguments = parser.parse_args()
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    rows = run_all(arguments)
    results = Results(rows)
    for classes in arguments.classes:
        print(report(results, arguments.batches, classes))
    return _bench.finish(arguments, rows, criteria_of(results))


if __name__ == "__main__":
    sys.exit(main())
