"""The way back into the untouched tower's space, against scikit-learn and fits without each row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import Ridge

from pairclip import Alignment, _files, align, alignment
from pairclip.towers import random_tower


def sample(count: int = 60, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings by a tuned tower, a distorted and noisy map of those before."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(count, 5, generator=generator).double() + 0.5
    tuned = before @ torch.randn(5, 7, generator=generator).double()
    return tuned + noise * torch.randn(count, 7, generator=generator).double(), before


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows)


def penalty(tuned: torch.Tensor, shrinkage: float) -> float:
    centred = unit(tuned) - unit(tuned).mean(0)
    return shrinkage * float(centred.square().sum()) / tuned.shape[1]


def test_the_map_is_that_of_scikit_learn() -> None:
    tuned, before = sample()
    alignment = align(3 * tuned, before, shrinkage=0.1)
    oracle = Ridge(penalty(tuned, 0.1)).fit(unit(tuned), unit(before))
    np.testing.assert_allclose(alignment.weight, oracle.coef_.T, atol=1e-6)
    np.testing.assert_allclose(alignment.offset, oracle.intercept_, atol=1e-6)
    expected = unit(torch.from_numpy(oracle.predict(unit(tuned))))
    np.testing.assert_allclose(alignment(tuned.numpy()), expected, atol=1e-6)
    assert alignment(tuned.float()).dtype == torch.float32


@pytest.mark.parametrize("shrinkage", [1e-6, 0.01, 3.0])
def test_the_cosine_is_that_of_fits_without_each_row(
    shrinkage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairclip.alignment._ROWS", 7)
    tuned, before = sample(25)
    cosines = []
    for i in range(25):
        others = torch.arange(25) != i
        fit = Ridge(penalty(tuned, shrinkage)).fit(unit(tuned)[others], unit(before)[others])
        mapped = torch.from_numpy(fit.predict(unit(tuned)[i : i + 1]))
        cosines.append(float(torch.cosine_similarity(mapped, before[i : i + 1])))
    found = align(tuned, before, shrinkage=shrinkage).cosine
    assert found == pytest.approx(np.mean(cosines), abs=1e-9)


def test_the_best_shrinkage_is_taken() -> None:
    tuned, before = sample(15, noise=3.0)
    best = align(tuned, before)
    others = [align(tuned, before, shrinkage=value).cosine for value in (1e-6, 1e-3, 0.1, 10)]
    assert best.cosine >= max(others)
    assert best.shrinkage > 1e-3
    assert align(*sample(noise=0.0)).shrinkage < best.shrinkage


def test_what_was_only_turned_is_turned_back() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(300, 6, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    alignment = align(before[:200] @ turn, before[:200])
    mapped = alignment(before[200:] @ turn)
    torch.testing.assert_close(mapped, unit(before[200:]), atol=1e-4, rtol=0)
    assert alignment.cosine > 0.9999


def test_files_keep_everything(tmp_path: Path) -> None:
    tuned, before = sample()
    towers = (random_tower(seed=1), random_tower(seed=2))
    path = tmp_path / "a.safetensors"
    made = align(tuned, before, towers=towers)
    made.save(path)
    read = Alignment.load(path, tower=towers[0])
    assert torch.equal(read(tuned), made(tuned))
    assert (read.shrinkage, read.cosine, read.num_images) == (
        *(made.shrinkage, made.cosine),
        60,
    )
    assert read.fingerprints == (towers[0].fingerprint(), towers[1].fingerprint())
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("weight"), made.weight)
    with pytest.raises(ValueError, match=r"`tower` must be the tuned tower of '.*a.safetensors'"):
        Alignment.load(path, tower=towers[1])
    align(tuned, before).save(path)
    assert Alignment.load(path).fingerprints is None
    with pytest.raises(ValueError, match="doesn't say of which towers it is"):
        Alignment.load(path, tower=towers[0])


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    align(*sample()).save(path)
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).permutation(8 * len(whole))[:100]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.safetensors' (is damaged|was not written|has)"):
            Alignment.load(path)
    read = _files.MappedTensors(path)
    tensors = {name: tensor.clone() for name, tensor in read.items()}
    for settings in ("", "[]", "{}", "[" * 9999, read.metadata["settings"].replace("null", "[1]")):
        sealed = {**read.metadata, "settings": settings}
        sealed["sha256"] = alignment._checksum(settings, tensors)
        with path.open("wb") as file:
            _files.write_tensors(file, tensors, sealed)
        with pytest.raises(ValueError, match=r"a\.safetensors' is damaged: its settings"):
            Alignment.load(path)
    save_file({"weight": torch.eye(2)}, path)
    with pytest.raises(ValueError, match=r"was not written by `Alignment\.save`"):
        Alignment.load(path)
    with pytest.raises(FileNotFoundError):
        Alignment.load(tmp_path / "none")


def test_wrong_arguments_are_named() -> None:
    tuned, before = sample(10)
    with pytest.raises(ValueError, match=r"row for each of the same images.* got 10 and 9 rows"):
        align(tuned, before[:9])
    with pytest.raises(ValueError, match="two at least, got 1 and 1"):
        align(tuned[:1], before[:1])
    with pytest.raises(ValueError, match="`tuned` must have different rows, but all are equal"):
        align(tuned[:1].repeat(10, 1), before)
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`shrinkage` must be a positive number, got"):
            align(tuned, before, shrinkage=wrong)
    with pytest.raises(TypeError, match="`shrinkage` must be a number"):
        align(tuned, before, shrinkage="auto")
    with pytest.raises(
        ValueError, match="must have embedding size 7, that of the tuned tower, got"
    ):
        align(tuned, before)(before)
    tuned[3, 1] = torch.nan
    with pytest.raises(ValueError, match="`tuned` has NaN"):
        align(tuned, before)
