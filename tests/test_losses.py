"""Losses against torch, pytorch-metric-learning and a float64 brute force."""

import doctest
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.reducers import SumReducer
from torch.utils._python_dispatch import TorchDispatchMode

from pairclip import (
    AllPairsCosineLoss,
    CosinePairLoss,
    _vectors,
    all_pairs_cosine_loss,
    cosine_pair_loss,
    on_pairs,
)
from pairclip.finetuner.identity import describe
from pairclip.losses import (
    all_pairs_gradient,
    attraction,
    batch as batch_module,
    hinge,
    linear,
    squared,
)
from pairclip.losses.all_pairs_gradient import value_and_gradient

checked = settings(deadline=None, derandomize=True, max_examples=60)

FORMS = [
    {"negatives": "linear"},
    {"negatives": "hinge", "margin": -1.0},
    {"negatives": "hinge", "margin": 0.0},
    {"negatives": "hinge", "margin": 0.3},
    {"negatives": "squared"},
]
WITH_POSITIVE_MARGIN = [
    {"negatives": "linear", "positive_margin": 0.4},
    {"negatives": "hinge", "margin": 0.3, "positive_margin": 0.9},
    {"negatives": "squared", "positive_margin": -0.2},
]
FRACTIONS = [None, 0.0, 0.3, 1.0]

each_form = pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: "-".join(map(str, form.values()))
)
each_margin_too = pytest.mark.parametrize(
    "form", [*FORMS, *WITH_POSITIVE_MARGIN], ids=lambda form: "-".join(map(str, form.values()))
)
each_fraction = pytest.mark.parametrize("fraction", FRACTIONS)
forms = st.sampled_from([*FORMS, *WITH_POSITIVE_MARGIN])
fractions = st.sampled_from(FRACTIONS)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Thousands of small operations are slow where threads wait for a busy core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def batches(draw, smallest=2):
    labels = draw(st.lists(st.integers(-2, 4), min_size=smallest, max_size=24))
    width = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(seeds))
    rows = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    scale = torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
    return rows * 10 ** (2 * scale), torch.tensor(labels)


def random_rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_gradients(loss, *inputs):
    inputs = [rows.detach().clone().requires_grad_() for rows in inputs]
    value = loss(*inputs)
    value.backward()
    return value.detach(), *(rows.grad for rows in inputs)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def costs(similarity, same, negatives, margin=0.0, positive_margin=1.0):
    different = {
        "linear": similarity,
        "hinge": (similarity - margin).clamp(min=0),
        "squared": similarity**2,
    }[negatives]
    return torch.where(same, (positive_margin - similarity).clamp(min=0), different)


def brute_force(embeddings, labels, *, positive_fraction=None, **form):
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    similarity = F.cosine_similarity(embeddings[first], embeddings[second], eps=1e-300)
    same = labels[first] == labels[second]
    cost = costs(similarity, same, **form)
    if positive_fraction is None:
        return cost.mean()
    weights = positive_fraction, 1 - positive_fraction
    return sum(
        w * cost[kind].sum() / max(int(kind.sum()), 1)
        for w, kind in zip(weights, (same, ~same), strict=True)
    )


def pairs_of(embeddings, labels):
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    return embeddings[first], embeddings[second], labels[first] == labels[second]


def both_losses(form):
    def of_pairs(rows):
        half = len(rows) // 2
        same = torch.arange(half) % 3 == 0
        return cosine_pair_loss(rows[:half], rows[half : 2 * half], same, **form)

    def of_batch(rows):
        return all_pairs_cosine_loss(rows, torch.arange(len(rows)) % 3, **form)

    return of_pairs, of_batch


@checked
@given(batches())
def test_linear_pair_loss_is_torchs_at_margin_minus_one_less_the_constant(batch):
    rows, labels = batch
    a, b, same = pairs_of(100 * rows, labels)  # torch adds 1e-12 to squared lengths
    target = 2 * same.long() - 1

    def of_torch(a, b):
        return (
            F.cosine_embedding_loss(a, b, target, margin=-1, reduction="none") - (~same).double()
        ).mean()

    actual = value_and_gradients(lambda a, b: cosine_pair_loss(a, b, same), a, b)
    for ours, theirs in zip(actual, value_and_gradients(of_torch, a, b), strict=True):
        assert_close(ours, theirs)


@checked
@given(batches(), st.floats(-1, 0.99))
def test_hinge_pair_loss_is_torchs_at_that_margin(batch, margin):
    rows, labels = batch
    a, b, same = pairs_of(100 * rows, labels)  # torch adds 1e-12 to squared lengths
    target = 2 * same.long() - 1
    loss = CosinePairLoss(negatives="hinge", margin=margin)
    actual = value_and_gradients(lambda a, b: loss(a, b, same), a, b)
    expected = value_and_gradients(
        lambda a, b: F.cosine_embedding_loss(a, b, target, margin=margin), a, b
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@checked
@given(batches(), forms)
def test_pair_loss_is_the_brute_force(batch, form):
    a, b, same = pairs_of(*batch)
    for reduction in "sum", "mean":
        actual = value_and_gradients(
            lambda a, b, r=reduction: cosine_pair_loss(a, b, same, reduction=r, **form), a, b
        )
        expected = value_and_gradients(
            lambda a, b, r=reduction: getattr(costs(F.cosine_similarity(a, b), same, **form), r)(),
            a,
            b,
        )
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs)
    assert_close(
        cosine_pair_loss(a, b, same, reduction="none", **form),
        costs(F.cosine_similarity(a, b), same, **form),
    )


def metric_learning_mean(embeddings, labels, neg_margin, pos_margin=1):
    loss = ContrastiveLoss(
        pos_margin=pos_margin,
        neg_margin=neg_margin,
        distance=CosineSimilarity(),
        reducer=SumReducer(),
    )
    return loss(embeddings, labels) / (len(labels) * (len(labels) - 1))


@checked
@given(batches())
def test_linear_over_all_pairs_is_metric_learnings_contrastive_loss_less_the_constant(batch):
    rows, labels = batch
    constant = (labels[:, None] != labels).double().sum() / (len(labels) * (len(labels) - 1))
    actual = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels), rows)
    expected = value_and_gradients(lambda x: metric_learning_mean(x, labels, -1) - constant, rows)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@checked
@given(batches(), st.floats(-0.95, 0.95), st.floats(-0.95, 1))
def test_hinge_over_all_pairs_is_metric_learnings_contrastive_loss(batch, margin, positive_margin):
    rows, labels = batch
    form = {"negatives": "hinge", "margin": margin, "positive_margin": positive_margin}
    actual = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels, **form), rows)
    expected = value_and_gradients(
        lambda x: metric_learning_mean(x, labels, margin, positive_margin), rows
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@settings(checked, max_examples=120)
@given(batches(), forms, fractions)
def test_all_pairs_are_the_brute_force(batch, form, fraction):
    rows, labels = batch
    options = form | {"positive_fraction": fraction}
    actual = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels, **options), rows)
    expected = value_and_gradients(lambda x: brute_force(x, labels, **options), rows)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@checked
@given(batches(), forms, st.floats(0, 1))
def test_positive_fraction_is_the_expected_pair_loss(batch, form, fraction):
    rows, labels = batch
    a, b, same = pairs_of(rows, labels)
    loss = CosinePairLoss(**form)
    expected = sum(
        weight * loss(a[kind], b[kind], same[kind])
        for weight, kind in ((fraction, same), (1 - fraction, ~same))
    )
    assert_close(all_pairs_cosine_loss(rows, labels, positive_fraction=fraction, **form), expected)


SIZES_AND_WIDTHS = {
    "fewer rows than columns": ([3, 2, 1], 8),
    "as many rows as columns": ([4, 3, 1], 8),
    "one row more than columns": ([4, 3, 2], 8),
    "single items": ([1] * 40, 8),
    "one column": ([1, 2, 3], 1),
    "small classes": ([1, 2, 3, 4, 5, 6, 7, 7], 8),
    "large classes": ([8, 9, 20], 8),
    "small and large classes": ([1, 1, 2, 3, 5, 7, 8, 9, 30, 4, 4], 8),
    "one large class": ([50], 8),
    "one large class and a single item": ([50, 1], 8),
}


@each_margin_too
@pytest.mark.parametrize("fraction", [None, 0.3])
@pytest.mark.parametrize("sizes", SIZES_AND_WIDTHS)
def test_class_sizes_do_not_matter(form, fraction, sizes):
    sizes, width = SIZES_AND_WIDTHS[sizes]
    labels = torch.repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    options = form | {"positive_fraction": fraction}
    actual = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), random_rows(len(labels), width)
    )
    expected = value_and_gradients(
        lambda x: brute_force(x, labels, **options), random_rows(len(labels), width)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@checked
@given(batches(), forms, fractions, st.integers(1, 50))
def test_zero_columns_change_nothing_so_blocks_do_not_matter(batch, form, fraction, columns):
    rows, labels = batch
    options = form | {"positive_fraction": fraction}
    value, gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), rows
    )
    wide_value, wide_gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), F.pad(rows, (0, columns))
    )
    assert_close(wide_value, value)
    assert_close(wide_gradient, F.pad(gradient, (0, columns)))


@checked
@given(batches(smallest=12), forms, fractions, st.integers(1, 6))
def test_length_of_addition_chains_and_pieces_does_not_matter(batch, form, fraction, chain):
    rows, labels = batch
    options = form | {"positive_fraction": fraction}
    expected = value_and_gradients(lambda x: brute_force(x, labels, **options), rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_vectors, "_CHAIN", chain)
        patch.setattr(batch_module, "_PIECE", chain * rows.shape[1])
        actual = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels, **options), rows)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@settings(checked, max_examples=80)
@given(batches(), forms, fractions, st.sampled_from([2, 256]))
def test_class_slots_of_an_accelerator_give_the_same(batch, form, fraction, chain):
    rows, labels = batch
    options = form | {"positive_fraction": fraction}
    expected = value_and_gradients(lambda x: brute_force(x, labels, **options), rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_vectors, "_CHAIN", chain)
        patch.setattr(_vectors, "at_hand", lambda tensor: False)
        actual = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels, **options), rows)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


def on_meta(negatives, positive_margin=1.0):
    rows = torch.empty(9, 4, device="meta")
    labels = torch.empty(9, dtype=torch.int64, device="meta")
    return value_and_gradient(rows, labels, negatives, 0.0, positive_margin, 0.5, wanted=True)[
        1
    ].shape


@pytest.mark.parametrize("negatives", ["linear", "hinge"])
def test_linear_and_hinge_never_read_a_value_back_to_the_host(negatives):
    assert on_meta(negatives) == (9, 4)
    assert on_meta(negatives, 0.5) == (9, 4)


def test_squared_reads_class_sizes_back_so_the_check_above_can_fail():
    with pytest.raises(NotImplementedError, match="meta"):
        on_meta("squared")


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@each_margin_too
@pytest.mark.parametrize("classes", [4096, 800, 10, 1])
def test_no_tensor_is_larger_than_the_embeddings(form, classes):
    rows = random_rows(4096, 16, dtype=torch.float32).requires_grad_()
    labels = torch.arange(4096) % classes
    with LargestTensor() as largest:
        all_pairs_cosine_loss(rows, labels, **form).backward()
    assert rows.numel() <= largest.numel <= rows.numel() + 1


@each_form
def test_memory_check_sees_the_brute_force(form):
    rows = random_rows(512, 16).requires_grad_()
    with LargestTensor() as largest:
        brute_force(rows, torch.arange(512) % 10, **form).backward()
    assert largest.numel > 512 * 511 // 2


@checked
@given(batches(), forms, fractions, seeds)
def test_length_of_rows_does_not_matter(batch, form, fraction, seed):
    rows, labels = batch
    scale = torch.exp(5 * random_rows(len(rows), 1, seed=seed))
    options = form | {"positive_fraction": fraction}
    value, gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), rows
    )
    scaled_value, scaled_gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), rows * scale
    )
    assert_close(scaled_value, value)
    assert_close(scaled_gradient * scale, gradient)
    a, b, same = pairs_of(rows, labels)
    long_a, long_b, _ = pairs_of(rows * scale, labels)
    assert_close(
        cosine_pair_loss(long_a, long_b, same, **form), cosine_pair_loss(a, b, same, **form)
    )


@checked
@given(batches(), forms, fractions, seeds)
def test_order_of_rows_does_not_matter(batch, form, fraction, seed):
    rows, labels = batch
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    options = form | {"positive_fraction": fraction}
    value, gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), rows
    )
    moved_value, moved_gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels[order], **options), rows[order]
    )
    assert_close(moved_value, value)
    assert_close(moved_gradient, gradient[order])


@checked
@given(batches(), forms, fractions, st.randoms(use_true_random=False))
def test_names_of_classes_do_not_matter(batch, form, fraction, random):
    rows, labels = batch
    names = [-(2**63), 2**63 - 1, 2**63 - 2, 2**53, 2**53 + 1, -1, 0]
    random.shuffle(names)
    renamed = torch.tensor(names)[labels + 2]
    options = form | {"positive_fraction": fraction}
    assert_close(
        all_pairs_cosine_loss(rows, renamed, **options),
        all_pairs_cosine_loss(rows, labels, **options),
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool])
def test_labels_may_be_any_integers(dtype):
    rows, labels = random_rows(9, 4), torch.arange(9) % 2
    expected = all_pairs_cosine_loss(rows, labels)
    assert_close(all_pairs_cosine_loss(rows, labels.to(dtype)), expected)
    assert_close(all_pairs_cosine_loss(rows, labels.tolist()), expected)
    assert_close(all_pairs_cosine_loss(rows.numpy(), labels.numpy()), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, list])
def test_same_may_be_bool_or_zero_and_one(dtype):
    a, b = random_rows(2, 5, 3)
    same = torch.tensor([True, False, True, False, False])
    given_same = same.tolist() if dtype is list else same.to(dtype)
    assert_close(
        cosine_pair_loss(a, b, given_same, reduction="none"),
        costs(F.cosine_similarity(a, b), same, "linear"),
    )


@each_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(form, dtype):
    rows = random_rows(40, 8, dtype=torch.float32).to(dtype)
    for loss in both_losses(form):
        value, gradient = value_and_gradients(loss, rows)
        expected_value, expected_gradient = value_and_gradients(loss, rows.float())
        assert value.dtype == torch.float32
        assert torch.equal(value, expected_value)
        assert torch.equal(gradient, expected_gradient.to(dtype))


@each_form
def test_float32_and_float64_stay_what_they_are(form):
    for loss in both_losses(form):
        for dtype in torch.float32, torch.float64:
            assert loss(random_rows(12, 4, dtype=dtype)).dtype == dtype


@each_form
def test_autocast_changes_nothing(form):
    rows = random_rows(40, 8, dtype=torch.float32)
    for loss in both_losses(form):
        expected = value_and_gradients(loss, rows)
        with torch.autocast("cpu", torch.bfloat16):
            actual = value_and_gradients(loss, rows)
        for inside, outside in zip(actual, expected, strict=True):
            assert inside.dtype == torch.float32
            assert torch.equal(inside, outside)


@each_margin_too
@pytest.mark.parametrize("fraction", [None, 0.3])
@pytest.mark.parametrize("shape", [(24, 5), (8, 20)])
def test_zero_row_has_similarity_zero_and_gradient_zero(form, fraction, shape):
    rows = random_rows(*shape)
    zero = torch.tensor([0, 1, 6])
    rows[zero] = 0
    labels = torch.arange(len(rows)) // 3
    options = form | {"positive_fraction": fraction}
    value, gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), rows
    )
    expected, expected_gradient = value_and_gradients(
        lambda x: brute_force(x, labels, **options), rows
    )
    expected_gradient[zero] = 0
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)
    assert not gradient[zero].any()


@each_margin_too
def test_pair_with_a_zero_row_has_similarity_zero_and_gradient_zero(form):
    a, b = random_rows(2, 5, 3)
    a[0] = a[1] = b[1] = b[2] = 0
    same = torch.tensor([True, False, False, True, False])
    value, of_a, of_b = value_and_gradients(
        lambda a, b: cosine_pair_loss(a, b, same, reduction="none", **form)[:3].sum(), a, b
    )
    different = max(0.0, -form.get("margin", 0.0))
    assert value == max(0.0, form.get("positive_margin", 1.0)) + 2 * different
    assert not of_a[:2].any()
    assert not of_b[1:3].any()
    assert of_a.isfinite().all()
    assert of_b.isfinite().all()


@each_form
@pytest.mark.parametrize("exponent", [-83, 83])
def test_tiny_and_huge_rows_lose_nothing_in_float32(form, exponent):
    rows = random_rows(40, 8, dtype=torch.float32)
    rows = rows / rows.norm(dim=1, keepdim=True)
    scale = torch.ones(40, 1)
    scale[::2] = 2.0**exponent
    for loss in both_losses(form):
        value, gradient = value_and_gradients(loss, rows)
        scaled_value, scaled_gradient = value_and_gradients(loss, rows * scale)
        assert_close(scaled_value, value, 1e-6)
        assert_close(scaled_gradient * scale, gradient, 1e-6)
        assert gradient.abs().max() > 1e-3


@each_form
@pytest.mark.parametrize("shape", [(20, 4), (4, 20)])
def test_kind_of_pair_that_the_batch_lacks_counts_zero(form, shape):
    rows = random_rows(*shape)
    one_class, single_items = torch.zeros(shape[0], dtype=torch.int64), torch.arange(shape[0])
    for labels, fraction in ((one_class, 0.0), (single_items, 1.0)):
        value, gradient = value_and_gradients(
            lambda x, y=labels, f=fraction: all_pairs_cosine_loss(
                x, y, positive_fraction=f, **form
            ),
            rows,
        )
        assert abs(value) < 1e-12
        assert gradient.abs().max() < 1e-12
    for labels, fraction in ((one_class, 0.25), (single_items, 0.75)):
        value = all_pairs_cosine_loss(rows, labels, positive_fraction=fraction, **form)
        assert_close(value, 0.25 * brute_force(rows, labels, **form))


@each_form
@each_fraction
@pytest.mark.parametrize("size", [0, 1])
def test_batch_without_pairs_costs_zero_and_is_differentiable(form, fraction, size):
    labels = torch.zeros(size, dtype=torch.int64)
    value, gradient = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, positive_fraction=fraction, **form),
        random_rows(size, 3),
    )
    assert value == 0
    assert value.shape == ()
    assert torch.equal(gradient, torch.zeros(size, 3, dtype=torch.float64))


@each_form
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_pairs_cost_zero(form, reduction):
    rows = torch.zeros(0, 3)
    same = torch.zeros(0, dtype=torch.bool)
    value, gradient, _ = value_and_gradients(
        lambda a, b: cosine_pair_loss(a, b, same, reduction=reduction, **form), rows, rows
    )
    assert value == 0
    assert gradient.shape == (0, 3)
    assert cosine_pair_loss(rows, rows, same, reduction="none", **form).shape == (0,)


@each_margin_too
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("labels", [torch.zeros(12), torch.arange(12), torch.arange(12) % 3])
@pytest.mark.parametrize("width", [3, 20])
def test_value_that_is_not_finite_makes_the_loss_of_the_batch_nan(form, bad, labels, width):
    rows = random_rows(12, width)
    rows[4, 1] = bad
    value, _ = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels.long(), **form), rows)
    assert value.isnan()


@each_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_value_that_is_not_finite_makes_the_loss_of_its_pair_nan(form, bad):
    a, b = random_rows(2, 6, 3)
    a[1, 0] = b[2, 1] = bad
    same = torch.arange(6) % 2 == 0
    nan = cosine_pair_loss(a, b, same, reduction="none", **form).isnan()
    assert nan.tolist() == [False, True, True, False, False, False]


def float32_and_float64(rows, labels, **options):
    single = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels, **options), rows)
    double = value_and_gradients(
        lambda x: all_pairs_cosine_loss(x, labels, **options), rows.double()
    )
    return single, double


@each_form
@each_fraction
def test_one_class_of_two_among_single_items_is_not_lost_in_float32(form, fraction):
    size, width = (1024, 32) if form["negatives"] == "hinge" else (32768, 16)
    rows = 0.3 + random_rows(size, width, dtype=torch.float32)
    labels = torch.arange(size)
    labels[-1] = labels[5]
    (value, gradient), (expected, expected_gradient) = float32_and_float64(
        rows, labels, positive_fraction=fraction, **form
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    limit = (1e-3 if form["negatives"] == "hinge" else 1e-4) * expected_gradient.norm()
    assert (gradient.double() - expected_gradient).norm() < limit
    if fraction == 1:
        similarity = F.cosine_similarity(rows[5].double(), rows[-1].double(), dim=0)
        torch.testing.assert_close(value.double(), 1 - similarity, rtol=1e-5, atol=0)
        assert gradient[[5, size - 1]].norm() > 0.99 * gradient.norm()


@each_form
@each_fraction
def test_one_single_item_beside_a_class_of_thousands_is_not_lost_in_float32(form, fraction):
    size, width = (1024, 32) if form["negatives"] == "hinge" else (32768, 16)
    rows = 0.3 + random_rows(size, width, dtype=torch.float32)
    labels = torch.zeros(size, dtype=torch.int64)
    labels[7] = 1
    (value, gradient), (expected, expected_gradient) = float32_and_float64(
        rows, labels, positive_fraction=fraction, **form
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    limit = (1e-3 if form["negatives"] == "hinge" else 5e-6) * expected_gradient.norm()
    assert (gradient.double() - expected_gradient).norm() < limit
    if fraction == 0:
        others = rows[torch.arange(size) != 7].double()
        similarity = F.cosine_similarity(others, rows[7].double()[None])
        direct = costs(similarity, torch.tensor(False), **form).mean()
        torch.testing.assert_close(value.double(), direct, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [1, 2, 100, 10_000])
@pytest.mark.parametrize("negatives", ["linear", "squared"])
def test_collapsed_embeddings_cost_what_they_should_in_float32(classes, negatives):
    rows = random_rows(1, 16, dtype=torch.float32).repeat(20_000, 1)
    labels = torch.arange(20_000) % classes
    for fraction, expected in ((1.0, 0.0), (0.0, float(classes > 1))):
        value, gradient = value_and_gradients(
            lambda x, f=fraction: all_pairs_cosine_loss(
                x, labels, negatives=negatives, positive_fraction=f
            ),
            rows,
        )
        assert abs(value - expected) < 1e-6
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_single_items_does_not_add_up_in_float32(seed):
    rows = random_rows(1, 16, seed=seed, dtype=torch.float32).repeat(20_000, 1)
    labels = torch.arange(20_000)
    labels[-1] = labels[5]
    assert abs(all_pairs_cosine_loss(rows, labels, positive_fraction=1)) < 1e-6


@each_form
def test_gradients_of_the_pair_loss_pass_gradcheck_twice(form):
    a, b = (rows.requires_grad_() for rows in random_rows(2, 4, 3, seed=1))
    same = torch.arange(4) % 2 == 0
    for reduction in "mean", "none":
        loss = CosinePairLoss(reduction=reduction, **form)
        assert torch.autograd.gradcheck(loss, (a, b, same))
        assert torch.autograd.gradgradcheck(loss, (a, b, same))


@each_form
def test_gradients_of_all_pairs_pass_gradcheck(form):
    rows = random_rows(7, 3, seed=1).requires_grad_()
    loss = AllPairsCosineLoss(positive_fraction=0.3, **form)
    assert torch.autograd.gradcheck(loss, (rows, torch.arange(len(rows)) % 3))


@each_form
def test_second_derivative_of_all_pairs_is_an_error(form):
    rows = random_rows(9, 3).requires_grad_()
    loss = all_pairs_cosine_loss(rows, torch.arange(9) % 3, **form)
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    penalized = loss + gradient.square().sum()
    with pytest.raises(RuntimeError, match=r"no second derivatives\. Use `cosine_pair_loss`"):
        penalized.backward()


@each_form
def test_second_derivative_through_a_scaled_loss_is_an_error(form):
    rows = random_rows(9, 3).requires_grad_()
    weight = torch.ones((), requires_grad=True)
    loss = weight * all_pairs_cosine_loss(rows, torch.arange(9) % 3, **form)
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives\. Use `cosine_pair_loss`"):
        gradient.square().sum().backward()


@each_form
def test_gradient_is_scaled_by_what_comes_after_the_loss(form):
    rows, labels = random_rows(9, 3), torch.arange(9) % 3
    _, gradient = value_and_gradients(lambda x: all_pairs_cosine_loss(x, labels, **form), rows)
    _, scaled = value_and_gradients(lambda x: -3 * all_pairs_cosine_loss(x, labels, **form), rows)
    assert_close(scaled, -3 * gradient)


@each_form
@each_fraction
def test_value_without_gradient_is_the_same(form, fraction):
    for shape in (30, 4), (4, 30):
        rows, labels = random_rows(*shape), torch.arange(shape[0]) % 3
        loss = AllPairsCosineLoss(positive_fraction=fraction, **form)
        with_gradient, _ = value_and_gradients(lambda x, y=labels, loss=loss: loss(x, y), rows)
        with torch.no_grad():
            assert torch.equal(loss(rows, labels), with_gradient)
        assert not loss(rows, labels).requires_grad


@each_form
def test_inputs_are_left_as_they_were(form):
    rows, labels = random_rows(30, 4), torch.arange(30) % 3
    before, labels_before = rows.clone(), labels.clone()
    all_pairs_cosine_loss(rows.requires_grad_(), labels, **form).backward()
    cosine_pair_loss(rows, rows, labels == 0, **form).backward()
    assert torch.equal(rows.detach(), before)
    assert torch.equal(labels, labels_before)


def test_checkpoints_say_a_positive_margin_where_one_is_set():
    assert describe(CosinePairLoss()) == (
        "CosinePairLoss(negatives=linear, margin=0.0, reduction=mean)"
    )
    assert "positive_margin=0.9" in describe(AllPairsCosineLoss(positive_margin=0.9))


@each_margin_too
def test_modules_are_the_functions_with_settings(form):
    a, b = random_rows(2, 9, 4)
    labels = torch.arange(9) % 3
    for reduction in "mean", "sum", "none":
        module = CosinePairLoss(reduction=reduction, **form)
        expected = cosine_pair_loss(a, b, labels == 0, reduction=reduction, **form)
        assert torch.equal(module(a, b, labels == 0), expected)
    for fraction in FRACTIONS:
        module = AllPairsCosineLoss(positive_fraction=fraction, **form)
        expected = all_pairs_cosine_loss(a, labels, positive_fraction=fraction, **form)
        assert torch.equal(module(a, labels), expected)


def test_modules_print_their_settings():
    assert repr(CosinePairLoss()) == (
        "CosinePairLoss(negatives='linear', margin=0.0, reduction='mean')"
    )
    assert repr(CosinePairLoss(negatives="hinge", margin=0.2, reduction="sum")) == (
        "CosinePairLoss(negatives='hinge', margin=0.2, reduction='sum')"
    )
    assert repr(AllPairsCosineLoss(positive_margin=0.9)) == (
        "AllPairsCosineLoss(negatives='linear', margin=0.0, positive_margin=0.9, "
        "positive_fraction=None)"
    )
    assert repr(AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)) == (
        "AllPairsCosineLoss(negatives='squared', margin=0.0, positive_fraction=0.5)"
    )


@pytest.mark.parametrize("module", [CosinePairLoss(), AllPairsCosineLoss()])
def test_modules_have_nothing_to_train_or_save(module):
    assert not list(module.parameters())
    assert not list(module.buffers())
    assert not module.state_dict()


LOSSES = [
    CosinePairLoss,
    AllPairsCosineLoss,
    lambda **options: cosine_pair_loss(
        torch.ones(3, 2), torch.ones(3, 2), torch.ones(3) > 0, **options
    ),
    lambda **options: all_pairs_cosine_loss(torch.ones(3, 2), torch.arange(3), **options),
]
each_loss = pytest.mark.parametrize(
    "loss", LOSSES, ids=["CosinePairLoss", "AllPairsCosineLoss", "pair", "all pairs"]
)


@each_loss
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"negatives": "Linear"},
            ValueError,
            "`negatives` must be one of 'linear', 'hinge', 'squared', got 'Linear'",
        ),
        ({"negatives": None}, ValueError, "`negatives` must be one of .* got None"),
        (
            {"negatives": "hinge", "margin": 1.0},
            ValueError,
            r"`margin` must be in \[-1, 1\), got 1.0. A margin of 1 never penalises a pair",
        ),
        ({"negatives": "hinge", "margin": -1.01}, ValueError, r"must be in \[-1, 1\), got -1.01"),
        ({"negatives": "hinge", "margin": math.nan}, ValueError, r"must be in \[-1, 1\), got nan"),
        ({"negatives": "hinge", "margin": math.inf}, ValueError, r"must be in \[-1, 1\), got inf"),
        (
            {"negatives": "hinge", "margin": "0.2"},
            TypeError,
            "`margin` must be a number, got '0.2'",
        ),
        ({"negatives": "hinge", "margin": True}, TypeError, "`margin` must be a number, got True"),
        ({"margin": 0.2}, ValueError, "`margin` 0.2 would be ignored: .* is 'linear'"),
        (
            {"negatives": "squared", "margin": -0.5},
            ValueError,
            "`margin` -0.5 would be ignored: only negatives='hinge' has a margin, .* is 'squared'",
        ),
        (
            {"positive_margin": 1.01},
            ValueError,
            r"`positive_margin` must be in \(-1, 1\], got 1.01. It is the similarity from which",
        ),
        ({"positive_margin": -1}, ValueError, r"`positive_margin` must be in \(-1, 1\], got -1"),
        ({"positive_margin": math.nan}, ValueError, r"must be in \(-1, 1\], got nan"),
        ({"positive_margin": None}, TypeError, "`positive_margin` must be a number, got None"),
        ({"temperature": 0.1}, TypeError, "temperature"),
    ],
)
def test_wrong_form_is_an_error_that_names_it(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(**options)


@pytest.mark.parametrize("margin", [-1, 0, 0.999])
def test_margins_up_to_the_bounds_are_taken(margin):
    a, b = random_rows(2, 9, 4)
    same = torch.arange(9) % 2 == 0
    value = cosine_pair_loss(a, b, same, negatives="hinge", margin=margin)
    assert_close(value, costs(F.cosine_similarity(a, b), same, "hinge", margin).mean())


@pytest.mark.parametrize("module", [CosinePairLoss, AllPairsCosineLoss])
def test_settings_are_keyword_only(module):
    with pytest.raises(TypeError, match="positional"):
        module("linear")


@pytest.mark.parametrize("reduction", ["average", None])
def test_wrong_reduction_is_an_error(reduction):
    rows = torch.ones(2, 3)
    with pytest.raises(ValueError, match="`reduction` must be one of 'mean', 'sum', 'none', got"):
        cosine_pair_loss(rows, rows, torch.ones(2) > 0, reduction=reduction)
    with pytest.raises(ValueError, match="`reduction` must be one of 'mean', 'sum', 'none', got"):
        CosinePairLoss(reduction=reduction)


@pytest.mark.parametrize(
    ("fraction", "error", "message"),
    [
        (1.5, ValueError, r"`positive_fraction` must be in \[0, 1\], got 1.5"),
        (-0.1, ValueError, r"`positive_fraction` must be in \[0, 1\], got -0.1"),
        (math.nan, ValueError, r"`positive_fraction` must be in \[0, 1\], got nan"),
        ("half", TypeError, "`positive_fraction` must be a number, got 'half'"),
        (True, TypeError, "`positive_fraction` must be a number, got True"),
    ],
)
def test_wrong_positive_fraction_is_an_error(fraction, error, message):
    with pytest.raises(error, match=message):
        AllPairsCosineLoss(positive_fraction=fraction)
    with pytest.raises(error, match=message):
        all_pairs_cosine_loss(torch.ones(3, 2), torch.arange(3), positive_fraction=fraction)


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        (torch.ones(3), ValueError, r"`{}` must have shape \[N, D\], .* got \[3\]"),
        (torch.ones(3, 2, 1), ValueError, r"`{}` must have shape \[N, D\], .* got \[3, 2, 1\]"),
        (torch.ones(3, 2).long(), TypeError, "`{}` must be floating point, got torch.int64"),
        (np.ones((3, 2), np.int32), TypeError, "`{}` must be floating point, got torch.int32"),
        ([[1.0, 2.0]] * 3, TypeError, "`{}` must be a tensor or a NumPy array, got list"),
    ],
)
def test_wrong_embeddings_are_an_error(embeddings, error, message):
    rows, same = torch.ones(3, 2), torch.ones(3) > 0
    with pytest.raises(error, match=message.format("embeddings")):
        all_pairs_cosine_loss(embeddings, torch.arange(3))
    with pytest.raises(error, match=message.format("a")):
        cosine_pair_loss(embeddings, rows, same)
    with pytest.raises(error, match=message.format("b")):
        cosine_pair_loss(rows, embeddings, same)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (1, 2)])
def test_pairs_of_unlike_shapes_are_an_error(shape):
    with pytest.raises(ValueError, match=r"`a` and `b` must have the same shape, got \[3, 2\] and"):
        cosine_pair_loss(torch.ones(3, 2), torch.ones(shape), torch.ones(3) > 0)


@pytest.mark.parametrize(
    ("same", "message"),
    [
        (torch.ones(3, 1), r"`same` must have one value per pair, shape \[3\], got \[3, 1\]"),
        (torch.ones(2), r"shape \[3\], got \[2\]"),
        (torch.tensor(1), r"shape \[3\], got \[\]"),
        (torch.tensor([1, 0, 2]), "`same` must be bool or 0 and 1, got 2. Use `labels_a =="),
        (torch.tensor([1, -1, 0]), "`same` must be bool or 0 and 1, got -1"),
        (torch.tensor([1, 0.5, 0]), "`same` must be bool or 0 and 1, got 0.5"),
        (torch.tensor([1, math.nan, 0]), "`same` must be bool or 0 and 1, got nan"),
    ],
)
def test_wrong_same_is_an_error(same, message):
    with pytest.raises(ValueError, match=message):
        cosine_pair_loss(torch.ones(3, 2), torch.ones(3, 2), same)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.eye(3).long(), ValueError, r"`labels` must have shape \[N\].*\[3, 3\].*argmax\(1\)"),
        ([[1, 0], [0, 1], [0, 1]], ValueError, r"`labels` must have shape \[N\].*got \[3, 2\]"),
        (torch.arange(4), ValueError, "one label per row, got 4 labels for 3 rows"),
        (torch.tensor(1), ValueError, r"`labels` must have shape \[N\].*got \[\]"),
        (
            torch.arange(3.0),
            TypeError,
            "`labels` must be integers, got torch.float32.*numpy.unique",
        ),
        ([0.0, 1.0, 2.0], TypeError, "`labels` must be integers, got float64"),
        (["cat", "dog", "cat"], TypeError, "`labels` must be integers, got <U3"),
        (torch.arange(3) * 1j, TypeError, "`labels` must be integers, got torch.complex64"),
    ],
)
def test_wrong_labels_are_an_error(labels, error, message):
    with pytest.raises(error, match=message):
        all_pairs_cosine_loss(torch.ones(3, 2), labels)


@pytest.mark.parametrize(
    "module", [all_pairs_gradient, attraction, linear, hinge, squared], ids=lambda m: m.__name__
)
def test_the_examples_of_the_closed_forms_are_right(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 3
    assert not failed


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, a, b, same):
        return self.scale * cosine_pair_loss(a, b, same)


def test_a_loss_says_whether_it_takes_pairs():
    assert CosinePairLoss.takes_pairs
    assert on_pairs(cosine_pair_loss).takes_pairs
    assert not getattr(AllPairsCosineLoss(), "takes_pairs", False)


def test_any_loss_on_pairs_is_called_as_it_is_and_keeps_its_parameters():
    a, b = random_rows(2, 6, 3)
    same = torch.arange(6) % 2 == 0
    assert torch.equal(on_pairs(cosine_pair_loss)(a, b, same), cosine_pair_loss(a, b, same))
    scaled = on_pairs(Scaled())
    scaled(a, b, same).backward()
    assert [parameter.grad is not None for parameter in scaled.parameters()] == [True]
    other = on_pairs(Scaled())
    with torch.no_grad():
        other.loss.scale.fill_(5)
    other.load_state_dict(scaled.state_dict())
    assert torch.equal(other(a, b, same), scaled(a, b, same))
    assert "Scaled" in repr(scaled)
    assert "cosine_pair_loss" in repr(on_pairs(cosine_pair_loss))


def test_what_can_not_be_called_is_no_loss_on_pairs():
    with pytest.raises(TypeError, match=r"`loss` must be callable as loss\(a, b, same\), got 0.2"):
        on_pairs(0.2)
