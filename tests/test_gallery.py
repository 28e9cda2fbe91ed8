"""Queries and gallery, and images that don't count, against scikit-learn on what is left."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pairclip import Evaluation, LabelledImages, evaluate, evaluate_embeddings
from pairclip.evaluation.showing import neighbor_is_right


def sample(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    cameras = torch.randint(3, (count,), generator=generator)
    rows = torch.randn(count, 6, generator=generator)
    rows[torch.arange(count), labels] += 1
    return rows, labels, [f"camera {camera}" for camera in cameras]


def expected_metrics(
    scores: np.ndarray, relevant: np.ndarray, counts: np.ndarray
) -> dict[str, float]:
    """Recall at 1, mean average precision and ROC AUC of the cells that count."""
    hits, precisions = [], []
    for row, right, inside in zip(scores, relevant, counts, strict=True):
        if right[inside].any():
            hits.append(right[inside][np.argmax(row[inside])])
            precisions.append(average_precision_score(right[inside], row[inside]))
    return {
        "recall_at_1": float(np.mean(hits)),
        "mean_average_precision": float(np.mean(precisions)),
        "roc_auc": float(roc_auc_score(relevant[counts], scores[counts])),
        "same_mean": float(scores[counts & relevant].mean()),
        "different_mean": float(scores[counts & ~relevant].mean()),
    }


def assert_metrics(evaluation: Evaluation, expected: dict[str, float]) -> None:
    metrics = {name: getattr(evaluation, name) for name in expected}
    assert metrics == pytest.approx(expected, abs=1e-5)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).numpy()


@pytest.mark.parametrize("excluding", [False, True])
def test_queries_are_searched_in_the_gallery(excluding: bool) -> None:
    rows, labels, cameras = sample(70)
    queries, query_labels, query_cameras = sample(30, seed=1)
    columns: dict[str, Any] = {"exclude": cameras, "query_exclude": query_cameras}
    evaluation = evaluate_embeddings(
        rows, labels, queries=queries, query_labels=query_labels, **columns if excluding else {}
    )
    relevant = (query_labels[:, None] == labels).numpy()
    counts = np.ones_like(relevant)
    if excluding:
        counts = ~(relevant & (np.array(query_cameras)[:, None] == np.array(cameras)))
    scores = cosines(queries, rows)
    assert_metrics(evaluation, expected_metrics(scores, relevant, counts))
    assert (evaluation.num_images, evaluation.num_queries) == (30, 30)
    scores[~counts] = -2
    np.testing.assert_array_equal(evaluation.neighbors, np.argsort(-scores)[:, :10])
    right = relevant[np.arange(30)[:, None], evaluation.neighbors]
    np.testing.assert_array_equal(neighbor_is_right(evaluation), right)


def test_images_of_a_query_s_own_value_do_not_count() -> None:
    rows, labels, cameras = sample(80)
    rows[40:] = rows[:40] + 0.01 * rows[40:]  # near copies
    labels[40:] = labels[:40]
    photograph = [*range(40), *range(40)]
    relevant = (labels[:, None] == labels).numpy()
    for values in (photograph, cameras):
        same = relevant & (np.array(values)[:, None] == np.array(values))
        evaluation = evaluate_embeddings(rows, labels, exclude=values)
        np.fill_diagonal(same, True)
        expected = expected_metrics(cosines(rows, rows), relevant, ~same)
        assert_metrics(evaluation, expected)
    assert evaluate_embeddings(rows, labels).recall_at_1 == 1
    assert evaluate_embeddings(rows, labels, exclude=photograph).recall_at_1 < 0.9


def test_a_missing_value_is_like_no_other() -> None:
    rows, labels, _ = sample(40)
    expected = evaluate_embeddings(rows, labels).to_dict()
    assert evaluate_embeddings(rows, labels, exclude=[None] * 40).to_dict() == expected
    assert evaluate_embeddings(rows, labels, exclude=[float("nan")] * 40).to_dict() == expected
    assert evaluate_embeddings(rows, labels, exclude=[""] * 40).to_dict() == expected
    metrics = evaluate_embeddings(rows, labels, exclude=range(40)).to_dict()
    for name, value in expected.items():
        if isinstance(value, float):
            assert metrics[name] == pytest.approx(value, abs=1e-12)


def test_what_is_left_out_neither_votes_nor_is_a_neighbour() -> None:
    rows = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0.5, 1], [0, 1]])
    labels = [0, 0, 0, 1, 1]
    evaluation = evaluate_embeddings(rows, labels, exclude=["x", "x", "y", "z", "z2"])
    # One item of three others is left out for the first two queries.
    assert evaluation.neighbors.shape == (5, 3)
    assert 1 not in evaluation.neighbors[0]
    assert (evaluation.neighbor_scores >= 0).all()


def test_classes_are_joined_by_name(tower, images) -> None:
    pictures, labels = images
    names = ["ant", "bee", "cat"]
    queries = (pictures[:24], [names[label] for label in labels[:24]])
    # Only two of the classes, and others in front of them: the ids are other ones.
    gallery = (pictures[24:], [("aa", *names)[label + 1] for label in labels[24:]])
    gallery[1][0] = "aa"
    evaluation = evaluate(tower, queries, gallery)
    assert evaluation.class_names == ["aa", *names]
    assert evaluation.gallery_labels[0] == 0
    assert [evaluation.class_names[i] for i in evaluation.labels] == queries[1]
    searched = evaluate(
        tower, queries, gallery=LabelledImages(gallery), exclude=(range(24), ["x"] * 24)
    )
    assert searched.to_dict() == evaluation.to_dict()
    numbers = (pictures[24:], labels[24:])
    with pytest.raises(ValueError, match="joined by name, and `gallery` has none"):
        evaluate(tower, queries, numbers)
    with pytest.raises(ValueError, match="joined by name, and `queries` has none"):
        evaluate(tower, numbers, queries)
    assert evaluate(tower, numbers, numbers).recall_at_1 == 1


def test_an_evaluation_with_a_gallery_is_kept_and_compared(tmp_path) -> None:
    rows, labels, _ = sample(50)
    queries, query_labels, _ = sample(20, seed=1)
    gallery = {"queries": queries, "query_labels": query_labels}
    evaluation = evaluate_embeddings(rows, labels, **gallery)
    evaluation.to_json(tmp_path / "a.json")
    read = Evaluation.from_json(tmp_path / "a.json")
    np.testing.assert_array_equal(read.gallery_labels, labels)
    assert read.to_markdown(evaluation) == evaluation.to_markdown(evaluation)
    other = evaluate_embeddings(rows[1:], labels[1:], **gallery)
    with pytest.raises(ValueError, match="`baseline` must be of the same gallery"):
        evaluation.to_markdown(other)


def test_wrong_columns_are_named(tower, images) -> None:
    with pytest.raises(ValueError, match="`exclude` must be a column of `queries`, which has none"):
        evaluate(tower, images, exclude="camera")
    with pytest.raises(ValueError, match="one value for each image of `queries`, got 2 for 48"):
        evaluate(tower, images, exclude=[1, 2])
    with pytest.raises(ValueError, match="name of a column or a pair of sequences"):
        evaluate(tower, images, images, exclude=[1, 2])
    rows, labels, cameras = sample(10)
    with pytest.raises(ValueError, match="`exclude` and `query_exclude` go together"):
        evaluate_embeddings(rows, labels, query_exclude=cameras)
    with pytest.raises(ValueError, match="`exclude` must have one value for each row"):
        evaluate_embeddings(rows, labels, exclude=cameras[1:])
