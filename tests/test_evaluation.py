"""Evaluations: each metric against a direct computation, the tables, and the files."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage

from pairclip import (
    Evaluation,
    class_similarity_matrix,
    evaluate,
    evaluate_embeddings,
    mean_average_precision,
    recall_at_k,
)
from pairclip.evaluation import Change, PairHistogram
from pairclip.evaluation.comparison import paired_intervals
from pairclip.evaluation.showing import similarity_order
from pairclip.retrieval import pair_separation


def sample(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % classes
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + torch.randn(80, 8, generator=generator), labels


def test_metrics_are_those_of_their_own_functions() -> None:
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


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_confused_classes_are_those_of_all_pairs_sorted(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * classes, 6, generator=generator)
    rows[:6] = rows[0]  # ties
    found = evaluate_embeddings(rows, torch.arange(2 * classes) // 2)
    matrix = found.class_similarity
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    pairs.sort(key=lambda pair: -matrix[pair])
    assert found.confused_classes == [(str(i), str(j), matrix[i, j]) for i, j in pairs[:5]]


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_confused_classes_are_found_in_blocks(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = sample(8)
    rows[:30] = rows[0]  # ties
    expected = evaluate_embeddings(rows, labels).confused_classes
    monkeypatch.setattr("pairclip.evaluation.classes._ROWS", rows_at_once)
    found = evaluate_embeddings(rows, labels).confused_classes
    assert [each[:2] for each in found] == [each[:2] for each in expected]


def test_classes_of_one_name_are_told_apart() -> None:
    found = evaluate_embeddings(torch.eye(6), [0, 0, 1, 1, 2, 2], class_names=["a", "a", "a (0)"])
    assert found.class_names == ["a (0) (0)", "a (1)", "a (0) (2)"]
    found = evaluate_embeddings(torch.eye(6), [0, 0, 1, 1, 2, 2], class_names=["a", "b", "a"])
    assert found.class_names == ["a (0)", "b", "a (2)"]


def test_an_evaluation_in_inference_mode_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(600, 8, generator=generator), torch.arange(600) % 7
    expected = evaluate_embeddings(rows, labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = evaluate_embeddings(rows.clone(), labels)
    finally:
        torch.set_num_threads(threads)
    assert found.mean_average_precision == expected.mean_average_precision
    assert found.roc_auc == pytest.approx(expected.roc_auc, abs=1e-12)


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


def before_and_after() -> tuple[Evaluation, Evaluation]:
    rows, labels = sample()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    return evaluate_embeddings(rows + 3 * noise, labels), evaluate_embeddings(rows, labels)


def test_metrics_of_pairs_are_those_of_their_own_function() -> None:
    rows, labels = sample()
    found, pairs = evaluate_embeddings(rows, labels), pair_separation(rows, labels)
    for key in ("same_std", "different_std", "gap", "roc_auc", "roc_auc_error", "best_threshold"):
        assert getattr(found, key) == getattr(pairs, key), key
    assert found.pair_average_precision == pairs.average_precision
    assert found.histogram.same.sum() == pairs.num_same
    assert found.histogram.different.sum() == pairs.num_different


def test_metrics_are_means_over_queries_and_classes() -> None:
    rows, labels = sample()
    labels[7] = 9
    with pytest.warns(UserWarning, match="1 of 80 queries were left out"):
        found = evaluate_embeddings(rows, labels)
    of_query = found.labels[found.queries]
    assert 7 not in found.queries
    for key, values in found.per_query.items():
        assert getattr(found, key) == pytest.approx(values.mean()), key
        for place in range(4):
            expected = values[of_query == place].mean()
            assert found.per_class[key][place] == pytest.approx(expected), key
        assert np.isnan(found.per_class[key][4])
    right = found.labels[found.neighbors[:, 0]] == of_query
    np.testing.assert_array_equal(right, found.per_query["recall_at_1"])


def test_tables_show_metrics_and_changes() -> None:
    before, after = before_and_after()
    table = after.to_markdown(before).splitlines()
    assert table[0] == "| | before | after | change | 95 % interval |"
    change = after.changes(before)["recall_at_1"]
    low, high = change.interval or (0, 0)
    assert low > 0
    assert next(line for line in table if line.startswith("| Recall at 1 ")) == (
        f"| Recall at 1 | {before.recall_at_1:.3f} | {after.recall_at_1:.3f} | "
        f"**{change.difference:+.3f}** | {low:+.3f} to {high:+.3f} |"
    )
    gap = next(line for line in table if line.startswith("| Gap "))
    assert gap.endswith(f"| {after.gap - before.gap:+.3f} |  |")
    assert f"| Recall at 1 | {after.recall_at_1:.3f} |" in after.to_markdown()


def test_a_change_is_marked_only_if_its_interval_leaves_out_zero() -> None:
    before, _ = before_and_after()
    assert "**" not in before.to_markdown(before)
    assert "-0.000" not in before.to_markdown(before)
    assert Change(0.5, 0.4, (-0.2, -0.1)).is_clear
    assert not Change(0.5, 0.4, (-0.2, 0.0)).is_clear
    assert not Change(0.5, 0.4, None).is_clear


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(3)
    before, after = generator.random((2, 3, 150))
    drawn = np.random.default_rng(4).integers(0, 150, (20_000, 150))
    means = (after - before)[:, drawn].mean(axis=2)
    expected = np.percentile(means, [2.5, 97.5], axis=1).T
    found = paired_intervals(before, after)
    np.testing.assert_allclose(found, expected, atol=0.006)
    np.testing.assert_array_equal(found, paired_intervals(before, after))
    normal = (after - before).mean(axis=1)[:, None] + 1.96 * np.array([-1, 1]) * stats.sem(
        after - before, axis=1
    ).reshape(3, 1)
    np.testing.assert_allclose(found, normal, atol=0.01)


def test_the_number_of_resamples_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = np.random.default_rng(3).random((2, 2, 50))
    at_once = paired_intervals(before, after)
    monkeypatch.setattr("pairclip.evaluation.comparison._BATCH_VALUES", 700)
    np.testing.assert_allclose(paired_intervals(before, after), at_once, rtol=0, atol=1e-12)


def test_one_query_has_no_interval() -> None:
    assert paired_intervals(np.zeros((2, 1)), np.ones((2, 1))) is None


def test_further_datasets_are_evaluated_apart_and_follow_in_the_table(tower, images) -> None:
    pictures, labels = images
    found = evaluate(tower, images, also={"first half": (pictures[:24], labels[:24])})
    alone = evaluate(tower, (pictures[:24], labels[:24]))
    assert found.also["first half"].to_dict() == alone.to_dict()
    assert found.to_dict()["also"]["first half"]["num_images"] == 24
    table = found.to_markdown(found)
    assert table.count("| Recall at 1 |") == 2
    assert "\n\n**first half**\n\n| |" in table
    with pytest.raises(ValueError, match=r"same evaluations in `also`, got \[\] against \['first"):
        found.to_markdown(evaluate(tower, images))
    with pytest.raises(TypeError, match="`also` must be a dict of datasets by name, got list"):
        evaluate(tower, images, also=[images])


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, (Evaluation, PairHistogram)):
        names = {each.name for each in fields(expected)} - {"class_pairs"}
        for name in names | {"class_similarity"} & set(dir(expected)):
            assert_equal(getattr(found, name), getattr(expected, name))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*queries were left out")
def test_files_keep_everything_exactly(tower, images, tmp_path: Path) -> None:
    pictures, labels = images
    path = tmp_path / "before.json"
    names = [["ant", 'b"é\\', "c\udc80"][label] for label in labels]
    found = evaluate(tower, (pictures, [*names[:-1], "alone"]), also={"one": (pictures, [0] * 48)})
    found.to_json(path)
    assert_equal(Evaluation.from_json(path), found)
    assert found.to_markdown(Evaluation.from_json(path)) == found.to_markdown(found)
    assert json.loads(path.read_text())["recall_at_1"] == found.recall_at_1


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = before_and_after()
    path = tmp_path / "evaluation.json"
    before.to_json(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pairclip._files.whole.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        after.to_json(path)
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]
    assert_equal(Evaluation.from_json(path), before)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 9}', '{"format": 1}', '{"format": "1"}', "[" * 10_000]
)
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"other\.json' (is damaged|has format 9)|got '.*other.json'"
    ):
        Evaluation.from_json(path)
    with pytest.raises(FileNotFoundError):
        Evaluation.from_json(tmp_path / "none.json")


@pytest.fixture
def small() -> Evaluation:
    return evaluate_embeddings(torch.eye(4), [0, 0, 1, 1])


def test_every_damaged_bit_of_a_file_is_noticed(small: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    small.to_json(path)
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).permutation(8 * len(whole))[:150]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"evaluation\.json"):
            Evaluation.from_json(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recall_at_1": "0.5"}, "`recall_at_1` is no number"),
        ({"gap": True}, "`gap` is no number"),
        ({"num_images": 5}, r"`labels` has shape \[4\] instead of \[5\]"),
        ({"num_queries": -1}, "`num_queries` is no count"),
        ({"labels": [0, 0, 1, 2]}, "`labels` has values out of range"),
        ({"labels": [0, 0, 1, 0.5]}, "`labels` has something else than numbers"),
        ({"neighbors": [[1], [0], [3], [9]]}, "`neighbors` has values out of range"),
        ({"neighbors": [[1], [0], [3, 2], [1]]}, "`neighbors` has rows of different lengths"),
        ({"neighbor_scores": [["a"]] * 4}, "`neighbor_scores` has something else than numbers"),
        ({"class_names": ["a", "a"]}, "`class_names` is not a list of different names"),
        ({"class_similarity": [[1.0]]}, r"`class_similarity` has shape \[1, 1\]"),
        ({"confused_classes": [["0", "cat", 0.5]]}, "`confused_classes` has"),
        ({"per_query": {}}, "`per_query` lacks"),
        ({"histogram": {"edges": [], "same": [], "different": [], "x": 0}}, "unknown field 'x'"),
        ({"also": []}, "`also` is not an object"),
        ({"also": {"other": {}}}, "it lacks"),
        ({"more": 1}, "it has an unknown field 'more'"),
    ],
)
def test_a_wrong_field_of_a_file_is_named(
    small: Evaluation, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "evaluation.json"
    small.to_json(path)
    content = json.loads(path.read_text())
    del content["sha256"]  # as in files of older versions
    path.write_text(json.dumps(content))
    assert Evaluation.from_json(path).recall_at_1 == small.recall_at_1
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"evaluation\.json.*{message}"):
        Evaluation.from_json(path)


def test_many_classes_take_no_matrix_until_it_is_asked_for(tmp_path: Path) -> None:
    rows = torch.randn(2002, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2002) // 2
    found = evaluate_embeddings(rows, labels)
    assert "class_similarity" not in vars(found)
    assert found.to_dict()["class_similarity"] is None
    found.to_json(tmp_path / "many.json")
    assert "class_similarity" not in vars(found)
    expected = class_similarity_matrix(rows, labels)[0].numpy()
    np.testing.assert_array_equal(found.class_similarity, expected)
    above = np.triu(expected, 1) - 2 * np.tri(1001)
    assert found.confused_classes[0][2] == above.max()
    read = Evaluation.from_json(tmp_path / "many.json")
    assert read.confused_classes == found.confused_classes
    with pytest.raises(ValueError, match="no `class_similarity` of over 1000 classes"):
        _ = read.class_similarity


def test_a_baseline_of_other_images_is_refused() -> None:
    rows, labels = sample()
    after = evaluate_embeddings(rows, labels)
    with pytest.raises(ValueError, match="`baseline` must be of the same images, got 40 images"):
        after.to_markdown(evaluate_embeddings(rows[:40], labels[:40]))
    with pytest.raises(ValueError, match="first other class being 'd' against '0'"):
        after.to_markdown(evaluate_embeddings(rows, labels, class_names=["d", "1", "2", "3"]))
    swapped = labels.roll(1)
    swapped[0] = 0
    with pytest.raises(ValueError, match="classes of 79 images differ, first of image 1: '0' aga"):
        after.to_markdown(evaluate_embeddings(rows, swapped))


def test_classes_stand_in_the_order_of_scipy() -> None:
    points = np.random.default_rng(0).normal(size=(9, 3))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    similarity = unit @ unit.T
    similarity[2, 2] = np.nan
    tree = linkage(unit, "average", metric="cosine", optimal_ordering=True)
    np.testing.assert_array_equal(similarity_order(similarity), leaves_list(tree))
    blocks = np.array([0, 1, 2, 0, 1, 2])
    order = similarity_order((blocks[:, None] == blocks).astype(float))
    assert len(np.flatnonzero(np.diff(blocks[order]))) == 2
    for count in range(3):
        np.testing.assert_array_equal(similarity_order(np.eye(count)), np.arange(count))


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
