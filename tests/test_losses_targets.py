"""Losses on targets against a float64 brute force."""

import doctest
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pairclip import (
    AllPairsCosineLoss,
    CosinePairLoss,
    PreservingLoss,
    TargetSimilarityLoss,
    all_pairs_cosine_loss,
    hierarchy_targets,
    multi_label_targets,
    target_similarity_loss,
)
from pairclip.losses import targets as implementation

checked = settings(deadline=None, derandomize=True, max_examples=80)
seeds = st.integers(0, 2**32 - 1)


def random_rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def batches(draw):
    size, width, depth = (draw(st.integers(low, 24)) for low in (2, 1, 1))
    rows = random_rows(size, width, seed=draw(seeds))
    targets = random_rows(size, depth, seed=draw(seeds))
    for matrix in rows, targets:
        matrix *= 10 ** (2 * random_rows(size, 1, seed=draw(seeds)))
        matrix[draw(st.lists(st.integers(0, size - 1), max_size=2))] = 0
    return rows, targets


def cosines(rows):
    first, second = torch.triu_indices(len(rows), len(rows), 1)
    unit = torch.where(rows.any(1, keepdim=True), rows, 0) / rows.norm(dim=1, keepdim=True).where(
        rows.any(1, keepdim=True), 1.0
    )
    return (unit[first] * unit[second]).sum(1)


def brute_force(embeddings, targets):
    return (cosines(embeddings) - cosines(targets.to(embeddings))).square().mean()


def value_and_gradient(loss, rows):
    rows = rows.detach().clone().requires_grad_()
    value = loss(rows)
    value.backward()
    return value.detach(), rows.grad


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@settings(checked, max_examples=200)
@given(batches())
def test_target_similarity_is_the_brute_force(batch):
    rows, targets = batch
    value, gradient = value_and_gradient(lambda x: target_similarity_loss(x, targets), rows)
    expected, of_expected = value_and_gradient(lambda x: brute_force(x, targets), rows)
    of_expected[~rows.any(1)] = 0
    assert_close(value, expected)
    length = rows.norm(dim=1, keepdim=True)
    assert_close(gradient * length, of_expected * length)
    assert not gradient[~rows.any(1)].any()


@pytest.mark.parametrize("shape", [(9, 20, 30), (40, 20, 30), (40, 3, 2), (40, 3, 200)])
def test_which_way_it_is_computed_does_not_matter(shape):
    size, width, depth = shape
    rows, targets = random_rows(size, width), random_rows(size, depth, seed=1)
    expected = value_and_gradient(lambda x: brute_force(x, targets), rows)
    actual = value_and_gradient(lambda x: target_similarity_loss(x, targets), rows)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize(("size", "width", "depth"), [(2048, 16, 16), (65, 32, 32), (300, 4, 200)])
def test_there_are_no_products_of_rows_where_there_are_more_than_columns(size, width, depth):
    rows = random_rows(size, width).requires_grad_()
    targets = random_rows(size, depth, seed=1)
    with LargestTensor() as largest:
        target_similarity_loss(rows, targets).backward()
    assert largest.numel <= max(rows.numel(), targets.numel(), (width + depth) ** 2)
    assert largest.numel < size**2
    with LargestTensor() as largest:
        brute_force(rows, targets).backward()
    assert largest.numel > size * (size - 1) // 2


@checked
@given(batches(), st.integers(1, 5))
def test_one_hot_targets_are_the_squared_pair_loss_but_for_pairs_of_one_class(batch, classes):
    rows, _ = batch
    labels = torch.arange(len(rows)) % classes
    first, second = torch.triu_indices(len(rows), len(rows), 1)
    same = labels[first] == labels[second]
    pairs = len(first)
    loss = target_similarity_loss(rows, F.one_hot(labels))
    squared = all_pairs_cosine_loss(rows, labels, negatives="squared")
    distance = 1 - cosines(rows)[same]
    assert_close(loss - distance.square().sum() / pairs, squared - distance.sum() / pairs)


def test_float32_is_as_good_as_its_rounding():
    rows = 3 + random_rows(4000, 32, dtype=torch.float32)
    targets = rows + 0.1 * random_rows(4000, 32, seed=1, dtype=torch.float32)
    value, gradient = value_and_gradient(lambda x: target_similarity_loss(x, targets), rows)
    expected, of_expected = value_and_gradient(
        lambda x: target_similarity_loss(x, targets), rows.double()
    )
    assert value.dtype == torch.float32
    assert abs(value - expected) < 1e-7
    assert (gradient - of_expected).norm() < 1e-3 * of_expected.norm()


@pytest.mark.parametrize("size", [10, 400])
def test_embeddings_that_are_their_own_targets_cost_nothing(size):
    rows = random_rows(size, 16, dtype=torch.float32)
    value, gradient = value_and_gradient(lambda x: target_similarity_loss(x, x.detach()), rows)
    assert 0 <= value < 1e-9
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    rows, targets = random_rows(40, 8).to(dtype), random_rows(40, 3, seed=1)
    expected = value_and_gradient(lambda x: target_similarity_loss(x, targets), rows.float())
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(lambda x: target_similarity_loss(x, targets), rows)
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_targets_may_be_any_numbers(dtype):
    rows = random_rows(9, 4)
    targets = (random_rows(9, 3, seed=1) > 0).to(dtype)
    expected = target_similarity_loss(rows, targets.double())
    assert torch.equal(target_similarity_loss(rows, targets), expected)
    assert torch.equal(target_similarity_loss(rows, targets.numpy()), expected)
    assert torch.equal(TargetSimilarityLoss()(rows, None, targets), expected)


@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_without_pairs_costs_zero_and_is_differentiable(size):
    value, gradient = value_and_gradient(
        lambda x: target_similarity_loss(x, torch.ones(size, 2)), random_rows(size, 3)
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros(size, 3, dtype=torch.float64))


def test_what_is_not_finite_makes_the_loss_nan():
    for size in 4, 40:
        rows = random_rows(size, 3)
        rows[1, 1] = math.nan
        assert target_similarity_loss(rows, torch.ones(size, 2)).isnan()


def test_second_derivative_is_an_error():
    rows = random_rows(4, 3).requires_grad_()
    loss = target_similarity_loss(rows, torch.ones(4, 2))
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="`target_similarity_loss` has no second derivatives"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.ones(3), ValueError, r"`targets` must have one row per .*\[3, K\], got \[3\]"),
        (torch.ones(4, 2), ValueError, r"one row per embedding, shape \[3, K\], got \[4, 2\]"),
        (None, TypeError, "`targets` must be a tensor or an array of numbers, got NoneType"),
        ([[1.0]] * 3, TypeError, "an array of numbers, got list"),
        (torch.ones(3, 2) * 1j, TypeError, "an array of numbers, got torch.complex64"),
        (torch.ones(3, 2).requires_grad_(), ValueError, r"Pass `targets.detach\(\)`"),
    ],
)
def test_wrong_targets_are_an_error(targets, error, message):
    with pytest.raises(error, match=message):
        target_similarity_loss(torch.ones(3, 2), targets)
    for what in "embeddings", "similarities":
        loss = PreservingLoss(AllPairsCosineLoss(), weight=1, what=what)
        with pytest.raises(error, match=message):
            loss(torch.ones(3, 2), torch.arange(3), targets)


def test_the_example_of_the_moments_is_right():
    failed, attempted = doctest.testmod(implementation)
    assert attempted > 5
    assert not failed


PATHS = [
    ("animal", "dog", "poodle"),
    ("animal", "dog", "boxer"),
    ("animal", "cat", "persian"),
    ("plant", "tree", "boxer"),
    ("plant", "dog", "poodle"),
]


@pytest.mark.parametrize("weights", [None, [1, 2, 3], (0.5, 0.25, 0.25)])
def test_rows_of_a_tree_are_as_similar_as_the_levels_that_they_share(weights):
    targets = hierarchy_targets(PATHS, weights)
    shares = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    for a, of_a in zip(PATHS, targets, strict=True):
        for b, of_b in zip(PATHS, targets, strict=True):
            shared = 0
            while shared < 3 and a[shared] == b[shared]:
                shared += 1
            assert of_a @ of_b == pytest.approx(shares[:shared].sum(), abs=1e-6)


def test_labels_of_a_tree_may_be_numbers_and_rows_of_classes_serve_their_items():
    by_class = hierarchy_targets(np.array([[0, 0], [0, 1], [1, 0]]))
    assert by_class.shape == (3, 5)
    items = by_class[torch.tensor([2, 0, 0])]
    of_items = hierarchy_targets([[1, 0], [0, 0], [0, 0]])
    assert_close(items @ items.T, of_items @ of_items.T, 1e-6)


@pytest.mark.parametrize(
    ("paths", "weights", "error", "message"),
    [
        ([("a", "b"), ("a",)], None, ValueError, r"same number of labels each, got \[1, 2\]"),
        ([], None, ValueError, r"same number of labels each, got \[\]"),
        ([()], None, ValueError, r"same number of labels each, got \[0\]"),
        (["ab", "ac"], None, TypeError, r"`paths\[0\]` must be a list of labels, got 'ab'"),
        ([("a", "b")], [1], ValueError, r"`weights` must be 2 positive numbers, .* got \[1\]"),
        ([("a", "b")], [1, 0], ValueError, r"2 positive numbers, one for each level, got \[1, 0\]"),
        ([("a", "b")], [1, math.nan], ValueError, r"2 positive numbers, .* got \[1, nan\]"),
    ],
)
def test_wrong_trees_are_an_error(paths, weights, error, message):
    with pytest.raises(error, match=message):
        hierarchy_targets(paths, weights)


def test_rows_of_several_labels_say_which_there_are():
    lists = [["b", "a", "b"], ("c",), {"a"}]
    assert multi_label_targets(lists).tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]


def test_items_without_labels_are_counted_and_similar_to_none():
    with pytest.warns(UserWarning, match="2 of 3 items have no label"):
        targets = multi_label_targets([[], [7], []])
    assert targets.tolist() == [[0], [1], [0]]


def test_a_string_is_no_list_of_labels():
    for lists, where in ((["dog", ["cat"]], r"`lists\[0\]`"), ("dog", "`lists`")):
        with pytest.raises(TypeError, match=f"{where} must be a list of labels, got 'dog'"):
            multi_label_targets(lists)


class Recorder(torch.nn.Module):
    def __init__(self, takes_targets):
        super().__init__()
        self.takes_targets = takes_targets
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, embeddings, labels, *targets):
        self.got = embeddings, labels, *targets
        return self.weight * embeddings.sum()


@checked
@given(batches(), st.sampled_from(["embeddings", "similarities"]))
def test_preserving_adds_the_distance_to_the_targets_of_all_rows(batch, what):
    rows, targets = batch
    if what == "embeddings":
        targets = random_rows(*rows.shape, seed=5)
    labels = torch.arange(len(rows)) % 4 - 1
    inner = AllPairsCosineLoss(negatives="squared")
    loss = PreservingLoss(inner, weight=0.7, what=what)

    def expected(x):
        if what == "embeddings":
            distance = (1 - F.cosine_similarity(x, targets, eps=1e-300)).mean()
        else:
            distance = target_similarity_loss(x, targets)
        return inner(x[labels >= 0], labels[labels >= 0]) + 0.7 * distance

    (value, gradient), (its_value, its_gradient) = (
        value_and_gradient(f, rows) for f in (lambda x: loss(x, labels, targets), expected)
    )
    assert_close(value, its_value)
    nonzero = rows.any(1)
    length = rows.norm(dim=1, keepdim=True)
    assert_close((gradient * length)[nonzero], (its_gradient * length)[nonzero])
    assert not gradient[~nonzero].any()


@pytest.mark.parametrize("takes_targets", [False, True])
def test_the_inner_loss_gets_the_labelled_rows_and_what_it_takes(takes_targets):
    rows, targets = random_rows(5, 3), random_rows(5, 3, seed=1)
    for labels in torch.tensor([2, -1, 0, 0, -1]), torch.tensor([2, 0, 0, 1, 1]):
        inner = Recorder(takes_targets)
        PreservingLoss(inner, weight=1)(rows, labels, targets)
        kept = labels >= 0
        expected = [rows[kept], labels[kept], *[targets[kept]] * takes_targets]
        assert len(inner.got) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(inner.got, expected, strict=True))


def test_a_batch_without_labels_is_only_preserved():
    rows, targets = random_rows(5, 3).requires_grad_(), random_rows(5, 3, seed=1)
    inner = Recorder(False)
    loss = PreservingLoss(inner, weight=2)
    value = loss(rows, torch.full((5,), -1), targets)
    assert not hasattr(inner, "got")
    assert_close(value, 2 * (1 - F.cosine_similarity(rows, targets)).mean())
    value.backward()
    assert rows.grad is not None


def test_preserving_losses_may_be_nested_and_hold_the_parameters():
    inner = Recorder(False)
    loss = PreservingLoss(PreservingLoss(inner, weight=1), weight=0.5, what="similarities")
    assert [name for name, _ in loss.named_parameters()] == ["loss.loss.weight"]
    loss(random_rows(5, 3), torch.arange(5) - 1, random_rows(5, 3, seed=1)).backward()
    assert inner.weight.grad is not None
    assert loss.takes_targets
    assert not hasattr(loss, "takes_pairs")


def test_functions_are_losses_too_and_settings_are_printed():
    loss = PreservingLoss(all_pairs_cosine_loss, weight=0.5)
    assert repr(loss) == (
        "PreservingLoss(loss=all_pairs_cosine_loss, weight=0.5, what='embeddings')"
    )
    assert "AllPairsCosineLoss" in repr(PreservingLoss(AllPairsCosineLoss(), weight=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.eye(3), torch.arange(3), torch.eye(3))


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (0.5, {"weight": 1}, TypeError, "`loss` must be callable, got 0.5"),
        (
            CosinePairLoss(),
            {"weight": 1},
            ValueError,
            "`loss` CosinePairLoss takes pairs",
        ),
        (all_pairs_cosine_loss, {"weight": 0}, ValueError, "`weight` must be positive, got 0"),
        (all_pairs_cosine_loss, {"weight": math.inf}, ValueError, "must be positive, got inf"),
        (all_pairs_cosine_loss, {"weight": "1"}, TypeError, "`weight` must be a number, got '1'"),
        (
            all_pairs_cosine_loss,
            {"weight": 1, "what": "pairs"},
            ValueError,
            "`what` must be one of 'embeddings', 'similarities', got 'pairs'",
        ),
    ],
)
def test_wrong_settings_are_an_error(loss, options, error, message):
    with pytest.raises(error, match=message):
        PreservingLoss(loss, **options)


def test_embeddings_are_kept_where_the_targets_have_their_size():
    loss = PreservingLoss(all_pairs_cosine_loss, weight=1)
    with pytest.raises(ValueError, match=r"shape of the embeddings, \[3, 2\], got \[3, 5\]. Other"):
        loss(torch.ones(3, 2), torch.arange(3), torch.ones(3, 5))
