"""Interrupted and resumed: the bits of a run that nothing happened to, or a refusal in words."""

import copy
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import killable
import numpy as np
import pytest
import safetensors.torch
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
from torchvision import transforms

import pairclip._loop
from pairclip import (
    AllPairsCosineLoss,
    Callback,
    ClassBalancedSampler,
    CollapseMonitor,
    CosinePairLoss,
    EarlyStopping,
    Finetuner,
    PairSampler,
    Tracker,
    VisionTower,
    WeightAverage,
    all_pairs_cosine_loss,
    load_tower,
    newest_checkpoint,
)
from pairclip._saving import identity_of
from pairclip.callbacks import FitState
from pairclip.towers import random_tower

LOSS = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)


class Killed(BaseException):
    """Ends a fit where nothing catches it; `finally` clauses run, in which nothing may be saved."""


class At(Callback):
    """Does something after one step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._when = step
        self._action = action

    def on_step(self, fit: FitState) -> None:
        if fit.step == self._when:
            self._action()


def kill() -> None:
    raise Killed


def send(*numbers: int) -> Callable[[], None]:
    def action() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return action


def never() -> At:
    return At(-1, kill)


@pytest.fixture(autouse=True)
def quick_evaluations(monkeypatch) -> None:
    def quick(tower: VisionTower, dataset: Any, workers: Any) -> SimpleNamespace:
        return SimpleNamespace(**killable.QuickEvaluation(tower, dataset).figures)

    monkeypatch.setattr(pairclip._loop, "_evaluation", quick)


def photos() -> tuple[np.ndarray, list[int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3))
    labels = [0, 1, 2] * 8
    pixels[range(24), :, :, labels] //= 2
    return pixels.astype(np.uint8), labels


def plain_tower(
    *, size: int = 8, activation: nn.Module | None = None, flips: bool = True
) -> VisionTower:
    """Small, with dropout and batch norm, and with a random transform."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.BatchNorm1d(16),
        activation or nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(16, size),
    )
    preprocess = [transforms.Resize((8, 8)), transforms.RandomHorizontalFlip(0.5 * flips)]
    return load_tower(
        module, image_processor=transforms.Compose([*preprocess, transforms.ToTensor()])
    )


class Settings:
    """A fit, to be changed before it is done."""

    runs = 0

    def __init__(self, directory: Path | None = None) -> None:
        self.tower = plain_tower()
        self.loss: Any = LOSS
        self.data: Any = photos()
        self.finetuner: dict[str, Any] = {"learning_rate": 1e-3}
        self.fit: dict[str, Any] = {"batch_size": 6, "max_steps": 6}
        if directory is not None:
            self.fit |= {"checkpoint_dir": directory, "checkpoint_every": 2, "resume": True}

    def run(self, *more: Callback) -> Any:
        # Nothing of a run may follow from what the program drew before it.
        Settings.runs += 1
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(Settings.runs)
        settings = {**self.finetuner, "callbacks": [*self.finetuner.get("callbacks", ()), *more]}
        return Finetuner(self.tower, self.loss, **settings).fit(self.data, **self.fit)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert value.equal(found.state_dict()[name]), name


# --- Killed ---------------------------------------------------------------------------------------


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


def of_any_kind(**changes: Any) -> Callable[[Settings], None]:
    def change(settings: Settings) -> None:
        for name, value in changes.items():
            value = value() if callable(value) and name != "optimizer" else value
            if name in ("loss", "tower", "data"):
                setattr(settings, name, value)
            elif name in ("sampler", "eval_every", "max_steps", "epochs", "eval_dataset"):
                settings.fit[name] = value
            else:
                settings.finetuner[name] = value
        if "sampler" in changes:
            del settings.fit["batch_size"]

    return change


def arcface() -> nn.Module:
    torch.manual_seed(5)
    return pml.ArcFaceLoss(num_classes=3, embedding_size=8)


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
        eval_dataset=photos,
        eval_every=2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_any_kind_ends_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    whole = Settings(tmp_path / "whole")
    KINDS[kind](whole)
    expected = whole.run(never())
    for number, steps in enumerate([(1,), (3, 5), (4,)]):
        for step in (*steps, -1):
            part = Settings(tmp_path / f"{number}")
            KINDS[kind](part)
            try:
                found = part.run(At(step, kill))
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

    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    whole.tower, part.tower, rest.tower = adapted(), adapted(), adapted()
    expected = whole.run(never())
    with pytest.raises(Killed):
        part.run(At(3, kill))
    assert rest.run(never()) == expected
    assert_same(rest.tower, whole.tower)


def test_workers_and_how_often_it_saves_may_change(tmp_path: Path) -> None:
    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    expected = whole.run(never())
    part.fit |= {"num_workers": 1}
    with pytest.raises(Killed):
        part.run(At(3, kill))
    rest.fit |= {"num_workers": 0, "checkpoint_every": 5, "keep_checkpoints": 1}
    assert rest.run(never()) == expected
    assert_same(rest.tower, whole.tower)


def test_by_default_it_saves_after_each_epoch(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    settings.fit |= {"checkpoint_every": None, "keep_checkpoints": 9}
    settings.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_the_very_objects_may_go_on(tmp_path: Path) -> None:
    """As in a notebook: Ctrl-C, then the same cell again, with `resume=True`."""
    whole, parts = Settings(tmp_path / "whole"), Settings(tmp_path / "parts")
    for settings in (whole, parts):
        settings.loss = arcface()
        settings.finetuner["callbacks"] = [WeightAverage(0.9)]
    expected = whole.run(never())
    with pytest.raises(KeyboardInterrupt):
        parts.run(At(3, send(signal.SIGINT)))
    assert parts.run(never()) == expected
    assert_same(parts.tower, whole.tower)
    assert_same(parts.loss, whole.loss)


def test_a_run_that_has_ended_ends_again_in_the_same_weights(tmp_path: Path) -> None:
    first, second = Settings(tmp_path), Settings(tmp_path)
    for settings in (first, second):
        settings.finetuner["callbacks"] = [WeightAverage(0.9), EarlyStopping("gap", patience=9)]
        settings.fit |= {"eval_dataset": photos(), "eval_every": 3}
    expected = first.run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert second.run() == expected
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
    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    for settings in (whole, part, rest):
        KINDS["evaluations and callbacks"](settings)
        settings.loss = arcface()
    expected = whole.run(never())
    with pytest.raises(Killed):
        part.run(At(5, kill))
    assert rest.run(never()) == expected
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {name.rpartition(".")[2] for name in files} == {"safetensors", "json"}


def test_a_first_step_that_fails_leaves_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """Not those from before the run."""
    part, rest = Settings(tmp_path), Settings(tmp_path)
    with pytest.raises(Killed):
        part.run(At(4, kill))
    saved = newest_checkpoint(tmp_path)
    assert saved.step == 2

    class Broken(AllPairsCosineLoss):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            return super().forward(embeddings, labels) * float("nan")

    Broken.__qualname__ = "AllPairsCosineLoss"
    rest.loss = Broken(negatives="squared", positive_fraction=0.5)
    with pytest.raises(FloatingPointError, match=r"Stopped at step 3 of 6: .* had before"):
        rest.run(never())
    for name, value in saved.weights().items():
        assert value.equal(rest.tower.state_dict()[name]), name


# --- Signals --------------------------------------------------------------------------------------


@contextmanager
def ends_with(number: int) -> Iterator[None]:
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        yield
    expected = (KeyboardInterrupt, ()) if number == signal.SIGINT else (SystemExit, (143,))
    assert (caught.type, caught.value.args) == expected


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def number(request) -> int:
    return request.param


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    """And are the usual ones before: pytest may itself run where Ctrl-C is ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    after = {number: signal.getsignal(number) for number in usual}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == usual


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path: Path, number: int, step: int) -> None:
    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    for settings in (whole, part, rest):
        settings.finetuner["callbacks"] = [WeightAverage(0.9), EarlyStopping("gap", patience=9)]
        settings.fit |= {"eval_dataset": photos(), "eval_every": 2, "checkpoint_every": 5}
        settings.fit["keep_checkpoints"] = 9
        settings.tower = plain_tower(flips=False)
    expected = whole.run(never())
    part.tower.model[2].eval()
    with ends_with(number):
        part.run(At(step, send(number)))
    assert (part.tower.model[1].training, part.tower.model[2].training) == (True, False)
    assert newest_checkpoint(tmp_path / "parts").step == step
    assert rest.run(never()) == expected
    assert_same(rest.tower, whole.tower)
    # The evaluation that the signal prevented is in the checkpoint of its step, if it was due.
    figures = {
        path.name: json.loads((path / "manifest.json").read_text())["figure"]
        for path in (tmp_path / "parts").iterdir()
    }
    if step == 6:
        assert figures["step-00000006"] == expected.evaluations[-1]["mean_average_precision"]


def test_an_evaluation_that_draws_draws_the_same_after_a_signal(tmp_path: Path) -> None:
    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    for settings in (whole, part, rest):
        settings.fit |= {"eval_dataset": photos(), "eval_every": 4}
    expected = whole.run(never())
    with pytest.raises(SystemExit):
        part.run(At(4, send(signal.SIGTERM)))
    assert rest.run(never()) == expected


class Evaluated(Callback):
    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._when = step
        self._action = action

    def on_evaluation(self, fit: FitState) -> None:
        if fit.step == self._when:
            self._action()


@pytest.mark.parametrize(("step", "saved"), [(2, 3), (4, 5), (6, 6)])
def test_a_signal_during_an_evaluation(tmp_path: Path, number: int, step: int, saved: int) -> None:
    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    for settings in (whole, part, rest):
        settings.fit |= {"eval_dataset": photos(), "eval_every": 2, "checkpoint_every": 5}
        settings.finetuner["callbacks"] = [WeightAverage(0.9)]
        settings.tower = plain_tower(flips=False)
    expected = whole.run(Evaluated(-1, kill))
    with ends_with(number):
        part.run(Evaluated(step, send(number)))
    assert newest_checkpoint(tmp_path / "parts").step == saved
    assert rest.run(Evaluated(-1, kill)) == expected
    assert_same(rest.tower, whole.tower)


def test_a_signal_while_a_checkpoint_is_written(tmp_path: Path, number: int, monkeypatch) -> None:
    serialize_file, left = safetensors.torch.serialize_file, [2]

    def interrupted(tensors: Any, path: Path, **options: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)
        serialize_file(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "serialize_file", interrupted)
    settings = Settings(tmp_path)
    settings.fit["keep_checkpoints"] = 9
    with ends_with(number):
        settings.run()
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3"]
    assert newest_checkpoint(tmp_path).step == 3


def test_a_signal_in_the_step_that_a_callback_stops_at(tmp_path: Path, number: int) -> None:
    class Stop(Callback):
        def on_step(self, fit: FitState) -> None:
            if fit.step == 3:
                fit.stop("enough")

    whole, part, rest = (Settings(tmp_path / name) for name in ("whole", "parts", "parts"))
    for settings in (whole, part, rest):
        settings.finetuner["callbacks"] = [Stop(), WeightAverage(0.9)]
        settings.fit |= {"eval_dataset": photos(), "eval_every": 5}
        settings.tower = plain_tower(flips=False)
    expected = whole.run(never())
    assert [evaluation["step"] for evaluation in expected.evaluations] == [3]
    with ends_with(number):
        part.run(At(3, send(number)))
    assert rest.run(never()) == expected
    assert_same(rest.tower, whole.tower)


def test_a_signal_after_the_last_step_stops_the_program_too(tmp_path: Path, number: int) -> None:
    class End(Callback):
        def on_fit_end(self, fit: FitState) -> None:
            os.kill(os.getpid(), number)

    whole, part = Settings(tmp_path / "whole"), Settings(tmp_path / "part")
    whole.run()
    with ends_with(number):
        part.run(End())
    assert newest_checkpoint(tmp_path / "part").step == 6
    assert_same(part.tower, whole.tower)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path, number: int) -> None:
    reached = []
    settings = Settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        settings.run(At(3, send(number, signal.SIGINT)), At(3, lambda: reached.append(3)))
    assert reached == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_repeated_sigterm_is_the_same_wish(tmp_path: Path, number: int) -> None:
    """One to a whole job comes to each process twice: torchrun forwards its own."""
    with ends_with(number):
        Settings(tmp_path).run(At(3, send(number, signal.SIGTERM, signal.SIGTERM)))
    assert newest_checkpoint(tmp_path).step == 3


def test_a_second_ctrl_c_while_saving_leaves_no_half_checkpoint(
    tmp_path: Path, number: int, monkeypatch
) -> None:
    serialize_file = safetensors.torch.serialize_file

    def interrupted(tensors: Any, path: Path, **options: Any) -> None:
        serialize_file(tensors, path, **options)
        os.kill(os.getpid(), signal.SIGINT)

    settings = Settings(tmp_path)
    settings.fit["checkpoint_every"] = 6
    monkeypatch.setattr(safetensors.torch, "serialize_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        settings.run(At(3, send(number)))
    assert list(tmp_path.iterdir()) == []


def test_without_checkpoints_signals_are_left_alone(number: int) -> None:
    caught: list[tuple[int, int]] = []
    before = signal.signal(number, lambda received, frame: caught.append((received, len(seen))))
    seen: list[int] = []
    try:
        settings = Settings()
        settings.run(At(2, send(number)), At(2, lambda: seen.append(2)))
        assert caught == [(number, 0)]
    finally:
        signal.signal(number, before)


def test_handlers_of_others_are_put_back(tmp_path: Path, number: int) -> None:
    def own(received: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(number, own)
    try:
        for name, action, error in [
            ("good", lambda: None, None),
            ("bad", kill, Killed),
            ("stopped", send(number), (SystemExit, KeyboardInterrupt)),
        ]:
            settings = Settings(tmp_path / name)
            if error is None:
                settings.run(At(2, action))
            else:
                with pytest.raises(error):
                    settings.run(At(2, action))
            assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_what_is_ignored_stays_ignored(tmp_path: Path, number: int) -> None:
    """As after nohup, or in a script's background job, which a Ctrl-C is not for."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert len(Settings(tmp_path).run(At(3, send(number))).steps) == 6
    except (KeyboardInterrupt, SystemExit) as error:
        pytest.fail(f"it was obeyed: {error!r}")
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_in_another_thread(tmp_path: Path, workers: int) -> None:
    whole, other = Settings(tmp_path / "whole"), Settings(tmp_path / "thread")
    other.fit["num_workers"] = workers
    expected, found = whole.run(), []

    def work() -> None:
        found.append(other.run())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [expected]
    assert_same(other.tower, whole.tower)
    assert newest_checkpoint(tmp_path / "thread").step == 6


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
    assert fits.run(**job, kill={"stalled": 4}, seconds=12) == 128 + signal.SIGINT
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


# --- Refused --------------------------------------------------------------------------------------


def refusable(directory: Path) -> Settings:
    settings = Settings(directory)
    settings.tower.model[1].requires_grad_(False)
    settings.fit |= {"max_steps": 2}
    settings.finetuner |= {"callbacks": [WeightAverage(0.9), EarlyStopping("gap", patience=5)]}
    settings.fit |= {"eval_dataset": photos(), "sampler": sampler_of(seed=0)}
    del settings.fit["batch_size"]
    return settings


def sampler_of(*, seed: int, classes: int = 3) -> ClassBalancedSampler:
    return ClassBalancedSampler(photos()[1], classes, 2, seed=seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("refused")
    refusable(directory).run()
    return directory


def tower_like(change: Callable[[VisionTower], object], **settings: Any) -> Callable:
    def apply(of: Settings) -> None:
        of.tower = plain_tower(**settings)
        of.tower.model[1].requires_grad_(False)
        change(of.tower)

    return apply


def other_images(of: Settings) -> None:
    of.data = (255 - photos()[0], photos()[1])


def one_more(of: Settings) -> None:
    pixels, labels = photos()
    of.data = (np.concatenate([pixels, pixels[:3]]), [*labels, 0, 1, 2])
    of.fit["sampler"] = sampler_of(seed=0)


def names(of: Settings) -> None:
    of.data = (photos()[0], ["abc"[label] for label in photos()[1]])


def other_labels(of: Settings) -> None:
    labels = photos()[1]
    of.data = (photos()[0], [labels[1], labels[0], *labels[2:]])


def setting(**changes: Any) -> Callable[[Settings], None]:
    def apply(of: Settings) -> None:
        of.finetuner |= changes
        if "optimizer" in changes:
            del of.finetuner["learning_rate"]

    return apply


def loss(value: Any) -> Callable[[Settings], None]:
    return lambda of: setattr(of, "loss", value)


def fitting(**changes: Any) -> Callable[[Settings], None]:
    return lambda of: of.fit.update(changes)


def with_noise(tower: VisionTower) -> None:
    with torch.no_grad():
        tower.model[1].weight[0, 0] += 1e-6


def other_preprocess(tower: VisionTower) -> None:
    inner = tower.preprocess
    tower.preprocess = lambda image: inner(image) * 0.5


REFUSED = [
    # Another model.
    ("wider", tower_like(lambda t: None, size=9), "model.trained weights is"),
    ("another class", lambda of: setattr(of, "tower", clip_tower()), "model.class is 'Seq"),
    ("frozen weights", tower_like(with_noise), "model.frozen weights is"),
    ("all train", tower_like(lambda t: t.requires_grad_(True)), "model.frozen weights is"),
    ("others frozen", tower_like(lambda t: t.model[5].requires_grad_(False)), "model.trained w"),
    ("activation", tower_like(lambda t: None, activation=nn.ReLU()), "model."),
    # Another dataset.
    ("count", one_more, "dataset.images is 24 there and 27 here"),
    ("labels", other_labels, "dataset.labels is"),
    ("class names", names, r"dataset.class names is None there and \['a', 'b', 'c'\] here"),
    ("images", other_images, "dataset.some images, preprocessed is"),
    ("preprocess", tower_like(other_preprocess), "dataset.some images, preprocessed is"),
    # Another configuration.
    (
        "another loss",
        loss(AllPairsCosineLoss(negatives="linear")),
        "configuration.loss.*squared.* there and .*linear",
    ),
    ("no module", loss(all_pairs_cosine_loss), "configuration.loss.*all_pairs_cosine_loss"),
    ("rate", setting(learning_rate=2e-3), r"configuration.*0\.001.* there and .*0\.002"),
    ("decay", setting(weight_decay=0.3), r"configuration\..*0\.3"),
    ("warm-up", setting(warmup_ratio=0.5), r"warmup_ratio is 0\.1 there and 0\.5 here"),
    ("schedule", setting(schedule="linear"), "schedule is 'cosine' there and 'linear' here"),
    ("clipping", setting(max_grad_norm=None), r"max_grad_norm is 1\.0 there and None here"),
    ("seed", setting(seed=1), "configuration.seed is 0 there and 1 here"),
    ("precision", setting(precision="bf16"), "precision is 'no' there and 'bf16' here"),
    (
        "optimizer",
        setting(optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-3)),
        "configuration.optimizer.*AdamW.* there and .*SGD",
    ),
    ("steps", fitting(max_steps=3), "configuration.steps is 2 there and 3 here"),
    (
        "sampler",
        fitting(sampler=sampler_of(seed=0, classes=2)),
        "configuration.sampler.*3.* there and .*2",
    ),
    ("seed of sampler", fitting(sampler=sampler_of(seed=1)), "configuration.sampler"),
    (
        "another sampler",
        fitting(sampler=BatchSampler(SequentialSampler(range(24)), 6, drop_last=True)),
        "configuration.sampler.*ClassBalancedSampler.* there and .*BatchSampler",
    ),
    (
        "one callback less",
        setting(callbacks=[WeightAverage(0.9)]),
        "configuration.callbacks",
    ),
    (
        "order of callbacks",
        setting(callbacks=[EarlyStopping("gap", patience=5), WeightAverage(0.9)]),
        "configuration.callbacks",
    ),
    (
        "decay of average",
        setting(callbacks=[WeightAverage(0.5), EarlyStopping("gap", patience=5)]),
        "0.9.* there and .*0.5",
    ),
    (
        "figure of early stop",
        setting(callbacks=[WeightAverage(0.9), EarlyStopping("recall_at_1", patience=5)]),
        "gap.* there and .*recall_at_1",
    ),
]


def clip_tower(*, heads: int = 2, activation: str = "quick_gelu") -> VisionTower:
    sizes = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "embedding_dim": 8}
    return random_tower(**sizes, heads=heads, hidden_act=activation)


@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(*case, id=name) for name, *case in REFUSED],
)
def test_a_checkpoint_of_another_run_is_refused(saved: Path, change: Any, message: str) -> None:
    settings = refusable(saved)
    change(settings)
    files = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    before = copy.deepcopy(settings.tower.state_dict())
    with pytest.raises(
        ValueError, match=rf"^Checkpoint '.*step-00000002' is of another run: .*{message}.*\. Use"
    ):
        settings.run()
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == files
    for name, value in settings.tower.state_dict().items():
        assert value.equal(before[name]), name


def test_the_same_run_is_not_refused(saved: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    assert len(refusable(saved).run().steps) == 2
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == files


def test_a_callback_that_only_watches_may_be_another(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run")
    settings.fit |= {"max_steps": 1}
    for threshold, folder in ((0.9, "a"), (0.5, "b")):
        settings.finetuner["callbacks"] = [
            CollapseMonitor(threshold),
            Tracker("tensorboard", tmp_path / folder),
        ]
        assert len(settings.run().steps) == 1
    settings.finetuner["callbacks"].pop()
    with pytest.raises(ValueError, match=r"configuration\.callbacks"):
        settings.run()


@pytest.mark.parametrize("change", [{"heads": 4}, {"activation": "gelu"}])
def test_another_architecture_with_the_same_shapes_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    first, second = Settings(tmp_path), Settings(tmp_path)
    first.tower, second.tower = clip_tower(), clip_tower(**change)
    for settings in (first, second):
        settings.fit["max_steps"] = 1
    first.run()
    with pytest.raises(ValueError, match="is of another run: model"):
        second.run()


def squared(embeddings: Tensor, labels: Tensor, power: float = 1.0) -> Tensor:
    return LOSS(embeddings, labels) ** power


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (CosinePairLoss(), CosinePairLoss(negatives="squared"), "linear.* there and .*squared"),
        (
            CosinePairLoss(negatives="hinge", margin=0.1),
            CosinePairLoss(negatives="hinge", margin=0.2),
            r"margin.*0\.1.* there and .*0\.2",
        ),
        (arcface, lambda: pml.ArcFaceLoss(num_classes=3, embedding_size=8, margin=10), ""),
        (arcface, lambda: pml.CosFaceLoss(num_classes=3, embedding_size=8), "ArcFace.*CosFace"),
        (
            lambda: pml.TripletMarginLoss(margin=0.1),
            lambda: pml.TripletMarginLoss(margin=0.1, swap=True),
            "swap.*False.* there and .*True",
        ),
        (lambda: partial(squared, power=1.0), lambda: partial(squared, power=2.0), "power"),
    ],
)
def test_a_loss_with_other_settings_is_refused(
    tmp_path: Path, there: Any, here: Any, message: str
) -> None:
    first, second = Settings(tmp_path), Settings(tmp_path)
    first.loss, second.loss = (x if isinstance(x, nn.Module) else x() for x in (there, here))
    for settings in (first, second):
        settings.fit["max_steps"] = 1
    first.run()
    with pytest.raises(ValueError, match=rf"configuration\.loss.*{message}"):
        second.run()


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (
            lambda: BatchSampler(RandomSampler(range(24)), 6, drop_last=True),
            lambda: BatchSampler(SequentialSampler(range(24)), 6, drop_last=True),
        ),
        (lambda: PairSampler(photos()[1], 3), lambda: PairSampler(photos()[1], 3, seed=1)),
        (
            lambda: PairSampler(photos()[1], 4),
            lambda: PairSampler(photos()[1], 4, positive_fraction=0.25),
        ),
    ],
)
def test_another_sampler_is_refused(tmp_path: Path, there: Any, here: Any) -> None:
    first, second = Settings(tmp_path), Settings(tmp_path)
    first.fit |= {"sampler": there(), "max_steps": 1}
    second.fit |= {"sampler": here(), "max_steps": 1}
    for settings in (first, second):
        del settings.fit["batch_size"]
    first.run()
    with pytest.raises(ValueError, match=r"configuration\.sampler"):
        second.run()


@contextmanager
def warns_of_own_generators() -> Iterator[None]:
    with pytest.warns(UserWarning, match="a transform draws from a generator of its own") as caught:
        yield
    assert len(caught) == 1


def test_a_transform_with_a_generator_of_its_own_is_said_and_not_refused(tmp_path: Path) -> None:
    for steps in (1, 2):
        settings = Settings(tmp_path)
        inner, chance = settings.tower.preprocess, np.random.default_rng()
        settings.tower.preprocess = lambda image, inner=inner, chance=chance: (
            inner(image) * chance.random()
        )
        with warns_of_own_generators(), pytest.raises(Killed) if steps == 1 else nullcontext():
            history = settings.run(At(3 if steps == 1 else -1, kill))
    assert len(history.steps) == 6


def test_a_generator_that_has_drawn_is_another_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    settings = Settings(tmp_path)
    sampler = RandomSampler(range(24), generator=generator)
    settings.fit |= {"sampler": BatchSampler(sampler, 6, drop_last=True)}
    del settings.fit["batch_size"]
    with pytest.raises(Killed):
        settings.run(At(3, kill))
    with pytest.raises(ValueError, match=r"configuration\.sampler is .*generator="):
        settings.run(never())
    generator.manual_seed(4)
    assert len(settings.run(never()).steps) == 6


def scripted_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return (embeddings * embeddings).sum()


def test_a_scripted_loss_is_a_loss() -> None:
    settings = Settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        settings.loss = torch.jit.script(scripted_loss)
    assert len(settings.run().steps) == 6


def momentum_in_group(momentum: float) -> Any:
    return lambda ps: torch.optim.SGD([{"params": ps, "momentum": momentum}], lr=0.01)


def test_other_settings_of_a_parameter_group_are_refused(tmp_path: Path) -> None:
    for momentum in (0.1, 0.9):
        settings = Settings(tmp_path)
        settings.finetuner = {"optimizer": momentum_in_group(momentum)}
        settings.fit["max_steps"] = 1
        if momentum == 0.1:
            settings.run()
    with pytest.raises(ValueError, match=r"configuration\..*momentum.*0\.1.* there and .*0\.9"):
        settings.run()


def test_all_that_differs_is_named(saved: Path) -> None:
    settings = refusable(saved)
    other_images(settings)
    settings.finetuner |= {"seed": 3, "schedule": "constant"}
    with pytest.raises(ValueError, match=r"images, preproc.*; .*schedule is 'cosine'.*; .*seed is"):
        settings.run()


def test_checkpoints_are_not_trained_over(saved: Path) -> None:
    settings = refusable(saved)
    settings.fit["resume"] = False
    with pytest.raises(
        ValueError,
        match=rf"`checkpoint_dir` '{saved}' has checkpoints up to step 2 already.*resume=True",
    ):
        settings.run()


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
    settings = Settings()
    settings.fit |= arguments
    with pytest.raises(error, match=message):
        settings.run()
    assert list(tmp_path.iterdir()) == []


def test_the_images_that_are_looked_at_are_in_the_largest_dataset_too() -> None:
    """2**24 + 4 images: float32 would round their last index up, beyond the end."""
    looked_at: list[int] = []

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return 2**24 + 4

    class Items:
        data = Data(labels=torch.zeros(1), class_names=None)

        def __getitems__(self, keys: Any) -> list[Any]:
            looked_at.extend(key.item for key in keys)
            return [(torch.zeros(1), 0)] * len(keys)

    run = SimpleNamespace(
        tower=plain_tower(), optimizer=SimpleNamespace(param_groups=[]), peak_rates=[]
    )
    identity_of(run, Items(), {}, [])
    assert looked_at[0] == 0
    assert looked_at[-1] == 2**24 + 3
