"""Similarity matrices, against torch and against scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from torch.testing import assert_close

from pairclip import _vectors, class_similarity_matrix, similarity, similarity_matrix
from pairclip.similarity import nearest_neighbors


def random_rows(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("block_size", [None, 1, 3, 100])
def test_matrix_is_that_of_scikit_learn(block_size: int | None) -> None:
    a, b = random_rows(10), random_rows(7, seed=1)
    expected = torch.from_numpy(cosine_similarity(a, b))
    assert_close(similarity_matrix(a, b, block_size=block_size), expected)
    expected = torch.from_numpy(cosine_similarity(a))
    assert_close(similarity_matrix(a.numpy(), block_size=block_size), expected)


def test_matrix_stays_in_range_and_zero_rows_are_unrelated() -> None:
    rows = random_rows(50, 3).float() * 1e-30
    rows[7] = 0
    matrix = similarity_matrix(rows)
    assert matrix.abs().max() <= 1
    assert (matrix[7] == 0).all()
    others = torch.arange(50) != 7
    assert_close(matrix.diagonal()[others], torch.ones(49))


def test_half_precision_is_computed_in_float32() -> None:
    rows = random_rows(20).half()
    assert_close(similarity_matrix(rows), similarity_matrix(rows.float()))
    assert similarity_matrix(rows).dtype == torch.float32


def test_arrays_of_any_layout_are_taken() -> None:
    rows = random_rows(6).numpy()
    expected = similarity_matrix(rows[::-1].copy())
    rows.flags.writeable = False
    assert_close(similarity_matrix(rows[::-1]), expected)
    assert_close(similarity_matrix(rows[::-1].astype(">f8")), expected)


def test_matrix_is_written_into_a_memory_mapped_file(tmp_path) -> None:
    rows = random_rows(30).float()
    out = np.memmap(tmp_path / "similarity", np.float32, "w+", shape=(30, 30))
    assert similarity_matrix(rows, out=out, block_size=7) is out
    out.flush()
    read = np.memmap(tmp_path / "similarity", np.float32, "r", shape=(30, 30))
    assert_close(torch.from_numpy(np.array(read)), similarity_matrix(rows))
    tensor = torch.empty(30, 30)
    assert similarity_matrix(rows, out=tensor) is tensor
    assert_close(tensor, similarity_matrix(rows))


def test_class_similarity_is_the_mean_over_pairs_of_different_items() -> None:
    rows = random_rows(40)
    labels = torch.arange(40) % 4 * 3 - 5
    labels[0] = 99
    matrix, classes = class_similarity_matrix(rows, labels)
    assert classes.tolist() == [-5, -2, 1, 4, 99]
    cosines = cosine_similarity(rows)
    np.fill_diagonal(cosines, np.nan)
    for i, first in enumerate(classes):
        for j, second in enumerate(classes):
            cells = cosines[(labels == first).numpy()][:, (labels == second).numpy()]
            expected = np.nan if first == second == 99 else np.nanmean(cells)
            np.testing.assert_allclose(matrix[i, j], expected, atol=1e-12)


def test_centroids_give_the_cosine_of_class_means() -> None:
    rows = random_rows(12)
    labels = torch.arange(12) % 3
    unit = rows / rows.norm(dim=1, keepdim=True)
    means = torch.stack([unit[labels == c].mean(0) for c in range(3)])
    matrix, _ = class_similarity_matrix(rows, labels, reduction="centroids")
    assert_close(matrix, torch.from_numpy(cosine_similarity(means)))


@pytest.mark.parametrize("block_size", [None, 1, 3, 17])
def test_neighbors_are_those_of_scikit_learn(
    block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_QUERY_ROWS", 6)
    queries, corpus = random_rows(20), random_rows(30, seed=1)
    oracle = NearestNeighbors(n_neighbors=5, metric="cosine").fit(corpus)
    distances, expected = oracle.kneighbors(queries)
    scores, rows = nearest_neighbors(queries, corpus, 5, block_size=block_size)
    assert_close(rows, torch.from_numpy(expected))
    assert_close(scores, torch.from_numpy(1 - distances))
    # scikit-learn, too, leaves out each row itself where it gets no queries.
    distances, expected = oracle.kneighbors()
    scores, rows = nearest_neighbors(corpus.numpy(), k=5, block_size=block_size)
    assert_close(rows, torch.from_numpy(expected))
    assert_close(scores, torch.from_numpy(1 - distances))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([(1.0, 0.0), (0.0, 3.0), (-1.0, 0.0), (0.0, 0.0)]), min_size=2),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
)
def test_the_lower_of_equal_rows_comes_first_in_blocks_of_any_size(
    rows: list[tuple[float, float]], k: int, block_size: int, own: bool
) -> None:
    embeddings = torch.tensor(rows)
    k = min(k, len(rows) - own)
    scores = torch.from_numpy(cosine_similarity(embeddings))
    if own:
        scores.fill_diagonal_(-torch.inf)
    expected = scores.sort(dim=1, descending=True, stable=True)
    corpus = None if own else embeddings
    found, indices = nearest_neighbors(embeddings, corpus, k, block_size=block_size)
    assert torch.equal(indices, expected.indices[:, :k])
    assert_close(found, expected.values[:, :k])


def test_only_the_own_row_is_left_out_not_its_duplicates() -> None:
    rows = random_rows(6).repeat(2, 1)
    scores, indices = nearest_neighbors(rows, k=1)
    assert indices[:, 0].tolist() == [*range(6, 12), *range(6)]
    assert_close(scores, torch.ones_like(scores))
    assert nearest_neighbors(rows, k=11)[1].sort(dim=1).values[3].tolist() == [
        i for i in range(12) if i != 3
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neighbors_in_half_precision_are_found_in_float32(dtype: torch.dtype) -> None:
    queries, corpus = random_rows(5).float(), random_rows(40, seed=1).to(dtype)
    expected = nearest_neighbors(queries, corpus.float(), 3)
    scores, indices = nearest_neighbors(queries, corpus, 3, block_size=7)
    assert torch.equal(indices, expected[1])
    assert_close(scores, expected[0])
    assert scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_neighbors(queries, corpus, 3)[1], expected[1])


def test_similarities_are_float32_under_autocast(tmp_path: Path) -> None:
    rows = random_rows(5).float()
    expected = similarity_matrix(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity_matrix(rows), expected)
        out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(5, 5))
        assert np.array_equal(similarity_matrix(rows, out=out), expected.numpy())


def test_a_memory_mapped_corpus_is_read_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(50).half().numpy()
    rows.tofile(tmp_path / "corpus")
    corpus = np.memmap(tmp_path / "corpus", np.float16, "r", shape=(50, 8))
    expected = nearest_neighbors(rows[:4], rows, 3)
    read = []
    as_unit = similarity.finite_unit_rows
    monkeypatch.setattr(
        similarity,
        "finite_unit_rows",
        lambda name, block, first_row: (
            read.append(len(block)) or as_unit(name, block, first_row=first_row)
        ),
    )
    scores, indices = nearest_neighbors(rows[:4], corpus, 3, block_size=20)
    assert max(read) == 20
    assert torch.equal(indices, expected[1])
    assert_close(scores, expected[0])


def test_no_queries_have_no_neighbors() -> None:
    scores, indices = nearest_neighbors(random_rows(0), random_rows(5), 2)
    assert scores.shape == indices.shape == (0, 2)


def test_wrong_arguments_of_neighbors_are_named() -> None:
    rows = random_rows(9)
    with pytest.raises(TypeError, match="`queries` must be a tensor or a NumPy array, got list"):
        nearest_neighbors(rows.tolist())
    with pytest.raises(TypeError, match="`corpus` must be floating point, got int64"):
        nearest_neighbors(rows, rows.long().numpy())
    with pytest.raises(ValueError, match=r"`corpus` must have shape \[N, D\]"):
        nearest_neighbors(rows, rows[0])
    with pytest.raises(ValueError, match=r"`queries` and `corpus` must have the same.* 8 and 5"):
        nearest_neighbors(rows, random_rows(3, 5))
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        nearest_neighbors(rows, k=0)
    with pytest.raises(ValueError, match="`k` must be at most the number of other rows, 8, got 9"):
        nearest_neighbors(rows, k=9)
    with pytest.raises(ValueError, match="`k` must be at most the number of rows of `corpus`, 9"):
        nearest_neighbors(rows, rows, 10)
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got -1"):
        nearest_neighbors(rows, k=1, block_size=-1)
    bad = rows.clone()
    bad[7, 2] = float("inf")
    with pytest.raises(ValueError, match=r"`corpus` has NaN or inf.* 1 of the rows 4 to 7, first"):
        nearest_neighbors(rows, bad, 1, block_size=4)
    with pytest.raises(ValueError, match=r"`queries` has NaN or .* first in row 7"):
        nearest_neighbors(bad, rows, 1)


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        (torch.float32, 1e-42),
        (torch.float32, 1e-38),
        (torch.float32, 2e38),
        (torch.float64, 1e-320),
        (torch.float64, 1e-200),
        (torch.float64, 1e-155),
        (torch.float64, 1e200),
        (torch.float64, 1.7e308),
    ],
)
def test_a_row_of_any_length_has_a_direction(dtype: torch.dtype, length: float) -> None:
    row = torch.tensor([[1.0, 1.0, 0.0]], dtype=dtype) * length
    rows = torch.cat([row, torch.tensor([[2.0, 0, 0], [0, 0, 0]], dtype=dtype)])
    expected = torch.tensor([[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]], dtype=dtype)
    assert_close(similarity_matrix(rows), expected)
    scores, _ = nearest_neighbors(rows[:1], rows, 2)
    assert_close(scores, expected[:1, :2])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, whatever is quantized or nested
def test_what_has_no_values_is_named() -> None:
    rows = random_rows(4)
    quantized = torch.quantize_per_tensor(rows.float(), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"`a` must be a dense tensor.*`a\.to_dense\(\)`"):
        similarity_matrix(rows.to_sparse())
    with pytest.raises(TypeError, match=r"`a` must be a plain tensor, got a quantized one"):
        similarity_matrix(quantized)
    with pytest.raises(TypeError, match=r"`labels` must be a plain .* `labels.dequantize\(\)`"):
        class_similarity_matrix(rows, quantized[:, 0])
    with pytest.raises(TypeError, match=r"`a` must be a plain tensor, got a nested one"):
        similarity_matrix(torch.nested.nested_tensor([*rows]))
    with pytest.raises(ValueError, match="`queries` must have values, got a tensor on the device"):
        nearest_neighbors(rows.to("meta"), k=1)
    with pytest.raises(ValueError, match=r"`corpus` must have at least one number in each row"):
        nearest_neighbors(rows, rows[:, :0])
    with pytest.raises(ValueError, match="`labels` must have values"):
        class_similarity_matrix(rows, torch.zeros(4, dtype=torch.int64, device="meta"))
    rows[2] = torch.nan
    with pytest.raises(ValueError, match="`queries` has NaN"):
        nearest_neighbors(rows, k=1)


def test_wrong_arguments_are_named() -> None:
    rows = random_rows(4)
    with pytest.raises(ValueError, match=r"`a` and `b` must have the same embedding size.*8 and 5"):
        similarity_matrix(rows, random_rows(3, 5))
    with pytest.raises(ValueError, match=r"`out` must have shape \[4, 4\], got \[2, 2\]"):
        similarity_matrix(rows, out=torch.empty(2, 2))
    with pytest.raises(TypeError, match="`out` must be a tensor or a NumPy array, got list"):
        similarity_matrix(rows, out=[])
    with pytest.raises(TypeError, match=r"`out` must be floating point, got torch\.int64"):
        similarity_matrix(rows, out=torch.empty(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        similarity_matrix(rows, block_size=0)
    with pytest.raises(TypeError, match="`a` must be floating point"):
        similarity_matrix(rows.long())
    with pytest.raises(ValueError, match=r"`a` must have shape \[N, D\]"):
        similarity_matrix(rows[0])
    rows[2, 1] = float("nan")
    with pytest.raises(ValueError, match="`a` has NaN or infinite values in 1 of 4 rows, first in"):
        similarity_matrix(rows)
    with pytest.raises(ValueError, match="`embeddings` has NaN"):
        class_similarity_matrix(rows, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one label per row, got 3 labels for 4 rows"):
        class_similarity_matrix(random_rows(4), [0, 1, 2])
    with pytest.raises(ValueError, match="`reduction` must be one of 'pairs', 'centroids'"):
        class_similarity_matrix(random_rows(4), [0, 1, 2, 2], reduction="mean")


@pytest.mark.parametrize(("rows", "columns", "width"), [(300, 301, 65), (9, 2047, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_products_are_exact_and_equal_rows_have_equal_ones(
    rows: int, columns: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randint(7, (count,), generator=generator) for count in (rows, columns)]
    seven = F.normalize(torch.randn(7, width, generator=generator, dtype=dtype), dim=1)
    left, right = (seven[kind].requires_grad_() for kind in kinds)
    assert left.numel() * columns >= _vectors._LARGE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = _vectors.products(left, right).detach()
    assert products.dtype == dtype
    assert products.shape == (rows, columns)
    exact = left.double() @ right.double().T
    assert_close(products.double(), exact, atol=1e-6, rtol=0)
    if dtype == torch.float32:
        first = [torch.stack([(kind == each).nonzero()[0, 0] for each in kind]) for kind in kinds]
        assert torch.equal(products, products[first[0]][:, first[1]])
