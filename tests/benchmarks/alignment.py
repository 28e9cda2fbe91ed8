"""What a map back into the untouched tower's space gives: tuned queries against an old index.

    python tests/benchmarks/alignment.py --folder cifar10/train --tower some/clip --others other/

Tunes a tower on a part of the images (squared negatives, P x K of 8 x 16), fits maps on other
images, without their labels, and searches a held-out index by held-out queries.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from pairclip import (
    AllPairsCosineLoss,
    ClassBalancedSampler,
    Finetuner,
    LabelledImages,
    VisionTower,
    align,
    embed_images,
    load_tower,
    retrieval_figures,
)

METRICS = ["recall_at_1", "recall_at_10", "precision_at_10", "mean_average_precision"]


def tune(tower: VisionTower, images: Subset[object], arguments: argparse.Namespace) -> None:
    labels = LabelledImages(images).labels
    loss = AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
    sampler = ClassBalancedSampler(labels, min(8, len(labels.unique())), 16)
    finetuner = Finetuner(tower, loss, learning_rate=arguments.rate)
    finetuner.fit(images, sampler=sampler, max_steps=arguments.steps)


def neighbors_found(queries: Tensor, wanted: Tensor, index: Tensor) -> float:
    """Share of the ten nearest by the untouched tower that are among the ten nearest."""
    tens = [
        (torch.nn.functional.normalize(each) @ torch.nn.functional.normalize(index).T).topk(10)[1]
        for each in (queries, wanted)
    ]
    return float((tens[0][:, :, None] == tens[1][:, None]).any(dim=1).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="images by class")
    parser.add_argument("--others", help="a folder of other images, to fit a map on those alone")
    parser.add_argument("--tower", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--tuning", type=int, default=12_800, help="images to tune on")
    parser.add_argument("--fit", type=int, nargs="+", default=[500, 3000, 12_000])
    parser.add_argument("--index", type=int, default=6000)
    parser.add_argument("--queries", type=int, default=3000)
    arguments = parser.parse_args()
    images = LabelledImages(ImageFolder(arguments.folder))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    sizes = [arguments.tuning, max(arguments.fit), arguments.index, arguments.queries]
    parts = [Subset(images, part.tolist()) for part in order[: sum(sizes)].split(sizes)]
    before, tuned = load_tower(arguments.tower), load_tower(arguments.tower)
    tune(tuned, parts[0], arguments)
    (fit_before, fit_tuned), (index_before, index_tuned), (query_before, query_tuned) = (
        tuple(embed_images(tower, part) for tower in (before, tuned)) for part in parts[1:]
    )
    labels, query_labels = (LabelledImages(part).labels for part in parts[2:])

    def show(name: str, queries: Tensor, index: Tensor) -> None:
        values = retrieval_figures(
            index, labels, METRICS, queries=queries, query_labels=query_labels
        )
        print(f"{name:42}", *(f"{value:.3f}" for value in values.values()), flush=True)

    print(f"{'':42}", *METRICS)
    show("untouched queries, old index", query_before, index_before)
    show("tuned queries, new index", query_tuned, index_tuned)
    show("tuned queries, old index", query_tuned, index_before)
    for count in arguments.fit:
        back = align(fit_tuned[:count], fit_before[:count])
        show(f"mapped queries ({count} images), old index", back(query_tuned), index_before)
    upgrade = align(fit_before, fit_tuned)
    show("tuned queries, old index mapped", query_tuned, upgrade(index_before))
    if arguments.others:
        others = LabelledImages(ImageFolder(arguments.others))
        back = align(embed_images(tuned, others), embed_images(before, others))
        show("mapped queries (other images), old index", back(query_tuned), index_before)
    back = align(fit_tuned, fit_before)
    shares = [
        neighbors_found(queries, query_before, index_before)
        for queries in (query_tuned, back(query_tuned))
    ]
    print("of the untouched tower's ten nearest, found: {:.3f}, mapped: {:.3f}".format(*shares))
    return 0


if __name__ == "__main__":
    sys.exit(main())
