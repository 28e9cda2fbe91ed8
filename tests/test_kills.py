"""Fits in processes of their own: killed, or stopped with their workers, and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import killable
import pytest

from pairclip import (
    newest_checkpoint,
)


@pytest.fixture(scope="module")
def fits() -> Iterator[killable.Fits]:
    fits = killable.Fits()
    yield fits
    fits.close()


@pytest.mark.parametrize(
    ("run", "workers", "seed"), [("everything", 2, 1), ("random sampler", 0, 2), ("pairs", 0, 3)]
)
def test_three_kills_cost_no_more_than_the_steps_since_a_checkpoint(
    fits: killable.Fits, tmp_path: Path, run: str, workers: int, seed: int
) -> None:
    job = {"run": run, "steps": 14, "workers": workers}
    whole = killable.uninterrupted(fits, tmp_path / "whole", **job)
    chance, said = random.Random(seed), []
    killable.killed_and_resumed(fits, whole, tmp_path / "killed", chance, kills=3, said=said, **job)
    print(f"{run}, seed {seed}, killed {'; '.join(said)}")
    assert killable.different_files(whole.out, tmp_path / "killed" / "out") == []
    assert {"tower.safetensors", "history.json", "state.json"} <= {
        path.name for path in whole.out.iterdir()
    }


def test_a_signal_to_the_whole_process_group_with_workers(
    fits: killable.Fits, tmp_path: Path
) -> None:
    job = {"run": "everything", "steps": 14, "workers": 2}
    whole = killable.uninterrupted(fits, tmp_path / "whole", **job)
    folder = tmp_path / "stopped"
    folder.mkdir()
    job |= {"folder": str(folder)}
    for step, number, status in [
        (4, signal.SIGTERM, 128 + signal.SIGTERM),  # an evaluation is due
        (8, signal.SIGINT, 128 + signal.SIGINT),
    ]:
        assert fits.run(**job, out=None, kill={"signals": [[step, number, True]]}) == status
        assert killable.last_whole_step(folder) == step
    assert fits.run(**job, out=str(folder / "out"), kill={}) == 0
    steps = [int(line) for line in (folder / "steps").read_text().split()]
    assert steps == list(range(1, 15))
    assert killable.different_files(whole.out, folder / "out") == []


def test_a_second_signal_ends_a_program_whose_workers_are_stalled(
    fits: killable.Fits, tmp_path: Path
) -> None:
    job = {"run": "everything", "steps": 99, "workers": 1, "folder": str(tmp_path), "out": None}
    assert fits.run(**job, kill={"stalled": 4}, seconds=90) == 128 + signal.SIGINT
    # A worker may have been a few batches ahead.
    assert newest_checkpoint(tmp_path / "saved").step in (3, 6)


def test_a_program_of_its_own_ends_quietly_with_143(tmp_path: Path) -> None:
    job = {"run": "random sampler", "folder": str(tmp_path), "steps": 14, "workers": 2}
    job |= {"out": None, "kill": {"signals": [[5, signal.SIGTERM, True]]}}
    command = [sys.executable, "-W", "ignore", killable.__file__, json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, start_new_session=True, env=environment, timeout=90
    )
    assert (ended.returncode, ended.stderr) == (143, "")
    assert newest_checkpoint(tmp_path / "saved").step == 5
