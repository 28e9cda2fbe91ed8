"""Checkpoints: whole or absent whatever happens while they are written, checked when read."""

import copy
import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import every_kill, killed_at
from torch import nn
from torchvision import transforms

from pairclip import (
    AllPairsCosineLoss,
    Callback,
    Checkpoint,
    Finetuner,
    VisionTower,
    _files,
    best_checkpoint,
    load_tower,
    newest_checkpoint,
)
from pairclip.checkpoints import differences, remove_leftovers, write_checkpoint, writing

FILES = ["weights.safetensors", "training.safetensors", "state.json", "manifest.json"]
LOSS = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)


def write(directory: Path, step: int, *, figure: float | None = None, keep: int = 2) -> Path:
    return write_checkpoint(
        directory,
        step,
        weights={"w": torch.full((3,), float(step))},
        state={"step": step, "moments": {0: torch.arange(4.0) * step}},
        figure=figure,
        keep=keep,
    )


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step-*"))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below the directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def weights_of(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tower.state_dict().items()}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert value.equal(found.state_dict()[name]), name


def fit(tower: nn.Module, images: Any, directory: Path, steps: int = 6, **arguments: Any) -> Any:
    arguments = {"batch_size": 12, "checkpoint_every": 2, "resume": True, **arguments}
    finetuner = Finetuner(tower, LOSS, learning_rate=1e-3)
    return finetuner.fit(images, max_steps=steps, checkpoint_dir=directory, **arguments)


# --- Written and read -----------------------------------------------------------------------------


def test_a_checkpoint_holds_what_it_was_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "new" / "folder", 120, figure=0.25)
    assert folder.name == "step-00000120"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    newest = newest_checkpoint(tmp_path / "new" / "folder")
    assert (newest.folder, newest.step, newest.figure) == (folder, 120, 0.25)
    assert newest.weights()["w"].tolist() == [120.0] * 3
    state = newest.state()
    assert state["step"] == 120
    assert state["moments"][0].equal(torch.arange(4.0) * 120)


def test_newest_and_best_of_several_or_of_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert best_checkpoint(str(tmp_path)) is None
    write(tmp_path, 5, keep=9)
    assert best_checkpoint(tmp_path) is None
    for step, figure in [(10, 0.5), (20, 0.7), (30, None), (40, 0.1), (100_000_000, 0.7)]:
        write(tmp_path, step, figure=figure, keep=9)
    assert newest_checkpoint(str(tmp_path)).step == 100_000_000
    assert best_checkpoint(tmp_path).step == 100_000_000
    shutil.rmtree(tmp_path / "step-100000000")
    assert newest_checkpoint(tmp_path).step == 40
    assert best_checkpoint(tmp_path).step == 20


def test_a_step_that_is_written_again_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3, figure=0.1)
    write(tmp_path, 3, figure=0.2)
    assert steps_in(tmp_path) == [3]
    assert newest_checkpoint(tmp_path).figure == 0.2
    assert len(list(tmp_path.iterdir())) == 1


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append(("fsync", path.name if path.is_file() else path.name[:5]))
        fsync(handle)

    def seen_rename(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    write(tmp_path / "saved", 7)
    named = calls.index(("rename", "step-00000007"))
    assert {("fsync", name) for name in FILES} < set(calls[:named])
    assert calls[named - 1] == ("fsync", ".step")
    assert calls[named + 1 :] == [("fsync", "saved")]


def test_on_windows_files_are_opened_to_write_and_folders_are_left_out(
    tmp_path: Path, monkeypatch
) -> None:
    access: list[int] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: access.append(fcntl.fcntl(handle, fcntl.F_GETFL) & 3)
    )
    (tmp_path / "file").touch()
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        _files.flush(tmp_path / "file")
        _files.flush(tmp_path)
    assert access == [os.O_RDWR]


@pytest.mark.parametrize("trained", ["wrapped", "tower"])
def test_weights_of_adapters_load_with_and_without_the_wrapper(
    tower: VisionTower, images: Any, tmp_path: Path, trained: str
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    plain, other = copy.deepcopy(tower), copy.deepcopy(tower)
    wrapped, other_wrapped = peft.get_peft_model(tower, config), peft.get_peft_model(other, config)
    fit(wrapped if trained == "wrapped" else tower, images, tmp_path, 2)
    checkpoint = newest_checkpoint(tmp_path)
    for loaded in (other, other_wrapped):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += parameter.requires_grad * 1.0
        checkpoint.load_weights(loaded)
        assert_same(other, tower)
    with pytest.raises(ValueError, match=r"lora_A.*, which the tower lacks.*peft\.get_peft_model"):
        checkpoint.load_weights(plain)


def test_load_weights_takes_all_or_nothing(tower: VisionTower, images: Any, tmp_path: Path) -> None:
    untrained = copy.deepcopy(tower)
    tower.freeze(all_but_last=1)
    fit(tower, images, tmp_path, 2)
    checkpoint = newest_checkpoint(tmp_path)
    loaded = copy.deepcopy(untrained)
    checkpoint.load_weights(loaded)
    assert_same(loaded, tower)

    checkpoint.load_weights(loaded.to("cpu").double())
    name = "model.visual_projection.weight"
    assert loaded.state_dict()[name].equal(tower.state_dict()[name].double())

    other = copy.deepcopy(untrained)
    other.model.visual_projection = nn.Linear(32, 7, bias=False)
    before = weights_of(other)
    with pytest.raises(ValueError, match=rf"weight `{name}` has shape \[12, 32\], the tower's \[7"):
        checkpoint.load_weights(other)
    assert all(value.equal(before[key]) for key, value in weights_of(other).items())
    with pytest.raises(ValueError, match=r"has the weight `model\..*`, which the tower lacks"):
        checkpoint.load_weights(nn.Linear(2, 2))


def test_differences_are_named_by_their_path() -> None:
    saved = {"a": {"x": 1, "y": [1, 2], "gone": 0}, "b": "same"}
    now = {"a": {"x": 2, "y": [1, 3], "new": None, "more": 4}, "b": "same"}
    assert list(differences(saved, saved)) == []
    found = list(differences(saved, now))
    assert [sentence.split(" is ")[0].removesuffix(".1") for sentence in found] == [
        "a.x",
        "a.y",
        "a.gone",
        "a.more",
    ]
    assert found[0] == "a.x is 1 there and 2 here"


def test_what_differs_is_shown_however_long_the_rest_is() -> None:
    (sentence,) = differences({"x": "z" * 300 + "this"}, {"x": "z" * 300 + "that"})
    assert "this" in sentence
    assert "that" in sentence
    assert len(sentence) < 250


# --- Kept and removed -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    chance = random.Random(keep)
    written: list[tuple[float, int]] = []
    for step in range(1, 25):
        figure = chance.choice([None, 0.1, 0.2, 0.3, 0.4, math.nextafter(0.4, 1), 0.0])
        write(tmp_path, step, figure=figure, keep=keep)
        written += [] if figure is None else [(figure, step)]
        expected = set(range(max(1, step - keep + 1), step + 1))
        expected |= {max(written)[1]} if written else set()
        assert set(steps_in(tmp_path)) == expected, step
        assert newest_checkpoint(tmp_path).step == step
        assert (best_checkpoint(tmp_path) or newest_checkpoint(tmp_path)).step in expected
    assert best_checkpoint(tmp_path).step == max(written)[1]


def test_a_fit_keeps_the_best_by_mean_average_precision(
    tower: VisionTower, images: Any, tmp_path: Path
) -> None:
    left = iter([0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    every = {"eval_every": 1, "checkpoint_every": 1}
    every["evaluate"] = lambda tower: {"mean_average_precision": next(left)}
    fit(tower, images, tmp_path, 6, keep_checkpoints=2, **every)
    assert steps_in(tmp_path) == [2, 5, 6]
    assert best_checkpoint(tmp_path).step == 2
    assert best_checkpoint(tmp_path).figure == 0.9


def test_without_an_evaluation_at_its_step_a_checkpoint_has_no_figure(
    tower: VisionTower, images: Any, tmp_path: Path
) -> None:
    history = fit(tower, images, tmp_path, 6, eval_dataset=images, eval_every=3, keep_checkpoints=9)
    figures = {
        path.name[-1]: json.loads((path / "manifest.json").read_text())["figure"]
        for path in tmp_path.glob("step-*")
    }
    maps = {str(e["step"]): e["mean_average_precision"] for e in history.evaluations}
    assert figures == {"2": None, "4": None, "6": maps["6"]}


def test_what_is_not_ours_is_left_alone(tower: VisionTower, images: Any, tmp_path: Path) -> None:
    hidden = ".step-00000001." + "g" * 32
    for name in ("step-xyz", "step-1", "step-00000001.bak", "xstep-00000001", "logs", hidden):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "logs")
    before = contents(tmp_path)
    fit(tower, images, tmp_path, 6, keep_checkpoints=1)
    shutil.rmtree(tmp_path / "step-00000006")
    (tmp_path / ".lock").unlink()
    assert contents(tmp_path) == before
    assert (tmp_path / "elsewhere").is_symlink()


def test_what_killed_writers_left_is_removed_and_never_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    whole = tmp_path / (".step-00000009." + "0a" * 16)
    shutil.copytree(tmp_path / "step-00000001", whole)
    (tmp_path / (".step-00000002." + "f" * 32)).mkdir()
    assert newest_checkpoint(tmp_path).step == 1
    assert steps_in(tmp_path) == [1]
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    whole.mkdir()
    remove_leftovers(tmp_path)
    assert not whole.exists()
    remove_leftovers(tmp_path / "absent")


def test_a_leftover_that_cannot_be_removed_does_not_end_all_checkpoints(
    tmp_path: Path, monkeypatch
) -> None:
    stuck, other = (tmp_path / (".step-00000001." + digit * 32) for digit in "ab")
    stuck.mkdir()
    other.mkdir()
    rmtree = shutil.rmtree

    def failing(path: Path, **options: Any) -> None:
        if Path(path) == stuck:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", failing)
    with pytest.warns(UserWarning, match=rf"leftover '{stuck}' could not be removed: .*denied"):
        write(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 2
    assert (stuck.exists(), other.exists()) == (True, False)


def test_damaged_ones_do_not_push_out_what_is_written_now(
    tower: VisionTower, images: Any, tmp_path: Path
) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step, keep=9)
    for step in (4, 6):
        damage(tmp_path / f"step-{step:08d}" / "state.json", "cut")
    write(tmp_path, 3, keep=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert newest_checkpoint(tmp_path).step == 3
    assert {2, 3} <= set(steps_in(tmp_path))


def test_what_is_damaged_does_not_count_as_one_of_the_last(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step, keep=9)
    damage(tmp_path / "step-00000004" / "weights.safetensors", "flipped")
    write(tmp_path, 6, keep=2)
    assert steps_in(tmp_path) == [2, 6]


def test_a_damaged_best_does_not_push_out_the_best_that_is_whole(tmp_path: Path) -> None:
    for step, figure in ((1, 0.7), (2, 0.9), (3, 0.1)):
        write(tmp_path, step, figure=figure, keep=9)
    damage(tmp_path / "step-00000002" / "training.safetensors", "flipped")
    write(tmp_path, 4, figure=0.2, keep=1)
    assert steps_in(tmp_path) == [1, 4]
    assert best_checkpoint(tmp_path).step == 1


def test_one_that_was_put_aside_counts_until_its_successor_is_there(tmp_path: Path) -> None:
    write(tmp_path, 3).rename(tmp_path / ".step-00000003.replaced")
    assert newest_checkpoint(tmp_path).step == 3
    write(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 3
    assert steps_in(tmp_path) == [2, 3]


def test_a_reader_beside_a_writer_always_finds_a_whole_one(tmp_path: Path) -> None:
    write(tmp_path, 1)
    ended = threading.Event()

    def write_many() -> None:
        for step in range(2, 60):
            write(tmp_path, step, figure=1.0 if step % 7 else 0.0, keep=1)
        ended.set()

    writer = threading.Thread(target=write_many)
    writer.start()
    steps = []
    while not ended.is_set():
        steps.append(newest_checkpoint(tmp_path).step)
        if steps[-1] > 10:
            assert best_checkpoint(tmp_path) is not None
    writer.join()
    assert steps == sorted(steps)


def test_two_fits_do_not_share_a_folder(tower: VisionTower, images: Any, tmp_path: Path) -> None:
    class Second(Callback):
        def on_step(self, state: Any) -> None:
            with pytest.raises(OSError, match=r"is the `checkpoint_dir` of another fit that goes"):
                fit(copy.deepcopy(state.tower), images, tmp_path, 2)

    finetuner = Finetuner(tower, LOSS, callbacks=[Second()])
    finetuner.fit(images, max_steps=2, batch_size=12, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="is of another run"):
        fit(tower, images, tmp_path, 2)
    # An error leaves no lock.
    finetuner.fit(images, max_steps=2, batch_size=12, checkpoint_dir=tmp_path, resume=True)


def test_a_relative_folder_is_that_of_the_start(
    tower: VisionTower, images: Any, tmp_path: Path, monkeypatch
) -> None:
    class Wanderer(Callback):
        def on_step(self, state: Any) -> None:
            os.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    Finetuner(tower, LOSS, callbacks=[Wanderer()]).fit(
        images, max_steps=2, batch_size=12, checkpoint_dir="saved"
    )
    assert newest_checkpoint(tmp_path / "saved").step == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_whose_name_is_no_utf8(tower: VisionTower, images: Any, tmp_path: Path) -> None:
    saved = tmp_path / os.fsdecode(b"caf\xe9")
    whole, resumed = copy.deepcopy(tower), copy.deepcopy(tower)
    expected = fit(whole, images, tmp_path / "whole", 4)
    fit(tower, images, saved, 4)
    shutil.rmtree(saved / "step-00000004")
    assert fit(resumed, images, saved, 4) == expected
    assert_same(resumed, whole)


def test_a_file_with_the_name_of_a_checkpoint_is_no_hindrance(tmp_path: Path) -> None:
    """Neither is it lost, nor does it keep all later checkpoints from being written."""
    (tmp_path / "step-00000001").write_text("mine")
    try:
        write(tmp_path, 1)
    except OSError:
        assert (tmp_path / "step-00000001").read_text() == "mine"
    write(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 2


def test_a_checkpoint_that_is_a_link_does_not_end_all_checkpoints(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    write(directory, 1)
    shutil.move(directory / "step-00000001", tmp_path / "elsewhere")
    (directory / "step-00000001").symlink_to(tmp_path / "elsewhere")
    assert newest_checkpoint(directory).step == 1
    for step in (2, 3, 4):
        write(directory, step, keep=1)
    assert steps_in(directory) == [4]
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("target", ["nowhere", "step-00000002"])
def test_a_link_that_leads_nowhere_is_a_checkpoint_that_is_damaged(
    tmp_path: Path, target: str
) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000002").symlink_to(target)
    for find in (newest_checkpoint, best_checkpoint):
        with pytest.warns(UserWarning, match=r"step-00000002' is damaged, so passed over"):
            find(tmp_path)
    with pytest.raises(FileExistsError, match=r"step-00000002' is not a checkpoint"):
        write(tmp_path, 2)
    write(tmp_path, 3)
    assert newest_checkpoint(tmp_path).step == 3
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize("figure", [math.inf, -math.inf, math.nan, True])
def test_what_is_no_figure_makes_no_checkpoint_a_damaged_one(tmp_path: Path, figure: Any) -> None:
    write(tmp_path, 1, figure=0.5)
    write(tmp_path, 2, figure=figure)
    assert newest_checkpoint(tmp_path).figure is None
    assert best_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("state", [{"a": {"__tuple__": 1}}, {"a": {"__tensor__": "none"}}, 3])
def test_a_state_that_none_wrote_is_named(tmp_path: Path, state: Any) -> None:
    folder = write(tmp_path, 1)
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint = Checkpoint(folder, 1, None)
    if state == 3:
        assert checkpoint.state() == 3
        return
    with pytest.raises(ValueError, match=r"state\.json' is damaged: it holds no state of a fit"):
        checkpoint.state()


# --- Killed while writing -------------------------------------------------------------------------


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    write(saved, 1, figure=0.9, keep=9)
    write(saved, 2, figure=0.1, keep=9)
    write(saved, 3, keep=9)
    (saved / "notes.txt").write_text("mine")
    found = []
    for left in every_kill(saved, lambda where: write(where, 4, figure=0.2, keep=1)):
        newest = newest_checkpoint(left)  # a damaged one would be a warning, so an error
        assert newest.weights()["w"].tolist() == [newest.step] * 3
        assert newest.state()["step"] == newest.step
        assert best_checkpoint(left).step == 1
        found.append(newest.step)
        write(left, 5, figure=0.3, keep=1)
        assert sorted(p.name for p in left.iterdir()) == [
            "notes.txt",
            "step-00000001",
            "step-00000005",
        ]
    assert found == sorted(found)
    assert set(found) == {3, 4}


def test_a_kill_at_any_moment_of_the_first_leaves_one_or_none(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    found = []
    for left in every_kill(tmp_path / "saved", lambda where: write(where / "new", 1)):
        newest = newest_checkpoint(left / "new")
        found.append(0 if newest is None else newest.step)
        write(left / "new", 2, keep=1)
        assert [path.name for path in (left / "new").iterdir()] == ["step-00000002"]
    assert set(found) == {0, 1}


def test_a_kill_while_a_step_is_written_again_does_not_lose_it(tmp_path: Path) -> None:
    """As it is by a resumed fit, when the evaluation that a signal prevented is made up for."""
    write(tmp_path / "saved", 4)
    for left in every_kill(tmp_path / "saved", lambda where: write(where, 4, figure=0.5, keep=1)):
        remove_leftovers(left)  # as a fit does that resumes
        newest = newest_checkpoint(left)
        assert newest is not None, left.name
        assert newest.step == 4


@pytest.mark.parametrize("file", FILES[:2])
def test_a_kill_in_the_middle_of_a_tensor_file_leaves_the_last(
    tmp_path: Path, monkeypatch, file: str
) -> None:
    write(tmp_path, 1)
    write_tensors = writing.write_tensors

    def torn(opened: Any, tensors: Any) -> None:
        write_tensors(opened, tensors)
        if Path(opened.name).name == file:
            opened.truncate(opened.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(writing, "write_tensors", torn)
    assert killed_at(10**6, lambda: write(tmp_path, 2))
    assert newest_checkpoint(tmp_path).step == 1
    assert len(list(tmp_path.glob(".step-00000002.*"))) == 1


# --- Damaged --------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "one byte short":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b" ")
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "flipped":
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()


HOW = ["cut", "one byte short", "longer", "emptied", "flipped", "zeroed", "removed", "a folder"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("file", FILES[:3])
def test_a_damaged_file_is_passed_over_with_its_reason(tmp_path: Path, file: str, how: str) -> None:
    write(tmp_path, 1, figure=0.1)
    damage(write(tmp_path, 2, figure=0.2) / file, how)
    with pytest.warns(
        UserWarning, match=rf"Checkpoint '.*step-00000002' is damaged, so passed over: .*{file}"
    ) as caught:
        assert newest_checkpoint(tmp_path).step == 1
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="step-00000002' is damaged"):
        assert best_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("how", [how for how in HOW if how != "longer"])  # a blank more is JSON
def test_a_damaged_manifest_is_passed_over(tmp_path: Path, how: str) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / "manifest.json", how)
    with pytest.warns(UserWarning, match=r"Checkpoint '.*step-00000002' is damaged, so passed"):
        assert newest_checkpoint(tmp_path).step == 1


MANIFESTS = ["", "{", "[]", "null", "7", '"text"', '["format"]', "{}", '{"format": null}', "\0" * 9]


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_of_another_kind_is_passed_over(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match=r"Checkpoint '.*step-00000002' is damaged, so passed"):
        assert newest_checkpoint(tmp_path).step == 1
    write(tmp_path, 3, keep=1)  # and it does not stop the next one either
    assert newest_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", None),
        ("files", []),
        ("files", {}),
        ("format", "1"),
        ("figure", "high"),
        ("figure", [0.5]),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_passed_over(
    tmp_path: Path, key: str, value: object
) -> None:
    write(tmp_path, 1, figure=0.1)
    path = write(tmp_path, 2, figure=0.2) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.warns(UserWarning, match=r"Checkpoint '.*step-00000002' is damaged, so passed"):
        assert best_checkpoint(tmp_path).step == 1
    write(tmp_path, 3, figure=0.05, keep=2)  # which looks at the others, to remove some
    assert newest_checkpoint(tmp_path).step == 3


SEALED = [
    {"step": 2},
    {"format": 1, "step": 2, "figure": None, "files": None},
    {"format": 1, "step": 2, "figure": None, "files": {name: 3 for name in FILES}},
    {"format": 1, "step": 2, "figure": None, "files": {name: {"size": 3} for name in FILES}},
    {"format": 1, "step": 2, "figure": "high", "files": {}},
    {"format": 1, "step": 2, "figure": math.nan, "files": {}},
]


@pytest.mark.parametrize("manifest", SEALED)
def test_an_odd_manifest_with_its_checksum_is_passed_over(tmp_path: Path, manifest: Any) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").write_text(json.dumps(_files.sealed(manifest)))
    with pytest.warns(UserWarning, match=r"step-00000002' is damaged, so passed over: .*manifest"):
        assert newest_checkpoint(tmp_path).step == 1
    write(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_or_an_endless_device_for_a_file_is_passed_over(tmp_path: Path, file: str) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.warns(UserWarning, match="step-00000002' is damaged, so passed over"):
        assert newest_checkpoint(tmp_path).step == 1
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match="step-00000002' is damaged, so passed over"):
        assert newest_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900])
def test_a_deeply_nested_manifest_is_passed_over(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match="step-00000002' is damaged, so passed over"):
        assert newest_checkpoint(tmp_path).step == 1
    write(tmp_path, 3, keep=1)


def test_a_format_is_believed_only_with_its_checksum(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 3'))
    with pytest.warns(UserWarning, match="manifest.json does not have its checksum"):
        assert newest_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("missing", ["format", "figure", "files"])
def test_a_missing_entry_is_named(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[missing]
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"damaged, so passed over: .*manifest"):
        assert newest_checkpoint(tmp_path) is None


def test_no_flipped_byte_of_a_manifest_changes_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 12, figure=0.625) / "manifest.json"
    original = path.read_bytes()
    wrong = []
    for place in range(len(original)):
        for bit in (0, 1, 3, 7):
            data = bytearray(original)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = newest_checkpoint(tmp_path)
            except ValueError:
                continue  # a newer format, it says
            if found.step == 12 and found.figure != 0.625:
                wrong.append((original[max(0, place - 12) : place + 2], found.figure))
    assert not wrong


def test_a_renamed_checkpoint_is_not_of_another_step(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.copytree(write(tmp_path, 2), tmp_path / "step-00000700")
    with pytest.warns(UserWarning, match="step-00000700' is damaged"):
        assert newest_checkpoint(tmp_path).step == 2


def test_a_newer_format_is_not_passed_over(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, 1)
    with monkeypatch.context() as later:
        later.setattr(writing, "FORMAT", 2)
        write(tmp_path, 2)
    for find in (newest_checkpoint, best_checkpoint):
        with pytest.raises(ValueError, match=r"step-00000002' has format 2, .* up to 1\. Update"):
            find(tmp_path)


def test_a_newer_format_is_kept_and_not_trained_over(
    tower: VisionTower, images: Any, tmp_path: Path, monkeypatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(writing, "FORMAT", 2)
        fit(tower, images, tmp_path, 2)
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"has format 2, .* Update pairclip"):
            fit(tower, images, tmp_path, 2, resume=resume)
    assert steps_in(tmp_path) == [2]


def test_a_fit_continues_from_the_one_before_a_damaged_one(
    tower: VisionTower, images: Any, tmp_path: Path
) -> None:
    whole, resumed = copy.deepcopy(tower), copy.deepcopy(tower)
    expected = fit(whole, images, tmp_path / "whole")
    fit(tower, images, tmp_path / "saved")
    damage(tmp_path / "saved" / "step-00000006" / "training.safetensors", "flipped")
    with pytest.warns(
        UserWarning, match=r"step-00000006' is damaged, so passed over: training\.safetensors does"
    ) as caught:
        history = fit(resumed, images, tmp_path / "saved")
    assert len(caught) == 1
    assert history == expected
    assert_same(resumed, whole)
    assert newest_checkpoint(tmp_path / "saved").step == 6  # which is whole again


def test_a_fit_starts_over_where_all_are_damaged(
    tower: VisionTower, images: Any, tmp_path: Path
) -> None:
    whole, again = copy.deepcopy(tower), copy.deepcopy(tower)
    expected = fit(tower, images, tmp_path)
    for step, how in [(4, "removed"), (6, "cut")]:
        damage(tmp_path / f"step-{step:08d}" / "weights.safetensors", how)
    with pytest.warns(UserWarning, match="is damaged, so passed over: ") as caught:
        assert fit(again, images, tmp_path) == expected
    assert [str(w.message)[-120:].find("step-0000000") > 0 for w in caught] == [True, True]
    fit(whole, images, tmp_path / "other")
    assert_same(again, whole)
    assert newest_checkpoint(tmp_path).step == 6


# --- A disk that fails ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def flat_tower() -> VisionTower:
    """Weights of about 100 KB, so that one checkpoint takes about 310 KB."""
    torch.manual_seed(0)
    preprocess = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    return load_tower(nn.Sequential(nn.Flatten(), nn.Linear(768, 32)), image_processor=preprocess)


def test_a_full_disk_is_said_and_training_goes_on(small_disk: Path, images: Any) -> None:
    tower, whole = flat_tower(), flat_tower()
    expected = fit(whole, images, small_disk.parent / "whole")
    with pytest.warns(
        UserWarning,
        match=r"The checkpoint of step \d could not be written.*(No space|os error 28|Errno 28)",
    ) as caught:
        assert fit(tower, images, small_disk) == expected
    assert ["step 4" in str(w.message) for w in caught] == [True, False]
    assert_same(tower, whole)
    assert sorted(path.name for path in small_disk.iterdir()) == [".lock", "step-00000002"]
    assert newest_checkpoint(small_disk).step == 2

    # Full or not, a run resumes from what there is.
    again = flat_tower()
    with pytest.warns(UserWarning, match="could not be written"):
        assert fit(again, images, small_disk) == expected
    assert_same(again, whole)


@pytest.mark.parametrize("after", [0, 1000])
def test_a_disk_that_was_full_from_the_start_and_is_freed(
    small_disk: Path, images: Any, after: int
) -> None:
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(bytes(free - after))
    tower, whole = flat_tower(), flat_tower()
    with pytest.warns(UserWarning, match="could not be written") as caught:
        expected = fit(tower, images, small_disk / "saved")
    assert len(caught) == 3
    assert steps_in(small_disk / "saved") == []
    assert [path.name for path in (small_disk / "saved").iterdir()] == [".lock"]
    (small_disk / "ballast").unlink()
    assert fit(whole, images, small_disk / "saved", keep_checkpoints=1, checkpoint_every=6) == (
        expected
    )
    assert newest_checkpoint(small_disk / "saved").step == 6


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "call", "number", "error"),
    [
        (os, "fsync", 0, FULL),
        (os, "fsync", 3, OSError(errno.EIO, "Input/output error")),
        (writing, "write_tensors", 0, FULL),
        (writing, "write_tensors", 1, FULL),
        (Path, "write_text", 0, FULL),
        (Path, "write_text", 1, FULL),
        (Path, "mkdir", 0, FULL),
        (os, "rename", 0, OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
)
def test_a_write_that_fails_leaves_the_earlier_as_they_were(
    tmp_path: Path, monkeypatch, owner: Any, call: str, number: int, error: Exception
) -> None:
    write(tmp_path, 1)
    before = contents(tmp_path)
    real, left = getattr(owner, call), number

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, call, failing)
    with pytest.raises(OSError, match=str(error).rpartition("] ")[2]):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    write(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 2


def test_what_was_written_is_not_said_to_be_missing_where_old_ones_cannot_be_removed(
    tower: VisionTower, images: Any, tmp_path: Path, monkeypatch
) -> None:
    rename = os.rename

    def stubborn(source: Path, target: Path) -> None:
        if Path(source).name.startswith("step-"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", stubborn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tower, images, tmp_path, 4, checkpoint_every=2, keep_checkpoints=1)
    assert steps_in(tmp_path) == [2, 4]
    assert newest_checkpoint(tmp_path).step == 4
    assert [str(w.message) for w in caught if "could not be written" in str(w.message)] == []
    assert any("Input/output error" in str(w.message) for w in caught)


def test_what_cannot_be_written_names_its_place_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(TypeError, match=r"state\.seen is of type set"):
        write_checkpoint(tmp_path, 2, weights={}, state={"seen": {1}}, figure=None, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_file_in_the_place_of_the_directory_is_an_error_before_training(
    tower: VisionTower, images: Any, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("mine")
    before = weights_of(tower)
    with pytest.raises((ValueError, OSError), match="file"):
        fit(tower, images, tmp_path / "file" / below, resume=False)
    assert all(value.equal(before[name]) for name, value in weights_of(tower).items())


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that even root can't write into."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a read-only file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_directory_that_cannot_be_made_is_an_error_before_training(
    tower: VisionTower, images: Any, read_only: Path
) -> None:
    before = weights_of(tower)
    with pytest.raises((ValueError, OSError), match="read-only"):
        fit(tower, images, read_only / "saved", resume=False)
    assert all(value.equal(before[name]) for name, value in weights_of(tower).items())


def test_a_fit_resumes_from_a_disk_that_became_read_only(small_disk: Path, images: Any) -> None:
    whole, again = flat_tower(), flat_tower()
    fit(whole, images, small_disk.parent / "whole")
    saved = "saved/step-00000004"
    shutil.copytree(small_disk.parent / "whole" / Path(saved).name, small_disk / saved)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.warns(UserWarning, match="step 6 could not be written.*Read-only"):
        fit(again, images, small_disk / "saved")
    assert_same(again, whole)
