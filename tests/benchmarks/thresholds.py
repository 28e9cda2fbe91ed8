"""How often the false match rate on other classes lies in the interval of `choose_threshold`.

    python tests/benchmarks/thresholds.py                          # classes drawn at random
    python tests/benchmarks/thresholds.py --folder photos --tower some/clip

Classes are split into halves at random, 200 times: a threshold is chosen on one half, and the share
of the pairs of different classes at or above it counted on the other. The drawn classes stand in
families, some of which are much alike. Ends with 1 if the share inside is below 95 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
from torch import Tensor


def drawn(classes: int, of_each: int, family: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings of classes in families of about this many."""
    generator = torch.Generator().manual_seed(seed)
    families = torch.randn(max(1, classes // family), 32, generator=generator)
    centres = 0.7 * torch.randn(classes, 32, generator=generator)
    centres += families[torch.randint(len(families), (classes,), generator=generator)]
    labels = torch.arange(classes * of_each) % classes
    return centres[labels] + torch.randn(len(labels), 32, generator=generator), labels


def embedded(folder: str, tower: str, of_each: int) -> tuple[Tensor, Tensor]:
    """Embeddings of the first images of each class of a folder."""
    from torch.utils.data import Subset
    from torchvision.datasets import ImageFolder

    from pairclip import LabelledImages, embed_images, load_tower

    labels = torch.tensor(ImageFolder(folder).targets)
    first = torch.cat([(labels == c).nonzero()[:of_each, 0] for c in labels.unique()])
    images = LabelledImages(Subset(ImageFolder(folder), first.tolist()))
    return embed_images(load_tower(tower), images), images.labels


def rate_at(rows: Tensor, labels: Tensor, threshold: float) -> float:
    unit = torch.nn.functional.normalize(rows)
    matches = pairs = 0
    for block, its_labels in zip(unit.split(1000), labels.split(1000), strict=True):
        different = its_labels[:, None] != labels
        matches += int(((block @ unit.T >= threshold) & different).sum())
        pairs += int(different.sum())
    return matches / pairs


def splits_inside(rows: Tensor, labels: Tensor, rate: float, splits: int) -> tuple[int, float]:
    """Splits whose rate is inside, and the median ratio of the interval's ends."""
    from pairclip import choose_threshold

    classes = labels.unique()
    inside, ratios = 0, []
    for seed in range(splits):
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
        ours = torch.isin(labels, classes[order[: len(classes) // 2]])
        chosen = choose_threshold(rows[ours], labels[ours], false_match_rate=rate, seed=seed)
        low, high = chosen.false_match_interval
        inside += low <= rate_at(rows[~ours], labels[~ours], chosen.threshold) <= high
        ratios.append(high / low if low else math.inf)
    return inside, float(torch.tensor(ratios).median())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="images by class")
    parser.add_argument("--tower", default="openai/clip-vit-base-patch32")
    parser.add_argument("--images", type=int, default=200, help="of each class, of a folder")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01])
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 40, 80])
    arguments = parser.parse_args()
    if arguments.folder:
        sets = {arguments.folder: embedded(arguments.folder, arguments.tower, arguments.images)}
    else:
        sets = {f"{count} classes": drawn(count, 20, 4) for count in arguments.classes}
    enough = True
    for name, (rows, labels) in sets.items():
        for rate in arguments.rates:
            start = time.perf_counter()
            inside, ratio = splits_inside(rows, labels, rate, arguments.splits)
            print(
                f"{name}, {len(rows)} images, rate {rate:g}: {inside} of {arguments.splits} inside,"
                f" ends x {ratio:.3g}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            enough &= inside >= 0.95 * arguments.splits
    return int(not enough)


if __name__ == "__main__":
    sys.exit(main())
