"""Evaluations: each figure against a direct computation, and the tables."""

import json

import numpy as np
import pytest
import torch

from pairclip import (
    Evaluation,
    class_similarity_matrix,
    evaluate,
    evaluate_embeddings,
    mean_average_precision,
    recall_at_k,
)


def sample(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % classes
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + torch.randn(80, 8, generator=generator), labels


def test_figures_are_those_of_their_own_functions() -> None:
    rows, labels = sample()
    found = evaluate_embeddings(rows, labels)
    for k in (1, 5, 10):
        assert getattr(found, f"recall_at_{k}") == pytest.approx(recall_at_k(rows, labels, k=k))
    assert found.mean_average_precision == pytest.approx(mean_average_precision(rows, labels))
    unit = torch.nn.functional.normalize(rows.double())
    pairs = torch.triu_indices(80, 80, 1)
    cosines = (unit @ unit.T)[pairs[0], pairs[1]]
    same = labels[pairs[0]] == labels[pairs[1]]
    assert found.same_mean == pytest.approx(float(cosines[same].mean()), abs=1e-6)
    assert found.different_mean == pytest.approx(float(cosines[~same].mean()), abs=1e-6)
    assert found.gap == found.same_mean - found.different_mean
    np.testing.assert_array_equal(found.class_similarity, class_similarity_matrix(rows, labels)[0])
    assert (found.num_images, found.num_queries) == (80, 80)


def test_neighbours_vote_among_the_others() -> None:
    rows, labels = sample()
    unit = torch.nn.functional.normalize(rows)
    scores = unit @ unit.T
    scores.fill_diagonal_(-2)
    voters = labels[scores.topk(5).indices]
    votes = torch.stack([(voters == c).sum(1) for c in range(4)], dim=1)
    best = votes == votes.max(dim=1, keepdim=True).values
    expected = (best[torch.arange(80), labels] / best.sum(1)).mean()
    assert evaluate_embeddings(rows, labels).knn_accuracy == pytest.approx(float(expected))


def test_confused_classes_are_the_most_similar_ones() -> None:
    rows = torch.tensor(
        [[1.0, 0, 0], [1, 0, 0], [0.9, 0.1, 0], [0.9, 0.1, 0], [0, 0, 1], [0, 0, 1]]
    )
    found = evaluate_embeddings(rows, [0, 0, 1, 1, 2, 2], class_names=["cat", "dog", "car"])
    assert found.confused_classes[0][:2] == ("cat", "dog")
    assert len(found.confused_classes) == 3
    values = [value for *_, value in found.confused_classes]
    assert values == sorted(values, reverse=True)


def test_evaluate_embeds_the_dataset_and_takes_its_names(tower, images) -> None:
    pictures, labels = images
    found = evaluate(tower, (pictures, [["ant", "bee", "cat"][label] for label in labels]))
    assert found.class_names == ["ant", "bee", "cat"]
    assert 0 < found.recall_at_1 <= 1


def test_to_dict_is_json_with_flat_keys() -> None:
    rows, labels = sample()
    labels[0] = 9
    with pytest.warns(UserWarning, match="1 of 80 queries were left out"):
        found = evaluate_embeddings(rows, labels)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["recall_at_1"] == found.recall_at_1
    assert read["class_similarity"][4][4] is None
    assert read["class_names"] == ["0", "1", "2", "3", "9"]
    assert (read["num_images"], read["num_queries"]) == (80, 79)
    assert {"recall_at_5", "mean_average_precision", "same_mean", "different_mean", "gap"} <= set(
        read
    )


def test_one_class_alone_has_no_different_pairs() -> None:
    found = evaluate_embeddings(torch.randn(5, 3), [7] * 5)
    assert np.isnan(found.different_mean)
    assert found.to_dict()["gap"] is None
    assert found.confused_classes == []


def test_tables_show_figures_and_changes() -> None:
    rows, labels = sample()
    before, after = (
        evaluate_embeddings(torch.ones_like(rows), labels),
        evaluate_embeddings(rows, labels),
    )
    table = after.to_markdown(before).splitlines()
    assert table[0] == "| | before | after | change |"
    recall = next(line for line in table if line.startswith("| Recall at 1 "))
    change = after.recall_at_1 - before.recall_at_1
    assert recall == (
        f"| Recall at 1 | {before.recall_at_1:.3f} | {after.recall_at_1:.3f} | {change:+.3f} |"
    )
    assert f"| Recall at 1 | {after.recall_at_1:.3f} |" in after.to_markdown()


def test_a_baseline_of_other_images_is_refused() -> None:
    rows, labels = sample()
    other = evaluate_embeddings(rows[:40], labels[:40])
    with pytest.raises(ValueError, match="`baseline` must be of the same images, got 40 images"):
        evaluate_embeddings(rows, labels).to_markdown(other)


def test_wrong_arguments_are_named() -> None:
    rows, labels = sample()
    with pytest.raises(ValueError, match="has 2 names, but there is a class id 2"):
        evaluate_embeddings(rows, labels, class_names=["a", "b"])
    with pytest.raises(ValueError, match="one label per row, got 79 labels for 80 rows"):
        evaluate_embeddings(rows, labels[1:])
    with pytest.raises(ValueError, match="None of the 4 queries"):
        evaluate_embeddings(rows[:4], labels[:4])
    rows[5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 80 rows, first in row 5"):
        evaluate_embeddings(rows, labels)
    assert Evaluation.__dataclass_params__.frozen
