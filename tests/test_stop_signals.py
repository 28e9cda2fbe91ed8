"""Ctrl-C and SIGTERM: the step ends, a checkpoint is written, the program stops."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from quick import quick_evaluation
from runs import At, Killed, Run, assert_same, kill, never, photos, send

from pairclip import (
    Callback,
    EarlyStopping,
    WeightAverage,
    newest_checkpoint,
)
from pairclip.callbacks import FitState
from pairclip.checkpoints import writing


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
    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    for run in (whole, part, rest):
        run.finetuner["callbacks"] = [WeightAverage(0.9), EarlyStopping("gap", patience=9)]
        run.fit |= {"evaluate": quick_evaluation(photos()), "eval_every": 2, "checkpoint_every": 5}
        run.fit["keep_checkpoints"] = 9
        run.data = photos()
    expected = whole.go(never())
    part.tower.model[2].eval()
    with ends_with(number):
        part.go(At(step, send(number)))
    assert (part.tower.model[1].training, part.tower.model[2].training) == (True, False)
    assert newest_checkpoint(tmp_path / "parts").step == step
    assert rest.go(never()) == expected
    assert_same(rest.tower, whole.tower)
    # The evaluation that the signal prevented is in the checkpoint of its step, if it was due.
    figures = {
        path.name: json.loads((path / "manifest.json").read_text())["figure"]
        for path in (tmp_path / "parts").glob("step-*")
    }
    if step == 6:
        assert figures["step-00000006"] == expected.evaluations[-1]["mean_average_precision"]


def test_an_evaluation_that_draws_draws_the_same_after_a_signal(tmp_path: Path) -> None:
    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    for run in (whole, part, rest):
        run.fit |= {"evaluate": quick_evaluation(photos()), "eval_every": 4}
    expected = whole.go(never())
    with pytest.raises(SystemExit):
        part.go(At(4, send(signal.SIGTERM)))
    assert rest.go(never()) == expected


class Evaluated(Callback):
    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._when = step
        self._action = action

    def on_evaluation(self, fit: FitState) -> None:
        if fit.step == self._when:
            self._action()


@pytest.mark.parametrize(("step", "saved"), [(2, 3), (4, 5), (6, 6)])
def test_a_signal_during_an_evaluation(tmp_path: Path, number: int, step: int, saved: int) -> None:
    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    for run in (whole, part, rest):
        run.fit |= {"evaluate": quick_evaluation(photos()), "eval_every": 2, "checkpoint_every": 5}
        run.finetuner["callbacks"] = [WeightAverage(0.9)]
        run.data = photos()
    expected = whole.go(Evaluated(-1, kill))
    with ends_with(number):
        part.go(Evaluated(step, send(number)))
    assert newest_checkpoint(tmp_path / "parts").step == saved
    assert rest.go(Evaluated(-1, kill)) == expected
    assert_same(rest.tower, whole.tower)


def test_a_signal_while_a_checkpoint_is_written(tmp_path: Path, number: int, monkeypatch) -> None:
    write_tensors, left = writing.write_tensors, [2]

    def interrupted(*arguments: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)
        write_tensors(*arguments)

    monkeypatch.setattr(writing, "write_tensors", interrupted)
    run = Run(tmp_path)
    run.fit["keep_checkpoints"] = 9
    with ends_with(number):
        run.go()
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["2", "3"]
    assert newest_checkpoint(tmp_path).step == 3


def test_a_signal_in_the_step_that_a_callback_stops_at(tmp_path: Path, number: int) -> None:
    class Stop(Callback):
        def on_step(self, fit: FitState) -> None:
            if fit.step == 3:
                fit.stop("enough")

    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "parts", "parts"))
    for run in (whole, part, rest):
        run.finetuner["callbacks"] = [Stop(), WeightAverage(0.9)]
        run.fit |= {"evaluate": quick_evaluation(photos()), "eval_every": 5}
        run.data = photos()
    expected = whole.go(never())
    assert [evaluation["step"] for evaluation in expected.evaluations] == [3]
    with ends_with(number):
        part.go(At(3, send(number)))
    assert rest.go(never()) == expected
    assert_same(rest.tower, whole.tower)


def test_a_signal_after_the_last_step_stops_the_program_too(tmp_path: Path, number: int) -> None:
    class End(Callback):
        def on_fit_end(self, fit: FitState) -> None:
            os.kill(os.getpid(), number)

    whole, part = Run(tmp_path / "whole"), Run(tmp_path / "part")
    whole.go()
    with ends_with(number):
        part.go(End())
    assert newest_checkpoint(tmp_path / "part").step == 6
    assert_same(part.tower, whole.tower)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path, number: int) -> None:
    reached = []
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.go(At(3, send(number, signal.SIGINT)), At(3, lambda: reached.append(3)))
    assert reached == []
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_a_repeated_sigterm_is_the_same_wish(tmp_path: Path, number: int) -> None:
    """One to a whole job comes to each process twice: torchrun forwards its own."""
    with ends_with(number):
        Run(tmp_path).go(At(3, send(number, signal.SIGTERM, signal.SIGTERM)))
    assert newest_checkpoint(tmp_path).step == 3


def test_a_second_ctrl_c_while_saving_leaves_no_half_checkpoint(
    tmp_path: Path, number: int, monkeypatch
) -> None:
    write_tensors = writing.write_tensors

    def interrupted(*arguments: Any) -> None:
        write_tensors(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    run = Run(tmp_path)
    run.fit["checkpoint_every"] = 6
    monkeypatch.setattr(writing, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.go(At(3, send(number)))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_checkpoints_signals_are_left_alone(number: int) -> None:
    caught: list[tuple[int, int]] = []
    before = signal.signal(number, lambda received, frame: caught.append((received, len(seen))))
    seen: list[int] = []
    try:
        run = Run()
        run.go(At(2, send(number)), At(2, lambda: seen.append(2)))
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
            run = Run(tmp_path / name)
            if error is None:
                run.go(At(2, action))
            else:
                with pytest.raises(error):
                    run.go(At(2, action))
            assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_what_is_ignored_stays_ignored(tmp_path: Path, number: int) -> None:
    """As after nohup, or in a script's background job, which a Ctrl-C is not for."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert len(Run(tmp_path).go(At(3, send(number))).steps) == 6
    except (KeyboardInterrupt, SystemExit) as error:
        pytest.fail(f"it was obeyed: {error!r}")
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_in_another_thread(tmp_path: Path, workers: int) -> None:
    whole, other = Run(tmp_path / "whole"), Run(tmp_path / "thread")
    other.fit["num_workers"] = workers
    expected, found = whole.go(), []

    def work() -> None:
        found.append(other.go())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [expected]
    assert_same(other.tower, whole.tower)
    assert newest_checkpoint(tmp_path / "thread").step == 6
