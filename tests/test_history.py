"""Histories in files: validated, and never changed without a word."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pairclip import History

STEP = {"step": 1, "epoch": 0, "loss": 0.5}
READ = {"steps": [STEP], "evaluations": [], "skipped_steps": 0, "stop_reason": None}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "it holds a list"),
        ({}, "its fields are none, not steps"),
        ({**READ, "more": 0}, "its fields are .*'more', not steps"),
        ({**READ, "steps": 3}, "`steps` must be a list of records with a step"),
        ({**READ, "steps": [{"loss": 1}]}, "`steps` must be a list of records with a step"),
        ({**READ, "steps": [{**STEP, "loss": "low"}]}, "`loss` of record 0 in `steps` is 'low'"),
        ({**READ, "evaluations": [{"step": 1.5}]}, "`evaluations` must be a list of records"),
        ({**READ, "skipped_steps": -1}, "`skipped_steps` is -1, no count"),
        ({**READ, "stop_reason": 3}, "`stop_reason` is 3, no text"),
        ({**READ, "unreadable": [{"path": "a"}]}, "record 0 in `unreadable` is .* no image"),
        ({**READ, "unreadable": None}, "record 0 in `unreadable` is None, no image"),
    ],
)
def test_what_is_no_history_is_named(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "history.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"`History.to_json` wrote, got '{path}': {problem}"):
        History.from_json(path)


def test_no_flipped_bit_of_a_history_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    history = History(steps=[{"step": 1, "loss": 0.5}], stop_reason="enough")
    history.to_json(path)
    content = path.read_bytes()
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(ValueError):
            assert History.from_json(path) == history  # a blank of another kind, say
    path.write_text(json.dumps(READ))  # as the first version wrote it
    assert History.from_json(path) == History(steps=[STEP])
    with pytest.raises(FileNotFoundError):
        History.from_json(tmp_path / "none")


def test_what_is_shown_of_a_history_is_short_however_long_it_is() -> None:
    assert repr(History([STEP] * 1000)) == "History(1000 steps, last loss 0.5, 0 evaluations)"
    assert repr(History()) == "History(0 steps, 0 evaluations)"
