"""What happened during a fit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
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

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file, whole or not at all; its folder must exist."""
        _files.write_json(path, self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> History:
        """Read what `to_json` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
