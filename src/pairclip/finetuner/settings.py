"""What the steps of a fit are made with: numbers and choices, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pairclip import _checks

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "no", "bf16", "fp16"]
LEARNING_RATE = 1e-5
KEEP_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `Finetuner` that are plain values, as its docstring describes them.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one is out of range, or would be ignored.
    """

    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    schedule: Schedule
    optimizer: OptimizerFactory | None
    precision: Precision
    max_grad_norm: float | None
    micro_batch_size: int | None
    seed: int

    def __post_init__(self) -> None:
        _checks.check_in("(0, inf)", "learning_rate", self.learning_rate)
        _checks.check_in("[0, inf)", "weight_decay", self.weight_decay)
        _checks.check_in("[0, 1)", "warmup_ratio", self.warmup_ratio)
        _checks.check_choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        _checks.check_choice("precision", self.precision, ("auto", "no", "bf16", "fp16"))
        if self.max_grad_norm is not None:
            advice = "None clips nothing."
            _checks.check_in("(0, inf]", "max_grad_norm", self.max_grad_norm, advice=advice)
        if self.optimizer is not None:
            self._check_optimizer()
        if self.micro_batch_size is not None:
            _checks.check_positive_int("micro_batch_size", self.micro_batch_size)
        object.__setattr__(self, "seed", _checks.check_count("seed", self.seed))

    def _check_optimizer(self) -> None:
        if not callable(self.optimizer):
            raise TypeError(
                "`optimizer` must be a callable that takes the parameters, for instance "
                "`lambda parameters: torch.optim.SGD(parameters, lr=0.1)`, got "
                f"{self.optimizer!r}."
            )
        if self.learning_rate != LEARNING_RATE or self.weight_decay:
            raise ValueError(
                f"`learning_rate` {self.learning_rate} and `weight_decay` {self.weight_decay} are "
                "for the default AdamW and would be ignored. Set them in the `optimizer` that you "
                "give."
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a fit is, and what it does beside its steps: arguments of `Finetuner.fit`.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one is out of range, or would be ignored.
    """

    epochs: int
    max_steps: int | None
    evaluates: bool
    eval_every: int | None
    checkpoint_dir: Path | None
    checkpoint_every: int | None
    keep_checkpoints: int
    resume: bool
    num_workers: int
    check: str | None

    def __post_init__(self) -> None:
        _checks.check_positive_int("epochs", self.epochs)
        if self.max_steps is not None:
            _checks.check_positive_int("max_steps", self.max_steps)
            if self.epochs != 1:
                raise ValueError(
                    f"`epochs` {self.epochs} would be ignored: `max_steps` is {self.max_steps}."
                )
        saves = self.checkpoint_dir is not None
        _check_every("eval_every", self.eval_every, "eval_dataset", self.evaluates)
        _check_every("checkpoint_every", self.checkpoint_every, "checkpoint_dir", saves)
        _checks.check_positive_int("keep_checkpoints", self.keep_checkpoints)
        _checks.check_count("num_workers", self.num_workers)
        if self.check is not None:
            _checks.check_choice("check", self.check, ("paths", "decode"))
        if self.keep_checkpoints != KEEP_CHECKPOINTS and not saves:
            raise ValueError(
                f"`keep_checkpoints` {self.keep_checkpoints} would be ignored: there is no "
                "`checkpoint_dir`."
            )
        if self.resume and not saves:
            raise ValueError("`resume` needs a `checkpoint_dir` to resume from.")


def _check_every(name: str, every: int | None, needed: str, given: bool) -> None:
    if every is None:
        return
    _checks.check_positive_int(name, every)
    if not given:
        raise ValueError(f"`{name}` {every} would be ignored: there is no `{needed}`.")
