"""Batches from streams: what is in them, in every epoch, worker and resumed run."""

import io
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets as hf
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from pairclip.datasets import StreamBatches

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
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    assert shown(loader) == expected
    batches.start_at(0, 4)
    assert shown(loader) == expected[4:]


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


@LEFT_OUT
def test_a_streaming_hugging_face_dataset() -> None:
    rows = {
        "picture": [Image.fromarray(image) for image, _ in items(24, 3)],
        "kind": [label for _, label in items(24, 3)],
    }
    features = hf.Features({"picture": hf.Image(), "kind": hf.ClassLabel(names=["a", "b", "c"])})
    stream = hf.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    batches = StreamBatches(
        stream.shuffle(seed=0, buffer_size=10),
        pixels,
        3,
        2,
        buffer_size=12,
        image="picture",
        label="kind",
    )
    epochs = [shown(batches), shown(batches)]
    for epoch in epochs:
        for values, labels in epoch:
            assert [rows["kind"][value] for value in values] == labels
    assert epochs[0] != epochs[1]


@LEFT_OUT
def test_samples_of_a_webdataset() -> None:
    def sample(number: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
        return {"__key__": str(number), "png": buffer.getvalue(), "cls": str(number % 3).encode()}

    stream = [sample(number) for number in range(12)]
    batches = StreamBatches(stream, pixels, 3, 2, buffer_size=12, image="png", label="cls")
    for values, labels in shown(batches):
        assert [value % 3 for value in values] == labels


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
