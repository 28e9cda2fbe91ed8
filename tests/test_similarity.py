"""Similarity matrices, against torch and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch.testing import assert_close

from pairclip import class_similarity_matrix, similarity_matrix


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
