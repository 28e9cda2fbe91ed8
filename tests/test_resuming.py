"""Resumed: the bits of a run that nothing happened to."""

import copy
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick import quick_evaluation
from runs import LOSS, At, Killed, Run, arcface, assert_same, kill, never, photos, send
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

from pairclip import (
    AllPairsCosineLoss,
    CosinePairLoss,
    EarlyStopping,
    PairSampler,
    VisionTower,
    WeightAverage,
    newest_checkpoint,
)


def of_any_kind(**changes: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for name, value in changes.items():
            value = value() if callable(value) and name != "optimizer" else value
            if name in ("loss", "tower", "data"):
                setattr(run, name, value)
            elif name in ("sampler", "eval_every", "max_steps", "epochs", "evaluate"):
                run.fit[name] = value
            else:
                run.finetuner[name] = value
        if "sampler" in changes:
            del run.fit["batch_size"]

    return change


class Drawing(nn.Module):
    """A loss that draws, from all generators, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        drawn = torch.rand(()).item() + random.random() + float(np.random.rand())  # noqa: NPY002
        return LOSS(embeddings, labels) * drawn * self.calls


class Stateful:
    """A loss that is no module, with state under the usual names."""

    def __init__(self) -> None:
        self.memory = torch.zeros(8)

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.memory = 0.5 * self.memory + embeddings.detach().mean(dim=0)
        return LOSS(embeddings - self.memory, labels)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "momentum": 0.5}]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)


KINDS = {
    "adamw": of_any_kind(weight_decay=0.1, schedule="linear", warmup_ratio=0.3),
    "sgd in groups": of_any_kind(optimizer=two_groups, learning_rate=1e-5),
    "amsgrad": of_any_kind(
        optimizer=lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True), learning_rate=1e-5
    ),
    "adagrad": of_any_kind(
        optimizer=lambda ps: torch.optim.Adagrad(ps, lr=1e-2), learning_rate=1e-5
    ),
    "loss with parameters": of_any_kind(loss=arcface),
    "loss that draws": of_any_kind(loss=Drawing, seed=7),
    "loss that is no module": of_any_kind(loss=Stateful),
    "epochs of torch's sampler": of_any_kind(
        sampler=lambda: BatchSampler(RandomSampler(range(24)), 7, drop_last=False), max_steps=9
    ),
    "pairs": of_any_kind(
        loss=CosinePairLoss, sampler=lambda: PairSampler(photos()[1], 4, seed=3), max_steps=9
    ),
    "evaluations and callbacks": of_any_kind(
        callbacks=lambda: [EarlyStopping("gap", patience=9), WeightAverage(0.7)],
        evaluate=lambda: quick_evaluation(photos()),
        eval_every=2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_any_kind_ends_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    whole = Run(tmp_path / "whole")
    KINDS[kind](whole)
    expected = whole.go(never())
    for number, steps in enumerate([(1,), (3, 5), (4,)]):
        for step in (*steps, -1):
            part = Run(tmp_path / f"{number}")
            KINDS[kind](part)
            try:
                found = part.go(At(step, kill))
            except Killed:
                continue
        assert found == expected, steps
        assert_same(part.tower, whole.tower)
        if isinstance(part.loss, nn.Module):
            assert_same(part.loss, whole.loss)
        newest = newest_checkpoint(tmp_path / f"{number}").folder
        for file in ("weights.safetensors", "training.safetensors", "state.json"):
            last = tmp_path / "whole" / newest.name / file
            assert (newest / file).read_bytes() == last.read_bytes(), file


def test_with_adapters_of_peft_too(tower: VisionTower, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, r=2)
        return peft.get_peft_model(copy.deepcopy(tower), config)

    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    whole.tower, part.tower, rest.tower = adapted(), adapted(), adapted()
    expected = whole.go(never())
    with pytest.raises(Killed):
        part.go(At(3, kill))
    assert rest.go(never()) == expected
    assert_same(rest.tower, whole.tower)


def test_workers_and_how_often_it_saves_may_change(tmp_path: Path) -> None:
    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    expected = whole.go(never())
    part.fit |= {"num_workers": 1}
    with pytest.raises(Killed):
        part.go(At(3, kill))
    rest.fit |= {"num_workers": 0, "checkpoint_every": 5, "keep_checkpoints": 1}
    assert rest.go(never()) == expected
    assert_same(rest.tower, whole.tower)


def test_by_default_it_saves_after_each_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit |= {"checkpoint_every": None, "keep_checkpoints": 9}
    run.go()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000004",
        "step-00000006",
    ]


def test_the_very_objects_may_go_on(tmp_path: Path) -> None:
    """As in a notebook: Ctrl-C, then the same cell again, with `resume=True`."""
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    for run in (whole, parts):
        run.loss = arcface()
        run.finetuner["callbacks"] = [WeightAverage(0.9)]
    expected = whole.go(never())
    with pytest.raises(KeyboardInterrupt):
        parts.go(At(3, send(signal.SIGINT)))
    assert parts.go(never()) == expected
    assert_same(parts.tower, whole.tower)
    assert_same(parts.loss, whole.loss)


def test_a_run_that_has_ended_ends_again_in_the_same_weights(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    for run in (first, second):
        run.finetuner["callbacks"] = [WeightAverage(0.9), EarlyStopping("gap", patience=9)]
        run.fit |= {"evaluate": quick_evaluation(photos()), "eval_every": 3}
    expected = first.go()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert second.go() == expected
    assert_same(second.tower, first.tower)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_nothing_is_pickled(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for owner, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "dumps"),
        (pickle, "Unpickler"),
        (pickle, "Pickler"),
        (torch, "load"),
        (torch, "save"),
    ]:
        monkeypatch.setattr(owner, name, refuse)
    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    for run in (whole, part, rest):
        KINDS["evaluations and callbacks"](run)
        run.loss = arcface()
    expected = whole.go(never())
    with pytest.raises(Killed):
        part.go(At(5, kill))
    assert rest.go(never()) == expected
    files = {path.name for path in tmp_path.glob("*/step-*/*")}
    assert {name.rpartition(".")[2] for name in files} == {"safetensors", "json"}


def test_a_first_step_that_fails_leaves_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """Not those from before the run."""
    part, rest = Run(tmp_path), Run(tmp_path)
    with pytest.raises(Killed):
        part.go(At(4, kill))
    saved = newest_checkpoint(tmp_path)
    assert saved.step == 2

    class Broken(AllPairsCosineLoss):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            return super().forward(embeddings, labels) * float("nan")

    Broken.__qualname__ = "AllPairsCosineLoss"
    rest.loss = Broken(negatives="squared", positive_fraction=0.5)
    with pytest.raises(FloatingPointError, match=r"Stopped at step 3 of 6: .* had before"):
        rest.go(never())
    for name, value in saved.weights().items():
        assert value.equal(rest.tower.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resume": True}, ValueError, "`resume` needs a `checkpoint_dir` to resume from"),
        ({"checkpoint_every": 2}, ValueError, "`checkpoint_every` 2 would be ignored: there is no"),
        ({"keep_checkpoints": 0}, ValueError, "`keep_checkpoints` must be at least 1, got 0"),
        ({"keep_checkpoints": 5}, ValueError, "`keep_checkpoints` 5 would be ignored"),
        ({"checkpoint_dir": "x", "checkpoint_every": 0}, ValueError, "`checkpoint_every` must be"),
        ({"checkpoint_dir": "x", "checkpoint_every": 1.5}, TypeError, "`checkpoint_every` must be"),
    ],
)
def test_arguments_that_do_not_fit_together(
    tmp_path: Path, monkeypatch, arguments: dict[str, Any], error: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run()
    run.fit |= arguments
    with pytest.raises(error, match=message):
        run.go()
    assert list(tmp_path.iterdir()) == []
