"""Files and folders that are whole or not there, and files that earlier versions wrote."""

import errno
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import every_kill, killed_at

from pairclip import CachedFeatures, ImageIndex, _files, newest_checkpoint
from pairclip._files import whole

OLD_FILES = Path(__file__).parent / "old_files"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder takes the place of another: in one step, or where the system has none."""
    if request.param == "renamed twice":
        monkeypatch.setattr(whole, "exchange", lambda one, other: False)
    elif sys.platform not in ("linux", "darwin"):
        pytest.skip("this system has no such step")
    return str(request.param)


def make_folder(path: Path, *contents: str) -> None:
    with _files.whole_folder(path) as folder:
        for number, content in enumerate(contents):
            (folder / str(number)).write_text(content)


# --- Whole files ----------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with _files.whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with suppress(KeyError), _files.whole_file(path) as file:
        file.write(b"newer")
        raise KeyError
    assert path.read_text() == "new"
    assert names(tmp_path) == ["figures.json"]
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_kill_before_any_file_operation_leaves_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "file").write_text("old" * 100)
    contents = [
        (left / "file").read_text()
        for left in every_kill(
            tmp_path / "saved", lambda where: _files.write_text(where / "file", "new"), at_least=2
        )
    ]
    assert set(contents) == {"old" * 100, "new"}


def test_threads_that_write_one_name_never_tear_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [str(number) * 10_000 for number in range(4)]
    _files.write_text(path, texts[0])
    failures: list[Exception] = []

    def write(text: str) -> None:
        try:
            for _ in range(40):
                _files.write_text(path, text)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in texts
    assert failures == []
    assert names(tmp_path) == ["file"]


def test_no_link_is_followed_and_no_name_can_be_guessed(tmp_path: Path, monkeypatch) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    seen = set()
    for _ in range(3):
        with _files.whole_file(path):
            seen |= {name for name in names(tmp_path) if name.startswith(".file.")}
    assert len(seen) == 3
    planted = tmp_path / ".file.guessed"
    planted.symlink_to(victim)
    monkeypatch.setattr(whole, "_beside", lambda _: planted)
    with pytest.raises(FileExistsError):
        _files.write_text(path, "text")
    assert victim.read_text() == "mine"
    # Nor a link in the place of the file itself.
    monkeypatch.undo()
    path.unlink()
    path.symlink_to(victim)
    _files.write_text(path, "text")
    assert (victim.read_text(), path.read_text()) == ("mine", "text")


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()))
    reader.start()
    _files.write_text(tmp_path / "pipe", "text")
    reader.join()
    assert received == ["text"]
    assert names(tmp_path) == ["pipe"]


def test_names_as_long_as_names_may_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "\U0001f431" * 63):
        _files.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*figures\.json'"):
        _files.write_text(tmp_path / "figures.json", "{}")
    assert names(tmp_path) == []


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    leftover, others = tmp_path / (".file." + "0a" * 16), tmp_path / (".other." + "0a" * 16)
    leftover.touch()
    others.touch()
    _files.write_text(tmp_path / "file", "text")
    assert leftover.exists()
    old = time.time() - 25 * 3600
    os.utime(leftover, (old, old))
    os.utime(others, (old, old))
    _files.write_text(tmp_path / "file", "text")
    assert names(tmp_path) == [others.name, "file"]


# --- Whole folders --------------------------------------------------------------------------------


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path, way: str) -> None:
    path = tmp_path / "saved"
    make_folder(path, "old", "old")
    with suppress(KeyError), _files.whole_folder(path) as folder:
        (folder / "0").write_text("new")
        raise KeyError
    assert (path / "0").read_text() == "old"
    make_folder(path, "new")
    assert (names(path), (path / "0").read_text()) == (["0"], "new")
    assert names(tmp_path) == ["saved"]


def test_a_folder_that_can_not_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "saved"
    make_folder(path, "old")
    rename = os.rename
    monkeypatch.setattr(whole, "exchange", lambda one, other: False)

    def failing(source: Path, target: Path) -> None:
        if Path(target) == path and not path.exists() and "replaced" not in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        make_folder(path, "new")
    assert (path / "0").read_text() == "old"
    assert names(tmp_path) == ["saved"]


def test_a_kill_before_any_file_operation_leaves_a_whole_folder(tmp_path: Path, way: str) -> None:
    (tmp_path / "all").mkdir()
    make_folder(tmp_path / "all" / "saved", "old", "old")
    contents = []
    for left in every_kill(
        tmp_path / "all", lambda where: make_folder(where / "saved", "new", "new")
    ):
        if way == "renamed twice":
            _files.restore_replaced(left / "saved")
        contents.append("".join((left / "saved" / name).read_text() for name in "01"))
    assert set(contents) == {"oldold", "newnew"}
    assert contents == sorted(contents, reverse=True)


def test_threads_that_write_one_folder_never_tear_it(tmp_path: Path, way: str) -> None:
    path = tmp_path / "saved"

    def write(text: str) -> None:
        for _ in range(12):
            make_folder(path, text, text)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "abcd"))
    assert len({(path / name).read_text() for name in "01"}) == 1
    assert names(tmp_path) == ["saved"]


def test_what_others_put_into_a_folder_stays(tmp_path: Path, way: str) -> None:
    path = tmp_path / "saved"
    make_folder(path, "old")
    (path / "notes").mkdir()
    (path / "notes" / "mine").write_text("mine")
    (path / "link").symlink_to("notes")
    with _files.whole_folder(path, keep_others=True) as folder:
        (folder / "0").write_text("new")
    assert (path / "0").read_text() == "new"
    assert (path / "link" / "mine").read_text() == "mine"
    assert (path / "link").is_symlink()
    assert names(tmp_path) == ["saved"]


def test_a_folder_that_can_not_be_moved_is_not_read_until_it_is_whole(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(whole, "is_fixed", lambda _: True)

    def write(path: Path) -> None:
        with _files.whole_folder(path / "saved", keep_others=True, key="key") as folder:
            (folder / "in").mkdir()
            for name in ("key", "a", "in/b"):
                (folder / name).write_text("new")

    (tmp_path / "all" / "saved" / "in").mkdir(parents=True)
    for name in ("key", "a", "in/b", "mine"):
        (tmp_path / "all" / "saved" / name).write_text("old")
    seen = []
    for left in every_kill(tmp_path / "all", write):
        assert (left / "saved" / "mine").read_text() == "old"
        if (left / "saved" / "key").exists():
            seen.append(
                "".join((left / "saved" / name).read_text() for name in ("key", "a", "in/b"))
            )
    assert set(seen) == {"oldoldold", "newnewnew"}


# --- Locks ----------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_ends_with_its_process(tmp_path: Path) -> None:
    with (
        _files.locked(tmp_path, "is in use."),
        pytest.raises(OSError, match=rf"'{tmp_path}' is in use\."),
        _files.locked(tmp_path, "is in use."),
    ):
        pass

    def hold() -> None:
        with _files.locked(tmp_path, "is in use."):
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed_at(10**6, hold)
    with _files.locked(tmp_path, "is in use."):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError("none")])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch, error: Exception) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(whole.FileLock, "acquire", failing)
    with (
        pytest.warns(UserWarning, match=r"can't be locked \(.*\): let no other process wr"),
        _files.locked(tmp_path, "is in use."),
    ):
        pass


# --- JSON -----------------------------------------------------------------------------------------


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    content = {os.fsdecode(b"\xff"): [os.fsdecode(b"caf\xe9"), "\U0001f431"]}
    _files.write_json(tmp_path / "file", content)
    assert _files.read_json(tmp_path / "file") == content
    checksum = _files.checksum_of_fields(content)
    assert checksum == _files.checksum_of_fields({**content, "sha256": "any"})
    assert checksum != _files.checksum_of_fields({**content, "more": 0})


def test_a_pipe_or_an_endless_device_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to("itself")
    for name in ("pipe", "zero", "itself", "."):
        for read in (_files.read_json, _files.checksum, _files.MappedTensors):
            with pytest.raises(ValueError, match="is damaged: it is not a file"):
                read(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("read", [_files.read_json, _files.checksum, _files.MappedTensors])
def test_a_disk_that_can_not_be_read_is_told_with_the_file(tmp_path: Path, read: Any) -> None:
    (tmp_path / "file").symlink_to("/proc/self/mem")  # whose first bytes are an EIO
    with pytest.raises(OSError, match=r"/file'"):
        read(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file' is damaged: it is not valid JSON"):
        _files.read_json(tmp_path / "file")


def test_a_file_that_no_memory_holds_is_damaged(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 43)  # of zeros, which take no room on the disk
    with pytest.raises(ValueError, match=r"file' is damaged: it is not valid JSON \(MemoryError"):
        _files.read_json(tmp_path / "file")


# --- Files of earlier versions --------------------------------------------------------------------


def test_a_checkpoint_of_the_first_format() -> None:
    checkpoint = newest_checkpoint(OLD_FILES / "checkpoints")
    assert (checkpoint.step, checkpoint.figure) == (3, 0.5)
    weights = checkpoint.weights()
    assert weights["w"].equal(torch.arange(3.0))
    assert weights["n"].equal(torch.tensor(7))
    state = checkpoint.state()
    assert state["identity"] == {"class names": ["\udcff"]}
    values, flag = state["moments"][0]
    assert values.equal(torch.arange(4.0).bfloat16())
    assert flag is True


def test_an_index_of_the_first_format() -> None:
    index = ImageIndex.load(OLD_FILES / "index")
    index.verify()
    rows = torch.nn.functional.normalize(torch.arange(24.0).reshape(6, 4).sin()).half()
    assert index.embeddings.equal(rows)
    assert index.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert index.class_names == ["ant", "bee", "c\udcfft"]
    assert index.paths == ["a.png", None, "\udcff.png", "d", "e", "f"]
    assert index.search(rows[2].float(), k=1)[0].path == "\udcff.png"


def test_cached_features_of_the_first_format() -> None:
    (path,) = (OLD_FILES / "features").iterdir()
    features = CachedFeatures(path)
    assert features.labels.tolist() == [0, 1, 0]
    assert features.class_names == ["ant", "bee"]
    sums = [float(features[i][0].double().sum()) for i in range(3)]
    assert sums == [13.6505126953125, 12.986488342285156, 1.743896484375]
