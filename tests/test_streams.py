"""Batches from streams: what is in them, in every epoch, worker and resumed run."""

import gc
import io
import pickle
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from pairclip import AllPairsCosineLoss, CosinePairLoss, Finetuner, History, PreservingLoss
from pairclip.callbacks import Callback
from pairclip.datasets import StreamBatches
from pairclip.datasets.stream_items import StreamPlace
from pairclip.towers import random_tower

# `webdataset` leaves them to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
LEFT_OUT = pytest.mark.filterwarnings("ignore:.*are left out in epoch")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def items(count: int = 120, classes: int = 5) -> list[Any]:
    """Item i shows i, and they come in a random order of classes."""
    labels = np.random.default_rng(0).permutation(np.arange(count) % classes)
    return [(np.full((2, 2, 3), i, np.uint8), int(label)) for i, label in enumerate(labels)]


def shown(batches: Any) -> list[tuple[list[int], list[int]]]:
    return [(values[:, 0, 0, 0].tolist(), labels.tolist()) for values, labels in batches]


class Endless(IterableDataset[Any]):
    """Counts what was taken of it."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.taken += 1
            yield np.zeros((2, 2, 3), np.uint8), self.taken % 7


@LEFT_OUT
def test_batches_are_of_p_classes_times_k_items_and_use_each_item_once() -> None:
    stream = items()
    batches = shown(StreamBatches(stream, pixels, 3, 4, buffer_size=40))
    for values, labels in batches:
        assert sorted(Counter(labels).values()) == [4, 4, 4]
        assert [stream[value][1] for value in values] == labels
    used = [value for values, _ in batches for value in values]
    assert len(set(used)) == len(used) >= 96  # two batches may be left


def test_what_no_batch_takes_is_counted() -> None:
    stream = items(60, 5)
    stream[10:10] = [(np.zeros((2, 2, 3), np.uint8), 9)] * 3  # never four
    batches = StreamBatches(stream, pixels, 3, 4, buffer_size=30)
    with pytest.warns(UserWarning, match="items of the stream are left out in epoch 0") as said:
        used = sum(len(labels) for _, labels in batches)
    assert str(said[0].message).startswith(f"{63 - used} items")
    list(batches)  # said once


def test_no_more_than_the_buffer_is_taken_ahead() -> None:
    stream = Endless()
    batches = iter(StreamBatches(stream, pixels, 4, 2, buffer_size=50))
    for number in range(20):
        next(batches)
        assert stream.taken <= 50 + 8 * number


@LEFT_OUT
def test_epochs_differ_and_the_seed_decides() -> None:
    batches = StreamBatches(items(), pixels, 3, 4, buffer_size=40)
    first, second = shown(batches), shown(batches)
    assert first != second
    again = StreamBatches(items(), pixels, 3, 4, buffer_size=40)
    assert [shown(again), shown(again)] == [first, second]
    assert shown(StreamBatches(items(), pixels, 3, 4, buffer_size=40, seed=1)) != first


@LEFT_OUT
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_very_same_batches(workers: int) -> None:
    expected = shown(StreamBatches(items(), pixels_and_noise, 3, 4, buffer_size=40))
    batches = StreamBatches(items(), pixels_and_noise, 3, 4, buffer_size=40)
    assert shown(batches.load(num_workers=workers)) == expected
    batches.start_at(0, 4)
    assert shown(batches.load(num_workers=workers)) == expected[4:]


def pixels_and_noise(image: Image.Image) -> torch.Tensor:
    return pixels(image) + torch.rand(())


@LEFT_OUT
def test_a_run_goes_on_where_it_stopped() -> None:
    batches = StreamBatches(items(), pixels_and_noise, 3, 4, buffer_size=40)
    epochs = [shown(batches), shown(batches)]
    resumed = pickle.loads(
        pickle.dumps(StreamBatches(items(), pixels_and_noise, 3, 4, buffer_size=40))
    )
    resumed.start_at(1, 3)
    assert shown(resumed) == epochs[1][3:]
    once = StreamBatches(iter(items()), pixels, 3, 4, buffer_size=40)
    with pytest.raises(ValueError, match="list_iterator that can be read once"):
        once.start_at(0, 3)


ROWS = items(60, 3)


def hugging_face() -> Any:
    """A streaming dataset, shuffled anew each epoch."""
    rows = {
        "picture": [Image.fromarray(image.repeat(8, 0).repeat(8, 1)) for image, _ in ROWS],
        "kind": [label for _, label in ROWS],
    }
    features = hf.Features({"picture": hf.Image(), "kind": hf.ClassLabel(names=["a", "b", "c"])})
    stream = hf.Dataset.from_dict(rows, features=features).to_iterable_dataset(num_shards=3)
    return stream.shuffle(seed=0, buffer_size=10)


def web_dataset(folder: Path) -> Any:
    """Tar files of images and labels, as `webdataset` reads them."""
    webdataset = pytest.importorskip("webdataset")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * 20, shard * 20 + 20):
                image, label = ROWS[number]
                buffer = io.BytesIO()
                Image.fromarray(image.repeat(8, 0).repeat(8, 1)).save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("cls", f"{label}\n".encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return webdataset.WebDataset(
        [str(folder / f"{shard}.tar") for shard in range(3)], shardshuffle=False
    )


SOURCES = {
    "hugging face": lambda folder: (hugging_face(), {"image": "picture", "label": "kind"}),
    "web dataset": lambda folder: (web_dataset(folder), {"image": "png", "label": "cls"}),
    "list": lambda folder: (
        [(image.repeat(8, 0).repeat(8, 1), label) for image, label in ROWS],
        {},
    ),
}


@pytest.fixture(params=[*SOURCES])
def source(request: Any, tmp_path: Path) -> Any:
    """Makes batches of a stream, the same each time it is called."""

    def make(preprocess: Any = pixels, **options: Any) -> StreamBatches:
        stream, keys = SOURCES[request.param](tmp_path)
        return StreamBatches(stream, preprocess, 3, 2, buffer_size=18, **(keys | options))

    yield make
    gc.collect()


@LEFT_OUT
def test_streams_of_libraries_give_images_with_their_labels(source: Any) -> None:
    for workers in (0, 2):
        batches = source()
        epochs = [shown(batches.load(num_workers=workers)) for _ in range(2)]
        assert epochs[0] != epochs[1]
        for epoch in epochs:
            assert len(epoch) >= 8
            for values, labels in epoch:
                assert [ROWS[value][1] for value in values] == labels
            used = [value for values, _ in epoch for value in values]
            assert len({*used}) == len(used)


class Interrupted(Callback):
    """Breaks a fit off before the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    only_watches = True

    def on_step(self, fit: Any) -> None:
        if fit.step == self.step:
            raise KeyboardInterrupt


def trained(batches: Any, callbacks: Any = (), **options: Any) -> tuple[Any, History]:
    tower = random_tower()
    batches.preprocess = tower.preprocess
    finetuner = Finetuner(
        tower, AllPairsCosineLoss(negatives="squared"), learning_rate=1e-3, callbacks=callbacks
    )
    history = finetuner.fit(batches, **{"max_steps": 14, **options})
    return torch.cat([p.detach().flatten() for p in tower.parameters()]), history


@LEFT_OUT
def test_a_fit_on_a_stream_is_one_on_the_same_batches_of_a_dataset() -> None:
    batches = StreamBatches(
        [(image.repeat(8, 0).repeat(8, 1), label) for image, label in ROWS],
        pixels,
        3,
        2,
        buffer_size=18,
    )
    epochs = [shown(batches) for _ in range(2)]
    drawn = [batch for epoch in epochs for batch in epoch]
    weights, history = trained(batches)

    class Sampler(list[Any]):
        batch_size = 6

    tower = random_tower()
    images = np.stack([image.repeat(8, 0).repeat(8, 1) for image, _ in ROWS])
    finetuner = Finetuner(tower, AllPairsCosineLoss(negatives="squared"), learning_rate=1e-3)
    sampler = Sampler([values for values, _ in drawn])
    finetuner.fit((images, [label for _, label in ROWS]), sampler=sampler, max_steps=14)
    assert weights.equal(torch.cat([p.detach().flatten() for p in tower.parameters()]))
    numbers = [number for number, epoch in enumerate(epochs) for _ in epoch]
    assert [record["epoch"] for record in history.steps] == numbers[:14]


@LEFT_OUT
def test_a_fit_on_a_stream_resumes_exactly(source: Any, tmp_path: Path) -> None:
    expected, history = trained(source())
    end = sum(record["epoch"] == 0 for record in history.steps)
    folder: dict[str, Any] = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": 1}
    for stop, workers in ((4, 0), (end, 0), (12, 2)):  # the last is in another epoch
        with pytest.raises(KeyboardInterrupt):
            trained(source(), [Interrupted(stop + 1)], resume=True, num_workers=workers, **folder)
    weights, resumed = trained(source(), [Interrupted(99)], resume=True, **folder)
    assert weights.equal(expected)
    assert resumed.steps == history.steps


@LEFT_OUT
def test_a_stream_that_gives_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    stream = [(image.repeat(8, 0).repeat(8, 1), label) for image, label in ROWS]

    def batches(stream: Any) -> StreamBatches:
        return StreamBatches(stream, pixels, 3, 2, buffer_size=18)

    folder: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        trained(batches(stream), [Interrupted(5)], **folder)
    again: dict[str, Any] = {"callbacks": [Interrupted(99)], "resume": True, **folder}
    with pytest.raises(ValueError, match="gives other items up to batch 4 of epoch 0"):
        trained(batches(stream[::-1]), **again)
    with pytest.raises(ValueError, match="gives other items up to batch 4 of epoch 0"):
        trained(batches(stream[:20]), **again)
    with pytest.raises(ValueError, match=r"list.*tuple|tuple.*list"):
        trained(batches(tuple(stream)), **again)
    trained(batches(stream), **again)


@LEFT_OUT
def test_a_stream_that_is_read_once_trains_and_does_not_resume(tmp_path: Path) -> None:
    stream = [(image.repeat(8, 0).repeat(8, 1), label) for image, label in ROWS]
    expected, _ = trained(StreamBatches(stream, pixels, 3, 2, buffer_size=18), max_steps=6)

    def once() -> StreamBatches:
        return StreamBatches((item for item in stream), pixels, 3, 2, buffer_size=18)

    folder: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    weights, _ = trained(once(), max_steps=6, **folder)
    assert weights.equal(expected)
    with pytest.raises(ValueError, match=r"has no batch in epoch 1\. Is it one that can be"):
        trained(once(), max_steps=60)
    for path in tmp_path.glob("step-*6"):
        path.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="generator that can be read once, so no place"):
        trained(once(), max_steps=6, resume=True, **folder)


@LEFT_OUT
def test_processes_share_each_batch_of_a_stream() -> None:
    batches = StreamBatches(items(), pixels, 3, 4, buffer_size=40)
    start = StreamPlace(0, 0, 0)
    whole, first, last = (
        list(batches.run(start, 5, share)) for share in (slice(0, 12), slice(0, 6), slice(6, 12))
    )
    for all_of_it, one, other in zip(whole, first, last, strict=True):
        assert all_of_it[0].equal(torch.cat([one[0], other[0]]))
        assert all_of_it[1].equal(torch.cat([one[1], other[1]]))
        assert all_of_it[2] == one[2] == other[2]
    digests = [batch.place.digest for batch in whole]
    assert len({*digests}) == len(digests)


def broken(count: int = 2) -> list[Any]:
    """The rows, of which so many of one class hold no image."""
    stream = [(image.repeat(8, 0).repeat(8, 1), label) for image, label in ROWS]
    for position in [i for i, (_, label) in enumerate(ROWS) if label == 1][:count]:
        stream[position] = (b"no image", 1)
    return stream


@LEFT_OUT
@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_of_its_class_takes_the_place_of_one_that_can_not_be_read(
    workers: int,
) -> None:
    stream = broken()
    bad = [i for i, (image, _) in enumerate(stream) if isinstance(image, bytes)]
    expected = shown(StreamBatches(list(broken(0)), pixels, 3, 4, buffer_size=30))
    batches = StreamBatches(stream, pixels, 3, 4, buffer_size=30, on_error="skip")
    with pytest.warns(UserWarning, match=r"Item \d+ of the stream can't be read .*takes its place"):
        drawn = shown(batches.load(num_workers=workers))
    assert len(drawn) == len(expected)
    for (values, labels), (exact, same) in zip(drawn, expected, strict=True):
        assert labels == same
        for value, label, wanted in zip(values, labels, exact, strict=True):
            if wanted not in bad:
                assert value == wanted
            else:
                assert value in set(values) - {*bad}
                assert ROWS[value][1] == label
    assert sorted(problem.index for problem in batches.unreadable) == bad
    assert "cannot identify image" in batches.unreadable[0].reason
    start = StreamPlace(0, 0, 0)
    whole, first, last = (
        list(batches.run(start, 5, share)) for share in (slice(0, 12), slice(0, 6), slice(6, 12))
    )
    for all_of_it, one, other in zip(whole, first, last, strict=True):
        assert all_of_it[0].equal(torch.cat([one[0], other[0]]))


@LEFT_OUT
@pytest.mark.filterwarnings("ignore:Item .* can't be read")
def test_a_fit_lists_what_it_left_out_of_a_stream(tmp_path: Path) -> None:
    def batches(**options: Any) -> StreamBatches:
        return StreamBatches(broken(), pixels, 3, 4, buffer_size=30, **options)

    expected, history = trained(batches(on_error="skip"), max_steps=9)
    assert len(history.unreadable) == 2
    for record in history.unreadable:
        assert (record["argument"], record["path"]) == ("dataset", None)
        assert ROWS[record["index"]][1] == 1
    with pytest.raises(ValueError, match=r"Item \d+ of the stream can't be read: cannot i"):
        trained(batches(), max_steps=9)
    folder: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        trained(batches(on_error="skip"), [Interrupted(7)], max_steps=9, **folder)
    weights, resumed = trained(batches(on_error="skip"), [Interrupted(99)], max_steps=9, **folder)
    assert weights.equal(expected)
    assert resumed == history


def test_skipping_needs_another_image_that_can_be_read() -> None:
    batches = StreamBatches(broken(99), pixels, 3, 4, buffer_size=30, on_error="skip")
    with pytest.raises(ValueError, match=r"None of the 4 items of class 1 in a batch can be"):
        list(batches)
    with pytest.raises(ValueError, match="'skip' needs `samples_per_class` of at least 2, got 1"):
        StreamBatches([], pixels, 3, 1, buffer_size=30, on_error="skip")


def refused(options: dict[str, Any], loss: Any = None) -> None:
    batches = StreamBatches(items(), pixels, 3, 4, buffer_size=40)
    loss = AllPairsCosineLoss() if loss is None else loss
    Finetuner(random_tower(), loss).fit(batches, **{"max_steps": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": None}, "`max_steps` is needed: .*one pass over it, has no known length"),
        ({"sampler": [[0]]}, "`sampler` would be ignored: `dataset` is a stream"),
        ({"batch_size": 12}, "`batch_size` would be ignored"),
        ({"targets": torch.zeros(2, 2)}, "`targets` would be ignored"),
        ({"keep": [np.zeros((16, 16, 3), np.uint8)]}, "`keep` would be ignored"),
        ({"keep_share": 0.5}, "`keep_share` would be ignored"),
        ({"check": "paths"}, "`check` would be ignored"),
        ({"evaluate": len}, "`eval_every` is needed"),
        ({"checkpoint_dir": "never"}, "`checkpoint_every` is needed"),
    ],
)
def test_what_a_stream_can_not_do_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(options)


def test_losses_that_a_stream_can_not_serve_are_named() -> None:
    with pytest.raises(ValueError, match="`loss` CosinePairLoss takes pairs, and a stream gives"):
        refused({}, CosinePairLoss())
    with pytest.raises(ValueError, match="`loss` PreservingLoss takes targets"):
        refused({}, PreservingLoss(AllPairsCosineLoss(), weight=0.5))


@LEFT_OUT
def test_names_become_the_ids_that_were_given() -> None:
    stream = [(image, "abc"[label]) for image, label in items(24, 3)]
    batches = StreamBatches(stream, pixels, 3, 2, buffer_size=12, class_names=["c", "b", "a"])
    for values, labels in shown(batches):
        assert ["cba"[label] for label in labels] == [stream[value][1] for value in values]


def batches_of(item: Any, **options: Any) -> list[Any]:
    return list(StreamBatches([item], pixels, 1, 1, **{"buffer_size": 1, **options}))


F = np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize(
    ("item", "options", "error", "message"),
    [
        ((F, "x"), {}, ValueError, "Item 0 .* a name in `class_names`, got 'x'"),
        ((F, None), {}, ValueError, "must have a class id, .* got None"),
        ((F, -1), {}, ValueError, "must have a class id, .* got -1"),
        ((F, 2**63), {}, ValueError, "must have a class id, .* got 9223372036854775808"),
        ((F, torch.tensor([1, 2])), {}, ValueError, r"must have a class id, .* got tensor\(\[1, 2"),
        ((F, b"\xff"), {}, ValueError, "Item 0 .* a name in `class_names`, got"),
        ((F, "a"), {"class_names": ["a", "a"]}, ValueError, r"must be different names, got \['a'"),
        (
            {"jpg": F, "cls": 0},
            {},
            ValueError,
            r"has no \['image', 'label'\], but \['jpg'",
        ),
        (F, {}, TypeError, r"must be a pair \(image, label\) or a dict, got ndarray"),
        ((F * 1.0 + 9, 0), {}, ValueError, "Item 0 of the stream can't be read: A float image"),
        ((F, 0), {"buffer_size": 0}, ValueError, "`buffer_size` must be at least 1"),
    ],
)
def test_wrong_items_are_named(
    item: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        batches_of(item, **options)


def test_a_stream_that_is_sorted_by_class_is_refused() -> None:
    stream = sorted(items(), key=lambda item: item[1])
    with pytest.raises(ValueError, match="20 items has 1 classes, fewer than `classes_"):
        list(StreamBatches(stream, pixels, 3, 4, buffer_size=20))
    with pytest.raises(ValueError, match="`buffer_size` must be at least the 12 items of a batch"):
        StreamBatches(stream, pixels, 3, 4, buffer_size=11)
