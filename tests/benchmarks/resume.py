"""Runs that are killed at random moments and resumed, against runs that nobody kills.

    pip install -e ".[test]"
    python tests/benchmarks/resume.py               # twenty runs, five kills each
    python tests/benchmarks/resume.py --runs 5 --seed 7

Every run is killed by SIGKILL: before a file operation of a checkpoint that is drawn at random, in
the middle of writing tensors, or after a random time. It is then resumed to its end, and everything
that it leaves is compared byte for byte with what the same run leaves that nobody killed: weights,
the loss's parameters, history, and the last checkpoint with optimizer and callbacks. After each
kill, no more steps may be missing than those since the last checkpoint that was due. The runs are
the three of `tests/killable.py`, with no and with two data-loading workers. The last line is
`20 of 20`; the exit status is 1 if it is less.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import _bench

sys.path.insert(0, str(Path(__file__).parents[1]))
import killable

STEPS = 24
WORKERS = (0, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds = [(run, workers) for workers in WORKERS for run in killable.RUNS]
    fits = killable.Fits()
    rows, good = [], 0
    with tempfile.TemporaryDirectory() as folder:
        whole: dict[tuple[str, int], killable.Uninterrupted] = {}
        for number in range(arguments.runs):
            run, workers = kind = kinds[number % len(kinds)]
            job = {"run": run, "steps": STEPS, "workers": workers}
            if kind not in whole:
                whole[kind] = killable.uninterrupted(
                    fits, Path(folder) / f"whole-{run}-{workers}", **job
                )
            chance = random.Random(f"{arguments.seed} {number}")
            start = time.monotonic()
            killed = Path(folder) / f"killed-{number}"
            said: list[str] = []
            try:
                killable.killed_and_resumed(
                    fits, whole[kind], killed, chance, arguments.kills, said=said, **job
                )
                different = killable.different_files(whole[kind].out, killed / "out")
                result = f"differs: {', '.join(different)}" if different else "same bytes"
            except AssertionError as error:
                result = f"failed: {error}"
            good += result == "same bytes"
            seconds = f"{time.monotonic() - start:.1f}"
            print(f"{number + 1}. {run}, {workers} workers, {seconds} s: {result}", flush=True)
            rows.append([str(number + 1), run, str(workers), "; ".join(said), result])
    fits.close()
    print()
    print(_bench.table(["run", "kind", "workers", "killed", "result"], rows))
    print(f"\nseed {arguments.seed}: {good} of {arguments.runs}")
    sys.exit(good < arguments.runs)


if __name__ == "__main__":
    main()
