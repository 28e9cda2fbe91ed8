"""Which items a process loads: slices of batches, continued runs, samplers of every kind."""

import random
from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from transformers import CLIPImageProcessor

from pairclip import ClassBalancedSampler, PairSampler
from pairclip._randomness import random_state_kept
from pairclip.datasets import LabelledImages
from pairclip.finetuner import batches
from pairclip.finetuner.batches import ItemKey, RunBatches, TrainingItems
from pairclip.finetuner.images import FitImages
from pairclip.towers.preprocess import Preprocess

LABELS = [number % 3 for number in range(24)]


class Lists:
    """A batch sampler without `set_epoch`, of the epochs that it was given."""

    def __init__(self, *epochs: list[Any]) -> None:
        self.epochs = list(epochs)
        self.iterated = 0

    def __iter__(self) -> Iterator[Any]:
        self.iterated += 1
        return iter(self.epochs[(self.iterated - 1) % len(self.epochs)])

    def __len__(self) -> int:
        return len(self.epochs[0])


class Drawing:
    """Draws its batches from all global generators, at the last moment."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            drawn = [random.randrange(24), np.random.randint(24), torch.randint(24, ()).item()]  # noqa: NPY002
            yield [*drawn, *torch.randperm(24)[:3].tolist()]

    def __len__(self) -> int:
        return 4


class DrawingInIter(Drawing):
    """Draws all batches of an epoch as soon as it is iterated, as a torch sampler's seed is."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(super().__iter__()))


SAMPLERS = {
    "pairs": lambda: PairSampler(LABELS, 3, seed=1),
    "balanced": lambda: ClassBalancedSampler(LABELS, 3, 2, seed=1),
    "balanced, short epochs": lambda: ClassBalancedSampler(LABELS, 3, 2, num_batches=1),
    "sequential": lambda: BatchSampler(SequentialSampler(range(24)), 6, drop_last=False),
    "random": lambda: BatchSampler(RandomSampler(range(24)), 6, drop_last=True),
    "uneven": lambda: BatchSampler(RandomSampler(range(22)), 6, drop_last=False),
    "drawing": Drawing,
    "drawing in iter": DrawingInIter,
    "lists": lambda: Lists([[0, 1], [2, 3, 4, 5]], [[6, 7], [8, 9, 10, 11]]),
}


def run_of(sampler: Any, *steps: int, **arguments: Any) -> list[list[ItemKey]]:
    return list(RunBatches(sampler, num_items=24, steps=range(*steps), **arguments))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_continued_run_has_the_very_same_keys(name: str) -> None:
    whole = run_of(SAMPLERS[name](), 11)
    assert len(whole) == 11
    for start in (0, 1, 3, 4, 5, 8, 10, 11):
        random.seed(start)
        np.random.seed(start)  # noqa: NPY002
        torch.manual_seed(start)
        assert run_of(SAMPLERS[name](), start, 11) == whole[start:]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("world", [1, 2])
def test_slices_of_the_processes_make_up_the_batches(name: str, world: int) -> None:
    whole = run_of(SAMPLERS[name](), 9)
    shares = [
        run_of(SAMPLERS[name](), 9, process=process, num_processes=world)
        for process in range(world)
    ]
    for number, batch in enumerate(whole):
        slices = [share[number] for share in shares]
        assert len({len(part) for part in slices}) == 1
        assert [key for part in slices for key in part] == batch


@given(
    share=st.integers(1, 5),
    world=st.integers(1, 6),
    num_batches=st.integers(1, 4),
    steps=st.integers(1, 11),
    start=st.integers(0, 11),
)
@settings(deadline=None, derandomize=True)
def test_any_batches_any_processes_any_part_of_a_run(
    share: int, world: int, num_batches: int, steps: int, start: int
) -> None:
    size = share * world
    items = np.random.default_rng(size).integers(0, 24, (num_batches, size)).tolist()
    slices = [
        run_of(Lists(items), min(start, steps), steps, process=process, num_processes=world)
        for process in range(world)
    ]
    expected = []
    for step in range(min(start, steps), steps):
        epoch, batch = divmod(step, num_batches)
        first = batch * size
        expected.append([ItemKey(epoch, first + i, items[batch][i]) for i in range(size)])
    assert [[key for part in parts for key in part] for parts in zip(*slices, strict=True)] == (
        expected
    )
    assert all(len(part) == share for parts in slices for part in parts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_key_is_the_epoch_and_the_place_in_it(name: str) -> None:
    batches = run_of(SAMPLERS[name](), 9)
    per_epoch = len(SAMPLERS[name]())
    for start in range(0, 9, per_epoch):
        keys = [key for batch in batches[start : start + per_epoch] for key in batch]
        assert {key.epoch for key in keys} == {start // per_epoch}
        assert [key.position for key in keys] == list(range(len(keys)))


@pytest.mark.parametrize("name", ["random", "drawing", "drawing in iter"])
def test_the_seed_decides_what_a_sampler_without_one_draws(name: str) -> None:
    runs = []
    for seed, global_seed in ((5, 1), (5, 2), (6, 1)):
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        torch.manual_seed(global_seed)
        batches = run_of(SAMPLERS[name](), 8, seed=seed)
        runs.append([[key.item for key in batch] for batch in batches])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][:4] != runs[0][4:]  # another epoch


def test_a_sampler_and_the_rest_of_the_program_draw_apart() -> None:
    undisturbed = run_of(Drawing(), 6)
    random.seed(3)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    wanted = [(random.random(), torch.rand(()), np.random.random()) for _ in range(6)]  # noqa: NPY002
    random.seed(3)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    disturbed = []
    for batch, numbers in zip(
        RunBatches(Drawing(), num_items=24, steps=range(6)), wanted, strict=True
    ):
        disturbed.append(batch)
        assert numbers == (random.random(), torch.rand(()), np.random.random())  # noqa: NPY002
    assert disturbed == undisturbed


def test_a_sampler_with_epochs_starts_at_the_first_and_can_be_used_again() -> None:
    sampler = ClassBalancedSampler(LABELS, 3, 2, seed=1)
    list(sampler)
    next(iter(sampler))
    assert sampler.state_dict() == {"seed": 1, "epoch": 1, "batch": 1}
    found = run_of(sampler, 6)
    assert found == run_of(ClassBalancedSampler(LABELS, 3, 2, seed=1), 6)
    # Six batches of four an epoch: the third of epoch 1 is next.
    assert sampler.state_dict() == {"seed": 1, "epoch": 1, "batch": 2}
    rest = list(sampler)
    again = ClassBalancedSampler(LABELS, 3, 2, seed=1)
    assert rest == [*again, *again][6:8]


def test_set_epoch_is_called_for_each_epoch_from_that_of_the_first_step() -> None:
    class Epochs(Lists):
        calls: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.calls = [*getattr(self, "calls", []), epoch]

    sampler = Epochs([[0], [1], [2]])
    assert len(run_of(sampler, 4, 8)) == 4
    assert sampler.calls == [1, 2]
    assert sampler.iterated == 2


def test_a_sampler_without_epochs_is_gone_through_from_the_start() -> None:
    sampler = Lists([[0], [1]], [[2], [3]])
    assert [batch[0].item for batch in run_of(sampler, 3, 6)] == [3, 0, 1]
    assert sampler.iterated == 3


def test_no_more_batches_are_drawn_than_there_are_steps() -> None:
    drawn = []

    class Counting(Lists):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                drawn.append(batch)
                yield batch

    sampler = Counting([[0], [1], [2], [3]])
    assert len(run_of(sampler, 6)) == 6
    assert len(drawn) == 6
    assert run_of(sampler, 4, 4) == []


@pytest.mark.parametrize(
    "batch",
    [
        [3, 1, 2, 0],
        (3, 1, 2, 0),
        np.array([3, 1, 2, 0]),
        np.array([3, 1, 2, 0], dtype=np.uint8),
        torch.tensor([3, 1, 2, 0]),
        [np.int64(3), np.int32(1), 2, 0],
        [torch.tensor(3), torch.tensor(1), 2, 0],
    ],
    ids=["list", "tuple", "int64", "uint8", "tensor", "numpy numbers", "tensors"],
)
def test_batches_of_any_integers_are_taken(batch: Any) -> None:
    keys = run_of(Lists([batch]), 1)[0]
    assert keys == [ItemKey(0, i, item) for i, item in enumerate([3, 1, 2, 0])]
    assert all(type(key.item) is int for key in keys)


@pytest.mark.parametrize(
    "batch",
    [
        [0.5, 1.7],
        np.array([1.0, 2.0]),
        torch.tensor([0.0, 1.5]),
        np.array([[0, 1], [2, 3]]),
        torch.tensor([[0, 1], [2, 3]]),
        [[0, 1], [2, 3]],
        ["0", "1"],
        "01",
        [True, False],
    ],
    ids=[
        *("floats", "float array", "float tensor", "square array", "square tensor"),
        *("lists", "strings", "string", "booleans"),
    ],
)
def test_batches_of_anything_else_are_errors(batch: Any) -> None:
    with pytest.raises(TypeError, match="`sampler` must yield"):
        run_of(Lists([batch]), 1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([0, 24], r"indices must be in \[0, 24\)"),
        ([-1, 0], r"the batch \[-1, 0\]"),
        (np.array([], dtype=np.int64), "indices must be in"),
        (torch.tensor([24]), "labels_of"),
    ],
)
def test_indices_that_the_dataset_lacks_are_errors(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(Lists([batch]), 1)


def test_no_batch_at_all_is_an_error() -> None:
    for batch in (3, {0, 1}, iter([0, 1])):
        with pytest.raises(TypeError, match="`sampler` must yield batches, lists of indices, got"):
            run_of(Lists([batch]), 1)


def test_a_batch_that_processes_cannot_divide_is_an_error_on_each_of_them() -> None:
    for process in range(4):
        batches = iter(
            RunBatches(
                Lists([[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
                num_items=24,
                steps=range(2),
                process=process,
                num_processes=4,
            )
        )
        assert [key.item for key in next(batches)] == [process]
        message = "A batch of 6 images can't be divided among 4 processes. Choose a batch size"
        with pytest.raises(ValueError, match=message):
            next(batches)


def test_fewer_images_than_processes_are_an_error() -> None:
    with pytest.raises(ValueError, match="A batch of 1 images can't be divided among 2"):
        run_of(Lists([[0]]), 1, process=1, num_processes=2)


@pytest.mark.parametrize("count", [1, 3])
def test_a_sampler_of_another_length_is_an_error_before_a_batch_too_many(count: int) -> None:
    class Wrong(Lists):
        def __len__(self) -> int:
            return 2

    batches = iter(RunBatches(Wrong([[0]] * count), num_items=24, steps=range(5)))
    for _ in range(min(count, 2)):
        assert next(batches) == [ItemKey(0, ANY, 0)]
    with pytest.raises(ValueError, match=r"batches in epoch 0, but its len\(\) is 2"):
        next(batches)


# Items


def noisy(image: Any) -> torch.Tensor:
    noise = random.random() + np.random.random()  # noqa: NPY002
    return torch.tensor([noise, torch.rand(()).item(), float(np.asarray(image)[0, 0, 0])])


def items(seed: int = 0) -> TrainingItems:
    pictures = np.zeros((24, 4, 4, 3), np.uint8)
    pictures[:, 0, 0, 0] = range(24)
    return TrainingItems(FitImages(LabelledImages((pictures, LABELS)), None), noisy, seed=seed)


def test_an_item_draws_what_its_key_says_whatever_is_loaded_beside_it() -> None:
    keys = [ItemKey(0, 0, 5), ItemKey(0, 1, 5), ItemKey(1, 0, 5), ItemKey(0, 2, 7)]
    together = items().__getitems__(keys)
    alone = [items().__getitems__([key])[0] for key in reversed(keys)][::-1]
    for (one, label, item), (other, same_label, same_item) in zip(together, alone, strict=True):
        assert one.equal(other)
        assert (label, item) == (same_label, same_item)
    assert [value[2].item() for value, *_ in together] == [5, 5, 5, 7]
    assert [label for _, label, _ in together] == [LABELS[5]] * 3 + [LABELS[7]]
    for column in (0, 1):  # one item at other times, and other items, draw something else
        assert len({value[column].item() for value, *_ in together}) == 4
    other_seed = items(seed=1).__getitems__(keys)
    assert not {value[1].item() for value, *_ in together} & {v[1].item() for v, *_ in other_seed}


@pytest.mark.parametrize("kind", ["array", "joined", "sequence", "transform"])
def test_items_are_seeded_where_anything_may_draw(kind: str, monkeypatch) -> None:
    class Noisy(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            return np.random.randint(0, 256, (4, 4, 3)).astype(np.uint8)  # noqa: NPY002

    pictures: Any = np.zeros((24, 4, 4, 3), np.uint8)
    data: Any = (Noisy(pictures) if kind == "sequence" else pictures, LABELS)
    if kind == "joined":
        data = ConcatDataset([Subset(data, range(12)), Subset(data, range(12, 24))])
    processor = CLIPImageProcessor(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    preprocess = Preprocess(noisy if kind == "transform" else processor)
    seeded: list[Any] = []
    monkeypatch.setattr(batches, "seed_all", lambda *what: seeded.append(what))
    loaded = TrainingItems(FitImages(LabelledImages(data), None), preprocess, seed=0)
    assert len(loaded.__getitems__([ItemKey(0, 0, 5), ItemKey(0, 1, 20)])) == 2
    assert len(seeded) == (0 if kind in ("array", "joined") else 2)


def test_loading_items_leaves_the_global_generators_alone() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    items().__getitems__([ItemKey(0, 0, 0), ItemKey(0, 1, 1)])
    with pytest.raises(IndexError), random_state_kept():
        noisy(np.zeros((0, 0, 0)))  # draws, and fails
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.get_rng_state().equal(states[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_each_process_its_slices(workers: int) -> None:
    def load(process: int, world: int, workers: int) -> list[Any]:
        batches = RunBatches(
            Drawing(), num_items=24, steps=range(2, 7), process=process, num_processes=world
        )
        return list(DataLoader(items(), batch_sampler=batches, num_workers=workers))

    whole = load(0, 1, 0)
    assert len(whole) == 5
    shares = [load(process, 2, workers) for process in range(2)]
    for (pixels, labels, _), (pixels_0, labels_0, _), (pixels_1, labels_1, _) in zip(
        whole, *shares, strict=True
    ):
        assert torch.cat([pixels_0, pixels_1]).equal(pixels)
        assert torch.cat([labels_0, labels_1]).equal(labels)
        assert labels.dtype == torch.int64
