"""Train one recipe in one fold, and score each image that is searched for its class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.utils.data import Subset

from pairclip._files import bytes_of, check_seal, plain, read_json, sealed, write_json
from pairclip.datasets import LabelledImages
from pairclip.embedding import Pixels, embed_images
from pairclip.evaluation import evaluate_embeddings
from pairclip.features import cache_features
from pairclip.recipes.comparison import LEFT_OUT, METRICS, OTHERS, TRAINED
from pairclip.recipes.folds import Fold
from pairclip.recipes.recipe import Recipe
from pairclip.recipes.training import train
from pairclip.towers import VisionTower, interpolate

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
# For each place, each metric of every image that is searched there; NaN for one that is alone in
# its class.
Scores = dict[str, dict[str, FloatArray]]

_FORMAT = "pairclip trial 2"
_SAMPLE = 16


@dataclass(frozen=True)
class Material:
    """A tower and its images; or the head of one that was split, and features of the images."""

    tower: VisionTower
    data: LabelledImages
    others: LabelledImages | None
    keep: LabelledImages | None


def settings_of(recipe: Recipe) -> str:
    """All of a recipe but its name and steps; of a loss with weights, what these start as."""
    digest = hashlib.sha256()
    if isinstance(recipe.loss, nn.Module):
        for name, value in recipe.loss.state_dict().items():
            digest.update(name.encode() + bytes_of(value))
    return json.dumps(recipe.to_dict() | {"name": None, "steps": None}) + digest.hexdigest()


@dataclass
class Trials:
    """What all trials share, and where those that are done are kept.

    Attributes:
        whole: The untouched tower; the images to train on and to hold out, others that no trial
            trains on, and unlabelled ones for recipes that take some.
        folds: Of the images to train on.
        folder: Where done trials are kept; None keeps them nowhere.
        cache_trunk: Whether recipes that train the last blocks alone compute the others once.
        seed: Of the trainings; each fold adds its number.
        num_workers: Processes that load images.
        untouched: Scores of the untouched tower in each fold.
    """

    whole: Material
    folds: Sequence[Fold]
    folder: Path | None
    cache_trunk: bool
    seed: int
    num_workers: int

    def __post_init__(self) -> None:
        self._heads: dict[int, Material] = {}
        self._shared = self._identity() if self.folder is not None else ""
        self.untouched = [
            self._scores(self.whole, self.whole.tower, fold) for fold in range(len(self.folds))
        ]

    def run(self, recipes: Sequence[Recipe], fold: int, steps: int) -> list[Scores]:
        """Scores of recipes that differ in name and blend alone, and so share one training."""
        earlier = [self._read(recipe, fold, steps) for recipe in recipes]
        scores = [each for each in earlier if each is not None]
        if len(scores) == len(recipes):
            return scores
        material = self._material(recipes[0])
        tuned = train(
            recipes[0],
            material.tower,
            LabelledImages(Subset(material.data, self.folds[fold].train.tolist())),
            keep=material.keep,
            steps=steps,
            seed=self.seed + fold,
            num_workers=self.num_workers,
        )
        scores = []
        for recipe in recipes:
            blend = interpolate(material.tower, tuned, recipe.blend)
            scores.append(self._scores(material, blend, fold))
            self._write(scores[-1], recipe, fold, steps)
        return scores

    def places(self, fold: int) -> dict[str, IntArray]:
        """Where a fold is evaluated, and which images are searched there."""
        images = {TRAINED: self.folds[fold].trained, LEFT_OUT: self.folds[fold].left_out}
        others = self.whole.others
        images[OTHERS] = np.arange(0 if others is None else len(others))
        return {place: which for place, which in images.items() if len(which)}

    def _material(self, recipe: Recipe) -> Material:
        """What a recipe trains: where the trunk is computed once, the head on its features."""
        blocks, whole = recipe.train_blocks, self.whole
        if blocks is None or recipe.lora_rank is not None:
            return whole
        if not self.cache_trunk or self.folder is None:
            return whole
        if blocks not in self._heads:
            trunk, head = whole.tower.split(blocks)
            folder = self.folder / "features"

            def features(images: LabelledImages) -> LabelledImages:
                workers = self.num_workers
                return LabelledImages(cache_features(trunk, images, folder, num_workers=workers))

            self._heads[blocks] = Material(
                head,
                features(whole.data),
                None if whole.others is None else features(whole.others),
                None if whole.keep is None else features(whole.keep),
            )
        return self._heads[blocks]

    def _scores(self, material: Material, tower: VisionTower, fold: int) -> Scores:
        scores = {}
        for place, which in self.places(fold).items():
            dataset = material.others if place == OTHERS else material.data
            images = LabelledImages(Subset(dataset, which.tolist()))  # type: ignore[arg-type]
            embeddings = embed_images(tower, images, num_workers=self.num_workers)
            evaluation = evaluate_embeddings(embeddings, images.labels)
            scores[place] = {metric: np.full(len(images), np.nan) for metric in METRICS}
            for metric, of_image in scores[place].items():
                of_image[evaluation.queries] = evaluation.per_query[metric]
        return scores

    def _identity(self) -> str:
        """Tells this comparison's trials from those of other towers, images or folds."""
        whole = self.whole
        digest = hashlib.sha256(
            f"{_FORMAT} {whole.tower.fingerprint()} {self.seed} {self.cache_trunk}".encode()
        )
        for fold in self.folds:
            for images in vars(fold).values():
                digest.update(images.tobytes() + b"|")
        for data in (whole.data, whole.others, whole.keep):
            if data is None:
                digest.update(b"none")
                continue
            digest.update(bytes_of(data.labels))
            pixels = Pixels(data, whole.tower.preprocess)
            for index in np.unique(np.linspace(0, len(data) - 1, _SAMPLE).astype(int)).tolist():
                digest.update(bytes_of(pixels[index]))
        return digest.hexdigest()

    def _path(self, folder: Path, recipe: Recipe, fold: int, steps: int) -> Path:
        key = f"{self._shared} {settings_of(recipe)} {fold} {steps}"
        return folder / f"trial-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _read(self, recipe: Recipe, fold: int, steps: int) -> Scores | None:
        if self.folder is None:
            return None
        path = self._path(self.folder, recipe, fold, steps)
        if not path.exists():
            return None
        try:
            read = read_json(path)
            check_seal(read, path)
            return {
                place: {metric: np.array(values, float) for metric, values in of_place.items()}
                for place, of_place in read["scores"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"'{path}' is damaged: it holds no trial. Delete it, and it is made again."
            ) from error

    def _write(self, scores: Scores, recipe: Recipe, fold: int, steps: int) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        what = {"recipe": recipe.to_dict(), "fold": fold, "steps": steps, "scores": plain(scores)}
        write_json(self._path(self.folder, recipe, fold, steps), sealed(what))
