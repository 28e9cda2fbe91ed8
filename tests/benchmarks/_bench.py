"""What the benchmarks share: worker processes with limits, tables, results as JSON.

A script starts itself again with ``--worker JOB`` for each row, so that no row sees another's
memory, threads or imports. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

OFFLINE = Path(__file__).parents[2] / "examples" / "offline"  # a small tower, and drawings

MEASURED = "measured"
NOT_INSTALLED = "not installed"
OUT_OF_MEMORY = "out of memory"
TIMED_OUT = "timed out"
FAILED = "failed"

_PACKAGES = (
    "pairclip",
    "torch",
    "numpy",
    "pytorch-metric-learning",
    "sentence-transformers",
    "open-metric-learning",
)


class Limits(NamedTuple):
    """What a worker may use."""

    memory_gib: float
    seconds: float


class Criterion(NamedTuple):
    """A number that must be at most, or at least, a limit; None if it was not measured."""

    claim: str
    limit: float
    value: float | None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def parser_for(script: str, doc: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(script).parent / "results" / f"{Path(script).stem}.json"
    parser.add_argument("--check", action="store_true", help="exit with 1 if a criterion fails")
    parser.add_argument("--json", type=Path, default=results, help="where the results go")
    parser.add_argument("--memory-gib", type=float, default=16, help="memory limit of a worker")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a worker")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def run_worker(
    script: str, job: Row, limits: Limits, environment: dict[str, str] | None = None
) -> Row:
    """Start the script anew for one job; returns the job, the outcome and what it measured."""
    limited = job | {"memory_bytes": int(limits.memory_gib * 2**30)}
    command = [sys.executable, script, "--worker", json.dumps(limited)]
    try:
        done = subprocess.run(
            command,
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=limits.seconds,
        )
    except subprocess.TimeoutExpired:
        result: Row = {"outcome": TIMED_OUT}
    else:
        result = _result_of(done)
    row = job | result
    print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)
    return row


def _result_of(done: subprocess.CompletedProcess[str]) -> Row:
    if done.returncode == 0:
        result: Row = json.loads(done.stdout.splitlines()[-1])
        return result
    # The kernel kills for memory; C++ code that can't allocate aborts.
    if done.returncode == -signal.SIGKILL or "std::bad_alloc" in done.stderr:
        return {"outcome": OUT_OF_MEMORY}
    return {"outcome": FAILED, "detail": f"exit {done.returncode}: {done.stderr[-2000:]}"}


def serve(job: str, measure: Callable[[Row], Row]) -> None:
    """Do one job in this process, under its memory limit, and print the result."""
    settings = _limited(job)
    try:
        result = {"outcome": MEASURED} | measure(settings)
    except ModuleNotFoundError as error:
        result = {"outcome": NOT_INSTALLED, "detail": str(error)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        result = {"outcome": OUT_OF_MEMORY}
    print(json.dumps(result))


def _limited(job: str) -> Row:
    """The job's settings, when its memory limit is set."""
    settings: Row = json.loads(job)
    memory = settings.pop("memory_bytes")
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    return settings


class Turns:
    """How a worker of `run_in_turns` waits for its turns, and tells how long its steps took."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seconds: list[float] = []
        # What a library prints must not come between the lines of the results.
        self._results = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start = 0.0

    def wait(self) -> None:
        """Return when it is this worker's turn; its clock starts then."""
        if not sys.stdin.readline():
            raise EOFError("Whoever gives the turns is gone.")
        self._start = time.perf_counter()

    def step_done(self) -> None:
        """Note the time of a step, and give the turn away after the last one."""
        now = time.perf_counter()
        self._seconds.append(now - self._start)
        self._start = now
        if len(self._seconds) == self._steps:
            self.tell({"seconds": self._seconds})
            self._seconds = []
            self.wait()

    def tell(self, result: Row) -> None:
        print(json.dumps(result), file=self._results, flush=True)


def run_in_turns(
    script: str,
    jobs: dict[str, Row],
    orders: Sequence[Sequence[str]],
    limits: Limits,
    environment: dict[str, str] | None = None,
) -> Row:
    """Start a worker for each job, which take turns of ``steps`` in the orders, one at a time.

    Returns the outcome, ``seconds`` of each step of each turn of each worker, and who is
    ``missing`` a package.
    """
    workers: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[list[float]]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryFile("w+") as errors:
        timer = threading.Timer(limits.seconds, lambda: _kill(list(workers.values())))
        timer.start()
        try:
            for name, job in jobs.items():
                limited = job | {"memory_bytes": int(limits.memory_gib * 2**30)}
                workers[name] = subprocess.Popen(
                    [sys.executable, script, "--worker", json.dumps(limited)],
                    env=os.environ | (environment or {}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            for name in [name for order in orders for name in order]:
                if name in missing:
                    continue
                result = _turn_of(workers[name])
                if result is None:
                    errors.seek(0)
                    late = not timer.is_alive()
                    detail = f"{name}: {errors.read()[-2000:]}"
                    return {"outcome": TIMED_OUT if late else FAILED, "detail": detail}
                if "missing" in result:
                    missing[name] = result["missing"]
                else:
                    seconds.setdefault(name, []).append(result["seconds"])
        finally:
            timer.cancel()
            for worker in workers.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.communicate(timeout=30)  # its next wait for a turn ends it
            _kill(list(workers.values()))
    return {"outcome": MEASURED, "seconds": seconds, "missing": missing}


def _turn_of(worker: subprocess.Popen[str]) -> Row | None:
    """What the worker tells at the end of its turn; None if it has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        print("go", file=worker.stdin, flush=True)
    except BrokenPipeError:
        return None
    line = worker.stdout.readline()
    return json.loads(line) if line else None


def _kill(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.kill()


def serve_in_turns(job: str, work: Callable[[Row, Turns], None]) -> None:
    """Do one job of `run_in_turns` in this process, under its memory limit."""
    settings = _limited(job)
    turns = Turns(settings["steps"])
    try:
        turns.wait()
        work(settings, turns)
    except ModuleNotFoundError as error:
        turns.tell({"missing": str(error)})


def resident_bytes() -> int:
    """Memory of this process now, with all that it has mapped and touched."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Highest `resident_bytes` since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` start from the present."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}.")
    return 1024 * int(found[1])


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits; nothing for None."""
    return "" if value is None else f"{float(f'{value:.3g}'):,.10g}{unit}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned for reading as text; the first column is to the left."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def joined(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(text.rjust(n) for text, n in others)])

    return "\n".join(f"| {joined(line)} |" for line in [cells[0], rule, *cells[1:]])


def criteria_table(criteria: Iterable[Criterion]) -> str:
    return table(
        ["criterion", "limit", "measured", "met"],
        [
            [
                criterion.claim,
                f"{'>=' if criterion.at_least else '<='} {number(criterion.limit)}",
                number(criterion.value) or "not measured",
                "yes" if criterion.met else "NO",
            ]
            for criterion in criteria
        ],
    )


def finish(arguments: argparse.Namespace, rows: list[Row], criteria: list[Criterion]) -> int:
    """Print the criteria, write everything as JSON, and return the exit status."""
    print(f"\n{criteria_table(criteria)}")
    _write(arguments, rows, criteria)
    print(f"\n{describe_machine()}. Written to {arguments.json}.")
    missing = {row["detail"] for row in rows if row["outcome"] == NOT_INSTALLED}
    for detail in sorted(missing):
        print(f"Not installed: {detail}.")
    failed = [row for row in rows if row["outcome"] == FAILED]
    for row in failed:
        print(f"\nA worker failed: {row}", file=sys.stderr)
    unmet = [criterion for criterion in criteria if not criterion.met]
    if arguments.check:
        for criterion in unmet:
            shown = number(criterion.value) or "not measured"
            print(f"Not met: {criterion.claim} ({shown})", file=sys.stderr)
    return int(bool(failed) or (arguments.check and bool(unmet)))


def _write(arguments: argparse.Namespace, rows: list[Row], criteria: list[Criterion]) -> None:
    path: Path = arguments.json
    settings = vars(arguments).items()
    document = {
        "settings": {k: v for k, v in settings if k not in ("check", "json", "worker")},
        "machine": describe_machine(),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version_of(name) for name in _PACKAGES},
        "rows": rows,
        "criteria": [criterion._asdict() | {"met": criterion.met} for criterion in criteria],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def drawn_images(per_class: int) -> tuple[list[Any], list[str]]:
    """Drawings of twelve kinds of things and their names, for a try without a folder of images."""
    sys.path.insert(0, str(OFFLINE))
    from drawings import drawings

    drawn: tuple[list[Any], list[str]] = drawings(per_class)
    return drawn


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> str:
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = ", ".join(f"{name} {version_of(name) or 'missing'}" for name in _PACKAGES)
    cpu = models[0] if models else platform.machine()
    return f"{os.cpu_count()} x {cpu}, Python {platform.python_version()}, {versions}"
