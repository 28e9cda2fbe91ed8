"""What happened during a fit."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pairclip import _files


@dataclass
class History:
    """What happened during a fit.

    Attributes:
        steps: One record per step: ``step`` (from 1), ``epoch`` (from 0), ``loss``,
            ``learning_rate`` (of the first parameter group) and ``gradient_norm`` (before
            clipping; None where a float16 gradient overflowed).
        evaluations: One record per evaluation: ``step`` and the single figures of
            `Evaluation.to_dict`.
        skipped_steps: Steps left out because a float16 gradient overflowed.
        stop_reason: Why a callback ended the fit early, or None.
        unreadable: One record per image that ``LabelledImages(..., on_error="skip")`` left out, or
            `StreamBatches` with it: the ``argument`` of `Finetuner.fit` that it is of, ``index``,
            ``path`` (or None) and ``reason``.

    Example:
        >>> from pairclip import History
        >>> history = History(steps=[{"step": 1, "epoch": 0, "loss": 0.5}])
        >>> history.to_dict()["steps"][0]["loss"]
        0.5
    """

    steps: list[dict[str, float | None]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int = 0
    stop_reason: str | None = None
    unreadable: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        loss = f", last loss {self.steps[-1].get('loss')}" if self.steps else ""
        return f"History({len(self.steps)} steps{loss}, {len(self.evaluations)} evaluations)"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file with a checksum, whole or not at all.

        Args:
            path: The file; its folder must exist.

        Raises:
            OSError: If it can't be written.
        """
        _files.write_json(path, _files.sealed(self.to_dict()), indent=1)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> History:
        """Read what `to_json` wrote.

        Args:
            path: The file.

        Returns:
            The history.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or holds something else.
        """
        path = Path(path)
        read = _files.read_json(path)
        if isinstance(read, dict) and "sha256" in read:  # the first files had none
            _files.check_seal(read, path)
            del read["sha256"]
        problem = _problem_of(read)
        if problem is not None:
            raise ValueError(
                f"`path` must be a file that `History.to_json` wrote, got '{path}': {problem}."
            )
        return cls(**read)


def _problem_of(read: Any) -> str | None:
    """Why what a file holds is no history, if it is none."""
    if not isinstance(read, dict):
        return f"it holds a {type(read).__name__}"
    names = [each.name for each in fields(History)]
    if list(read) not in (names, names[:-1]):  # the first files had no `unreadable`
        return f"its fields are {', '.join(map(repr, read)) or 'none'}, not {', '.join(names)}"
    for name in ("steps", "evaluations"):
        for record in read[name] if isinstance(read[name], list) else [read[name]]:
            if not (isinstance(record, dict) and type(record.get("step")) is int):
                return f"`{name}` must be a list of records with a step"
    for number, record in enumerate(read["steps"]):
        for name, value in record.items():
            if not (value is None or type(value) in (int, float)):
                return f"`{name}` of record {number} in `steps` is {value!r}, no number"
    if type(read["skipped_steps"]) is not int or read["skipped_steps"] < 0:
        return f"`skipped_steps` is {read['skipped_steps']!r}, no count"
    if not (read["stop_reason"] is None or isinstance(read["stop_reason"], str)):
        return f"`stop_reason` is {read['stop_reason']!r}, no text"
    images = read.get("unreadable", [])
    for number, record in enumerate(images if isinstance(images, list) else [images]):
        if not (isinstance(record, dict) and type(record.get("index")) is int):
            return f"record {number} in `unreadable` is {record!r}, no image"
    return None
