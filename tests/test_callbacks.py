"""Callbacks: early stop, averaged weights, trackers, the monitor, and what a fit calls when."""

import copy
import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.tracking import GeneralTracker
from hypothesis import given, settings, strategies as st
from pytorch_metric_learning import losses as pml
from quick import quick_evaluation
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import transforms

from pairclip import (
    AllPairsCosineLoss,
    Callback,
    CollapseMonitor,
    EarlyStopping,
    Finetuner,
    Tracker,
    VisionTower,
    WeightAverage,
    best_checkpoint,
    evaluate,
    load_tower,
)
from pairclip.callbacks import FitState
from pairclip.callbacks.collapse import _different_mean

LOSS = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)


class Killed(Exception):
    """A fit ends where no callback and no checkpoint can do anything about it."""


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self._when = step

    def on_step(self, fit: FitState) -> None:
        if fit.step == self._when:
            raise Killed


class Weights(Callback):
    """Copies of the parameters after each step, and as each evaluation saw them."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.steps: list[list[Tensor]] = []
        self.evaluations: dict[int, list[Tensor]] = {}

    def on_fit_start(self, fit: FitState) -> None:
        self.parameters = fit.parameters
        self.steps.append(copies(fit.parameters))

    def on_step(self, fit: FitState) -> None:
        self.steps.append(copies(fit.parameters))

    def on_evaluation(self, fit: FitState) -> None:
        self.evaluations[fit.step] = copies(fit.parameters)


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def plain() -> VisionTower:
    """A tower with batch norm and dropout, for the 16 x 16 images."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 12)
    )
    preprocess = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    return load_tower(module, image_processor=preprocess)


def fit(tower: VisionTower, images: Any, *callbacks: Callback, loss: Any = LOSS, **arguments: Any):
    arguments = {"batch_size": 12, **arguments}
    if arguments.get("eval_every") and "eval_dataset" not in arguments:
        arguments = {"evaluate": quick_evaluation(images), **arguments}
    finetuner = Finetuner(tower, loss, learning_rate=1e-3, callbacks=callbacks)
    return finetuner.fit(images, **arguments)


@pytest.fixture
def scripted(images) -> Callable[..., Any]:
    """Makes an evaluation that gives the values of a list, one after the other."""

    def script(values: Sequence[object], metric: str = "mean_average_precision") -> Any:
        evaluate, left = quick_evaluation(images), iter(values)
        return lambda tower: {**evaluate(tower), metric: next(left)}

    return script


# --- The protocol ---------------------------------------------------------------------------------


def test_a_callback_that_has_one_method_is_one(plain, images) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_step(self, fit: FitState) -> None:
            self.seen.append(fit.steps[-1]["loss"])

    losses = Losses()
    history = fit(plain, images, losses, max_steps=3)
    assert losses.seen == [step["loss"] for step in history.steps]


def test_calls_come_in_order(plain, images, tmp_path: Path) -> None:
    calls: list[str] = []

    class Recorder:
        """Has the methods without inheriting them."""

        def __init__(self, name: str) -> None:
            self.name = name

        def say(self, what: str, fit: FitState | None = None) -> None:
            calls.append(f"{what}{'' if fit is None else fit.step}{self.name}")

        def on_fit_start(self, fit: FitState) -> None:
            self.say("start", fit)

        def on_step(self, fit: FitState) -> None:
            self.say("step", fit)

        def on_evaluation(self, fit: FitState) -> None:
            self.say("evaluation", fit)

        def on_fit_end(self, fit: FitState) -> None:
            self.say("end", fit)

        def state_dict(self) -> dict[str, Any]:
            self.say("state")
            return {"name": self.name}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert state == {"name": self.name}
            self.say("load")

    arguments = {"max_steps": 3, "eval_every": 2, "checkpoint_dir": tmp_path, "checkpoint_every": 3}
    both = [Recorder("a"), Recorder("b")]
    fit(plain, images, *both, **arguments)
    steps = ["start0", "step1", "step2", "evaluation2", "step3", "evaluation3", "state", "end3"]
    assert calls == [f"{call}{name}" for call in steps for name in "ab"]
    calls.clear()
    fit(plain, images, *both, **arguments, resume=True)
    assert calls == ["loada", "loadb", "start3a", "start3b", "end3a", "end3b"]


def test_what_a_callback_sees(plain, images) -> None:
    seen = []

    class Look(Callback):
        def on_fit_start(self, fit: FitState) -> None:
            assert fit.tower is plain
            assert (fit.num_steps, fit.step, fit.evaluates) == (2, 0, True)
            assert fit.config["loss"].startswith("AllPairsCosineLoss(negatives=squared")

        def on_step(self, fit: FitState) -> None:
            embeddings = fit.embeddings.clone().requires_grad_()
            loss = LOSS(embeddings, fit.labels)
            loss.backward()
            assert_close(fit.gradient, embeddings.grad)
            assert loss.item() == pytest.approx(fit.steps[-1]["loss"])
            assert not fit.embeddings.requires_grad
            assert (fit.embeddings.dtype, fit.labels.dtype) == (torch.float32, torch.int64)
            assert fit.steps[-1]["step"] == fit.step
            seen.append(fit.labels.bincount().tolist())

        def on_evaluation(self, fit: FitState) -> None:
            assert fit.evaluations[-1]["step"] == fit.step == 2

    fit(plain, images, Look(), max_steps=2, eval_every=2)
    assert seen == [[4, 4, 4]] * 2


@pytest.mark.parametrize("callback", [print, object(), EarlyStopping, None])
def test_what_is_no_callback_is_refused(tower, callback: object) -> None:
    with pytest.raises(TypeError, match=r"`callbacks` must have the methods of `pairclip\.Callb"):
        Finetuner(tower, LOSS, callbacks=[callback])


@pytest.mark.parametrize("where", ["on_step", "on_evaluation"])
def test_a_callback_that_stops_a_fit(plain, images, tmp_path: Path, where: str) -> None:
    class Stop(Callback):
        pass

    setattr(Stop, where, lambda self, fit: fit.stop("enough") if fit.step == 2 else None)
    arguments = {"max_steps": 9, "eval_every": 2, "checkpoint_dir": tmp_path, "checkpoint_every": 9}
    history = fit(plain, images, Stop(), **arguments)
    assert (len(history.steps), history.stop_reason) == (2, "enough")
    assert [e["step"] for e in history.evaluations] == [2]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]
    assert fit(plain, images, Stop(), **arguments, resume=True) == history


def test_after_an_error_the_end_is_not_called(plain, images) -> None:
    ended = []

    class End(Callback):
        def on_fit_end(self, fit: FitState) -> None:
            ended.append(fit.step)

    with pytest.raises(Killed):
        fit(plain, images, End(), KillAt(2), max_steps=3)
    assert ended == []


# --- Early stopping -------------------------------------------------------------------------------


def stops_at(values: Sequence[float], patience: int, min_delta: float, mode: str) -> int:
    """Evaluations until it stops, from the definition: `patience` in a row gain nothing."""
    sign = 1 if mode == "max" else -1
    bests = [0]
    for i, value in enumerate(values[1:], 1):
        if sign * (value - values[bests[-1]]) > min_delta:
            bests.append(i)
        elif i - bests[-1] == patience:
            return i + 1
    return len(values)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 0.0), (3, 0.3), (2, 0.1)])
def test_it_stops_when_nothing_improved_for_long(
    plain, mode: str, patience: int, min_delta: float
) -> None:
    chance = random.Random(patience)
    for _ in range(40):
        values = [chance.randrange(9) / 8 for _ in range(14)]
        callback = EarlyStopping(patience=patience, min_delta=min_delta, mode=mode)
        state = FitState(plain, list(plain.parameters()), None, 14, True, {})
        callback.on_fit_start(state)
        for value in values:
            state.step += 1
            state.evaluations.append({"step": state.step, "mean_average_precision": value})
            callback.on_evaluation(state)
            if state.stop_reason:
                break
        assert state.step == stops_at(values, patience, min_delta, mode), values


@pytest.mark.parametrize(
    ("mode", "values", "best"), [("max", [0.2, 0.5, 0.4, 0.5, 0.9], 2), ("min", [3.0, 1.0] * 3, 2)]
)
def test_it_restores_the_weights_of_the_best_evaluation(
    plain, images, scripted, mode: str, values: list[float], best: int
) -> None:
    weights, buffers = Weights(), []

    class Buffers(Callback):
        def on_evaluation(self, fit: FitState) -> None:
            buffers.append(copies(list(fit.tower.buffers())))

    stopping = EarlyStopping("gap", patience=2, mode=mode)
    each_step = {"evaluate": scripted(values, "gap"), "eval_every": 1}
    history = fit(plain, images, weights, Buffers(), stopping, max_steps=12, **each_step)
    assert len(history.steps) == 4
    assert history.stop_reason == (
        f"gap has not improved on {values[1]:.4f} of step 2 for 2 evaluations"
    )
    assert all_equal(weights.parameters, weights.evaluations[best])
    assert all_equal(list(plain.buffers()), buffers[best - 1])


def test_it_restores_the_best_where_it_never_stops(plain, images, scripted) -> None:
    weights = Weights()
    each_step = {"evaluate": scripted([0.1, 0.9, 0.8, 0.7]), "eval_every": 1}
    history = fit(plain, images, EarlyStopping(), weights, max_steps=4, **each_step)
    assert history.stop_reason is None
    assert all_equal(weights.parameters, weights.evaluations[2])


@pytest.mark.parametrize("order", [1, -1])
def test_with_averaged_weights_it_restores_the_best_averages(
    plain, images, scripted, order: int
) -> None:
    evaluate = scripted([0.1, 0.9, 0.2, 0.3, 0.4])
    weights = Weights()
    callbacks = [WeightAverage(0.9), EarlyStopping(patience=3), weights][::order]
    fit(plain, images, *callbacks, max_steps=20, evaluate=evaluate, eval_every=2)
    assert set(weights.evaluations) == {2, 4, 6, 8, 10}
    assert not all_equal(weights.evaluations[4], weights.steps[4])
    assert all_equal(weights.parameters, weights.evaluations[4])


def test_what_is_restored_evaluates_as_its_best_did(plain, images) -> None:
    callbacks = [WeightAverage(0.8), EarlyStopping("gap", patience=9)]
    history = fit(plain, images, *callbacks, max_steps=12, eval_dataset=images, eval_every=3)
    best = max(history.evaluations, key=lambda evaluation: evaluation["gap"])
    figures = evaluate(plain, images).to_dict()
    assert {key: figures[key] for key in best if key != "step"} == {
        key: value for key, value in best.items() if key != "step"
    }


@pytest.mark.parametrize("figure", ["recall_at_7", "class_names", "step", "num_images"])
def test_a_figure_that_is_none_is_an_error_that_lists_them(plain, images, figure: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{figure}'.*It has recall_at_1, recall_at_5"):
        fit(plain, images, EarlyStopping(figure), max_steps=1, eval_every=1)


def test_a_figure_that_is_not_defined_is_an_error(plain, images, scripted) -> None:
    each_step = {"evaluate": scripted([0.5, math.nan, 0.5], "different_mean"), "eval_every": 1}
    stopping = EarlyStopping("different_mean")
    with pytest.raises(ValueError, match="got 'different_mean', which is None"):
        fit(plain, images, stopping, max_steps=3, **each_step)


def test_it_needs_evaluations(plain, images) -> None:
    with pytest.raises(ValueError, match="`EarlyStopping` needs an `eval_dataset`"):
        fit(plain, images, EarlyStopping(), max_steps=1)


def test_a_second_fit_starts_afresh(plain, images, scripted) -> None:
    evaluate = scripted([0.9, 0.8, 0.1, 0.2, 0.15])
    arguments = {"max_steps": 9, "evaluate": evaluate, "eval_every": 1}
    stopping, weights = EarlyStopping(patience=1), Weights()
    assert len(fit(plain, images, stopping, **arguments).steps) == 2
    assert len(fit(plain, images, stopping, weights, **arguments).steps) == 3
    assert all_equal(weights.parameters, weights.evaluations[2])


@pytest.mark.parametrize("order", [1, -1])
def test_after_it_stopped_a_resumed_fit_does_nothing_more(
    plain, images, scripted, tmp_path: Path, order: int
) -> None:
    arguments = {"max_steps": 9, "eval_every": 1, "checkpoint_dir": tmp_path, "resume": True}
    arguments["evaluate"] = scripted([0.5, 0.9, 0.1, 0.2])
    again = copy.deepcopy(plain)
    callbacks = [EarlyStopping(patience=2), WeightAverage(0.9)]
    history = fit(plain, images, *callbacks[::order], **arguments)
    assert len(history.steps) == 4
    files = sorted(tmp_path.rglob("*"))
    callbacks = [EarlyStopping(patience=2), WeightAverage(0.9)]
    assert fit(again, images, *callbacks[::order], **arguments) == history
    assert sorted(tmp_path.rglob("*")) == files
    assert all_equal(list(again.state_dict().values()), list(plain.state_dict().values()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patience": 0}, ValueError, "`patience` must be at least 1, got 0"),
        ({"patience": 1.5}, TypeError, "`patience` must be an integer, got 1.5"),
        ({"min_delta": -0.1}, ValueError, r"`min_delta` must be in \[0, inf\), got -0\.1"),
        ({"min_delta": math.nan}, ValueError, r"`min_delta` must be in \[0, inf\), got nan"),
        ({"min_delta": "0"}, TypeError, "`min_delta` must be a number, got '0'"),
        ({"mode": "up"}, ValueError, "`mode` must be one of 'max', 'min', got 'up'"),
    ],
)
def test_wrong_settings_of_early_stopping(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        EarlyStopping(**arguments)


# --- Averaged weights -----------------------------------------------------------------------------


def averages_by_hand(steps: Sequence[Sequence[Tensor]], decay: float) -> list[list[Tensor]]:
    """After each step, from the definition, in float64."""
    average = [w.double() for w in steps[0]]
    found = [average]
    for t, weights in enumerate(steps[1:], 1):
        d = min(decay, (1 + t) / (10 + t))
        average = [d * a + (1 - d) * w.double() for a, w in zip(average, weights, strict=True)]
        found.append(average)
    return found


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999])
def test_averages_are_those_of_a_loop_by_hand(plain, images, decay: float) -> None:
    raw, shown = Weights(), Weights()
    loss = pml.ArcFaceLoss(num_classes=3, embedding_size=12)
    callbacks = [raw, WeightAverage(decay), shown]
    fit(plain, images, *callbacks, loss=loss, max_steps=8, eval_every=3)
    expected = averages_by_hand(raw.steps, decay)
    assert {id(p) for p in raw.parameters} == {
        id(p) for module in (plain, loss) for p in module.parameters()
    }
    for step in (3, 6, 8):
        for found, value in zip(shown.evaluations[step], expected[step], strict=True):
            assert_close(found.double(), value, rtol=1e-5, atol=1e-7)
    assert all_equal(raw.parameters, raw.evaluations[8])


def test_training_goes_on_with_the_weights_themselves(plain, images) -> None:
    other = copy.deepcopy(plain)
    averaged, bare = Weights(), Weights()
    history = fit(plain, images, WeightAverage(0.9), averaged, max_steps=6, eval_every=2)
    expected = fit(other, images, bare, max_steps=6, eval_every=2)
    assert history.steps == expected.steps
    for a, b in zip(averaged.steps, bare.steps, strict=True):
        assert all_equal(a, b)
    assert history.evaluations != expected.evaluations
    assert not all_equal(list(plain.parameters()), list(other.parameters()))


def test_evaluations_are_of_what_the_tower_is_left_with(plain, images) -> None:
    history = fit(plain, images, WeightAverage(0.9), max_steps=4, eval_dataset=images)
    figures = evaluate(plain, images).to_dict()
    last = history.evaluations[-1]
    assert {key: figures[key] for key in last if key != "step"} == {
        key: value for key, value in last.items() if key != "step"
    }


def test_an_evaluation_that_fails_puts_the_weights_back(plain, images) -> None:
    def failing(*_: Any) -> None:
        raise Killed

    weights = Weights()
    with pytest.raises(Killed):
        fit(plain, images, WeightAverage(0.9), weights, max_steps=4, evaluate=failing, eval_every=2)
    assert all_equal(weights.parameters, weights.steps[2])


def test_what_is_frozen_is_not_averaged(tower, images) -> None:
    tower.freeze(all_but="projection")
    before = copy.deepcopy(tower)
    callback = WeightAverage(0.5)
    fit(tower, images, callback, max_steps=2)
    assert len(callback.averages) == 1
    changed = {
        name
        for name, value in tower.state_dict().items()
        if not value.equal(before.state_dict()[name])
    }
    assert changed == {"model.visual_projection.weight"}


def test_a_second_fit_averages_from_its_own_start(plain, images) -> None:
    callback, raw = WeightAverage(0.9), Weights()
    fit(plain, images, callback, max_steps=2)
    fit(plain, images, callback, raw, max_steps=2)
    for found, value in zip(callback.averages, averages_by_hand(raw.steps, 0.9)[-1], strict=True):
        assert_close(found.double(), value, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_loads_the_weights_that_its_figure_is_of(
    plain, images, tmp_path: Path
) -> None:
    loaded = copy.deepcopy(plain)
    arguments = {"max_steps": 4, "eval_dataset": images, "checkpoint_dir": tmp_path}
    history = fit(plain, images, WeightAverage(0.99), **arguments)
    best_checkpoint(tmp_path).load_weights(loaded)
    assert evaluate(loaded, images).gap == history.evaluations[-1]["gap"]


@pytest.mark.parametrize(
    ("decay", "error", "message"),
    [
        (1.0, ValueError, r"`decay` must be in \[0, 1\), got 1"),
        (-0.1, ValueError, r"`decay` must be in \[0, 1\), got -0\.1"),
        (math.nan, ValueError, r"`decay` must be in \[0, 1\), got nan"),
        ("0.9", TypeError, "`decay` must be a number, got '0.9'"),
    ],
)
def test_wrong_decays(decay, error, message: str) -> None:
    with pytest.raises(error, match=message):
        WeightAverage(decay)


# --- Trackers -------------------------------------------------------------------------------------


@pytest.fixture
def numbered_from_zero(monkeypatch) -> None:
    """TensorBoard reads files by name, and in one second and process `.10` is before `.9`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.summary.writer import event_file_writer
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars in TensorBoard's files, as TensorBoard reads them: (step, value) in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def expected_log(history: Any, every: int = 1) -> dict[str, list[tuple[int, float]]]:
    log: dict[str, list[tuple[int, float]]] = {}
    for kind, records in (("train", history.steps), ("eval", history.evaluations)):
        for record in records:
            if kind == "train" and record["step"] % every:
                continue
            for name, value in record.items():
                if kind == "eval" or name in ("loss", "learning_rate", "gradient_norm"):
                    log.setdefault(f"{kind}/{name}", []).append((record["step"], value))
    return log


def assert_logged(folder: Path, history: Any, every: int = 1) -> None:
    found, expected = logged(folder), expected_log(history, every)
    assert set(found) >= set(expected) - {"eval/step"}
    for tag, events in found.items():
        assert [step for step, _ in events] == [step for step, _ in expected[tag]], tag
        values = [value for _, value in expected[tag]]
        assert [value for _, value in events] == pytest.approx(values, rel=1e-6), tag


@pytest.mark.parametrize("every", [1, 2])
def test_tensorboard_has_every_step_and_evaluation(plain, images, tmp_path: Path, every) -> None:
    tracker = Tracker("tensorboard", tmp_path, run_name="first", every=every)
    history = fit(plain, images, tracker, max_steps=5, eval_every=2)
    assert_logged(tmp_path / "first", history, every)
    (saved,) = (tmp_path / "first").glob("*/hparams.yml")
    settings = yaml.safe_load(saved.read_text())
    assert settings["loss"].startswith("AllPairsCosineLoss(")
    assert (settings["steps"], settings["learning_rate"]) == (5, 1e-3)


@pytest.mark.parametrize(
    ("kills", "checkpoint_every"), [([6], 4), ([5, 7], 3), ([2], 4), ([3, 8], 5)]
)
def test_a_resumed_run_logs_each_step_once(
    numbered_from_zero, plain, images, tmp_path: Path, kills: list[int], checkpoint_every: int
) -> None:
    arguments = {"max_steps": 9, "eval_every": 2, "resume": True}
    arguments |= {"checkpoint_dir": tmp_path / "saved", "checkpoint_every": checkpoint_every}
    for kill in [*kills, 99]:
        tracker = Tracker("tensorboard", tmp_path / "logs")
        callbacks = [tracker, KillAt(kill)]
        try:
            history = fit(copy.deepcopy(plain), images, *callbacks, **arguments)
        except Killed:
            continue
    assert_logged(tmp_path / "logs" / "pairclip", history)


class Listed(GeneralTracker):
    """Somebody's own tracker."""

    name = "listed"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("configuration", values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_tracker_of_ones_own(plain, images) -> None:
    own = Listed()
    history = fit(plain, images, Tracker(own), max_steps=2, eval_every=2)
    (_, configuration), *logs, finish = own.calls
    assert configuration["steps"] == 2
    assert all(isinstance(value, (bool, int, float, str)) for value in configuration.values())
    assert finish == "finish"
    names = ("loss", "learning_rate", "gradient_norm")
    assert logs[:2] == [
        (record["step"], {f"train/{name}": record[name] for name in names})
        for record in history.steps
    ]
    assert logs[2][0] == 2
    assert logs[2][1]["eval/gap"] == history.evaluations[0]["gap"]


def test_a_tracker_that_a_killed_fit_left_open_is_closed_before_the_next(plain, images) -> None:
    """MLflow refuses to start while one is open."""
    own = Listed()
    tracker = Tracker(own)
    with pytest.raises(Killed):
        fit(plain, images, tracker, KillAt(1), max_steps=2)
    fit(plain, images, tracker, max_steps=1)
    fit(plain, images, tracker, max_steps=1)
    kinds = [call if isinstance(call, str) else call[0] for call in own.calls]
    assert kinds == ["configuration", 1, "finish"] * 3


def test_trackers_of_older_accelerates_have_no_start(plain, images, monkeypatch) -> None:
    # `GeneralTracker.start` is newer than the oldest Accelerate that the package allows, 1.3.
    monkeypatch.delattr(GeneralTracker, "start", raising=False)
    own = Listed()
    fit(plain, images, Tracker(own), max_steps=1)
    assert own.calls[-1] == "finish"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "`tracker` 'nonsense' can't be used: Unsupported logging capability"),
        ([3, "logs"], "`tracker` 3 can't be used"),
    ],
)
def test_a_tracker_that_cannot_be_used(arguments: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tracker(*arguments)


def test_a_missing_folder_is_named_as_the_argument_is() -> None:
    with pytest.raises(ValueError, match="`folder`"):
        Tracker("tensorboard")


def test_a_tracker_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ValueError, match="`tracker` 'wandb' is not installed"):
        Tracker("wandb")


def test_a_tracker_looks_at_its_settings() -> None:
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        Tracker(Listed(), every=0)


def test_all_trackers_at_once_is_no_tracker(tmp_path: Path) -> None:
    # Accelerate knows "all"; one of them alone would be an argument half ignored.
    with pytest.raises(ValueError, match="all"):
        Tracker("all", tmp_path)


# --- The monitor ----------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(-2, 3), min_size=2, max_size=14), st.integers(0, 99))
def test_mean_of_different_pairs_is_that_of_all_pairs(labels: list[int], seed: int) -> None:
    if len(set(labels)) == 1:
        labels[0] += 1
    rows = np.random.default_rng(seed).normal(0.5, 1, (len(labels), 3)) * 10.0 ** (seed % 7 - 3)
    rows[seed % len(labels)] *= seed % 2  # a row of zeros has cosine 0 with all others
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    pairs = itertools.combinations(range(len(labels)), 2)
    expected = np.mean([unit[i] @ unit[j] for i, j in pairs if labels[i] != labels[j]])
    found = _different_mean(torch.from_numpy(rows).float(), torch.tensor(labels))
    assert found == pytest.approx(expected, abs=2e-6)


def a_fit(**parts: Any) -> FitState:
    """A fit as the monitor sees it, at step 1, with nothing to say."""
    from accelerate import Accelerator

    state = FitState(nn.Identity(), [], Accelerator(), 10, False, {})
    state.step = 1
    state.embeddings, state.labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    state.gradient = torch.ones(4, 4)
    for name, value in parts.items():
        setattr(state, name, value)
    return state


def look(monitor: CollapseMonitor, *steps: FitState) -> None:
    for step in steps:
        monitor.on_step(step)


FINDINGS = [
    (
        {"embeddings": torch.ones(4, 3)},
        r"At step 1, images of different classes have a mean similarity of 1\.000: the embeddings",
        "batches with collapsed embeddings",
    ),
    (
        {"labels": torch.tensor([7, 7, 7, 7])},
        "At step 1, all 4 images of the batch are of one class",
        "batches of one class",
    ),
    (
        {"gradient": torch.zeros(4, 4)},
        "At step 1, the loss's gradient is zero",
        "batches with a zero gradient",
    ),
]


@pytest.mark.parametrize(("parts", "message", "what"), FINDINGS)
def test_a_finding_is_said_once_and_counted(parts: Any, message: str, what: str) -> None:
    monitor, state = CollapseMonitor(), a_fit()
    monitor.on_fit_start(a_fit(step=0))
    monitor.on_step(state)
    with pytest.warns(UserWarning, match=message) as caught:
        look(monitor, *[a_fit(**parts)] * 3)
    assert len(caught) == 1
    monitor.on_step(state)
    with pytest.warns(UserWarning, match=rf"^Of 5 batches looked at: 3 {what}\.$") as caught:
        monitor.on_fit_end(state)
    assert len(caught) == 1


def test_several_findings_are_said_and_counted_apart() -> None:
    monitor = CollapseMonitor(threshold=-1)
    with pytest.warns(UserWarning, match="At step 1") as caught:
        look(
            monitor,
            a_fit(gradient=torch.zeros(4, 4)),
            a_fit(labels=torch.zeros(4, dtype=torch.int64)),
        )
    assert len(caught) == 3
    with pytest.warns(
        UserWarning, match="^Of 2 batches looked at: 1 .* embeddings, 1 .* gradient, 1 .* class"
    ):
        monitor.on_fit_end(a_fit())


@pytest.mark.parametrize(("threshold", "warns"), [(0.71, False), (0.70, True)])
def test_collapse_is_above_the_threshold(threshold: float, warns: bool) -> None:
    pair = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # cosine 0.7071
    monitor = CollapseMonitor(threshold)
    state = a_fit(embeddings=pair, labels=torch.tensor([0, 1]), gradient=torch.ones(2, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.on_step(state)
    assert len(caught) == warns


def test_it_looks_as_often_as_it_was_told() -> None:
    monitor = CollapseMonitor(every=3)
    with pytest.warns(UserWarning, match="At step 3, the loss's gradient is zero"):
        look(monitor, *[a_fit(step=step, gradient=torch.zeros(4, 4)) for step in range(1, 8)])
    with pytest.warns(UserWarning, match="^Of 2 batches looked at: 2 batches with a zero"):
        monitor.on_fit_end(a_fit())


def test_a_fit_that_collapses_is_told_so_once_across_a_resumption(
    plain, images, tmp_path: Path
) -> None:
    with torch.no_grad():
        plain.model[-1].weight.mul_(1e-6)  # embeddings are the bias
    arguments = {"max_steps": 6, "checkpoint_dir": tmp_path, "checkpoint_every": 2, "resume": True}

    def nothing(embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.sum() * 0

    again = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="At step 1, ") as caught, pytest.raises(Killed):
        fit(plain, images, CollapseMonitor(), KillAt(5), loss=nothing, **arguments)
    assert len(caught) == 2
    with pytest.warns(UserWarning, match="Of 6 batches looked at: 6 .* 6 ") as caught:
        fit(again, images, CollapseMonitor(), KillAt(99), loss=nothing, **arguments)
    assert len(caught) == 1


def test_a_fit_that_works_has_nothing_to_say(plain, images) -> None:
    fit(plain, images, CollapseMonitor(), max_steps=4)


def test_a_second_fit_is_told_again(plain, images) -> None:
    monitor = CollapseMonitor(threshold=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fit(plain, images, monitor, max_steps=2)
    assert [str(warning.message)[:32] for warning in caught] == [
        "At step 1, images of different c",
        "Of 2 batches looked at: 2 batche",
    ] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": 1.0}, ValueError, r"`threshold` must be in \[-1, 1\), got 1"),
        ({"threshold": math.nan}, ValueError, "`threshold` must be in"),
        ({"threshold": None}, TypeError, "`threshold` must be a number, got None"),
        ({"every": 0}, ValueError, "`every` must be at least 1, got 0"),
    ],
)
def test_wrong_settings_of_the_monitor(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        CollapseMonitor(**arguments)
