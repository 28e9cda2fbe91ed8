"""What a map back into the untouched tower's space gives, to texts and to an old index.

    python tests/benchmarks/alignment.py --folder cifar10/train --tower some/clip --others other/

Makes a small `CLIPModel` of a CLIP image tower and a text tower of two layers, and trains both on
made-up captions: an image is to be nearest to the caption of its class, such as "a photo of a dog",
among one of each class. Then the image tower alone is tuned on half of the classes (squared
negatives). Maps are fitted on images that the tuning has not seen, without their labels. On
held-out images it prints the share whose nearest caption is of their class, among all classes, and
what tuned queries find in an index of the untouched tower. Without --folder, it draws its images,
for a try.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from _bench import OFFLINE, drawn_images, table
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModelWithProjection

from pairclip import (
    AllPairsCosineLoss,
    Finetuner,
    LabelledImages,
    VisionTower,
    align,
    embed_images,
    load_tower,
    retrieval_figures,
)

CAPTIONS = ["a photo of a {}", "a {}", "the {} here", "a small picture of one {}", "look , a {} !"]
METRICS = ["recall_at_10", "mean_average_precision"]


class CaptionLoss(nn.Module):
    """Cross-entropy of an image's cosines with a caption of each class."""

    def __init__(self, model: CLIPModel, names: Sequence[str]) -> None:
        super().__init__()
        self.text_model, self.projection = model.text_model, model.text_projection
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.names, self.words = names, words_of(names)

    def texts(self, caption: str) -> Tensor:
        """Embeddings of a caption with each name in it, ``[C, D]``."""
        rows = [caption.format(name).split() for name in self.names]
        length = 2 + max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        for row, words in zip(ids, rows, strict=True):
            numbers = [1, *(self.words.index(word) + 2 for word in words), len(self.words) + 2]
            row[: len(numbers)] = torch.tensor(numbers)
        mask = (ids > 0).long()
        pooled = self.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.projection(pooled)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        texts = self.texts(CAPTIONS[int(torch.randint(len(CAPTIONS), ()))])
        cosines = nn.functional.normalize(embeddings) @ nn.functional.normalize(texts).T
        return nn.functional.cross_entropy(self.scale * cosines, labels)


def words_of(names: Sequence[str]) -> list[str]:
    return sorted({word for text in [*CAPTIONS, *names] for word in text.split()})


def whole_model(tower: str, names: Sequence[str]) -> CLIPModel:
    """The image tower, with an untrained text tower of two layers beside it."""
    vision = CLIPVisionModelWithProjection.from_pretrained(tower, dtype=torch.float32)
    words = len(words_of(names)) + 3
    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=words - 1,
    )
    width = vision.config.projection_dim
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.config.to_dict(), projection_dim=width
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.vision_model.load_state_dict(vision.vision_model.state_dict())
    model.visual_projection.load_state_dict(vision.visual_projection.state_dict())
    return model


def fit(
    tower: VisionTower, loss: Any, images: Any, arguments: argparse.Namespace, steps: int
) -> None:
    finetuner = Finetuner(tower, loss, learning_rate=arguments.rate)
    finetuner.fit(images, batch_size=arguments.batch_size, max_steps=steps)


def neighbors_found(queries: Tensor, wanted: Tensor, index: Tensor) -> float:
    """Share of the ten nearest by the untouched tower that are among the ten nearest."""
    unit = nn.functional.normalize(index).T
    tens = [(nn.functional.normalize(each) @ unit).topk(10)[1] for each in (queries, wanted)]
    return float((tens[0][:, :, None] == tens[1][:, None]).any(dim=1).float().mean())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="images by class, whose folders' names go into captions")
    parser.add_argument("--others", help="a folder of other images, to fit a map on those alone")
    parser.add_argument("--tower", default=str(OFFLINE / "tower"), help="a CLIP image tower")
    parser.add_argument("--caption-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200, help="of the tuning")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--batch-size", type=int, default=120)
    parser.add_argument("--fit", type=int, nargs="+", default=[1000, 10_000, 40_000])
    parser.add_argument("--held-out", type=int, default=4000, help="half index, half queries")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    sizes = [arguments.held_out // 2, arguments.held_out // 2, max(arguments.fit)]
    images = LabelledImages(arguments.folder or drawn_images(sum(sizes) // 6))
    names = images.class_names or []
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    index, queries, fitting, tuning = (
        Subset(images, part.tolist()) for part in order.split([*sizes, len(order) - sum(sizes)])
    )
    model = whole_model(arguments.tower, names)
    before = load_tower(model, image_processor=load_tower(arguments.tower).image_processor)
    captions = CaptionLoss(model, names)
    fit(
        before,
        captions,
        Subset(images, order[sum(sizes[:2]) :].tolist()),
        arguments,
        arguments.caption_steps,
    )
    with torch.no_grad():
        texts = captions.eval().texts(CAPTIONS[0])

    half = len(names) // 2
    tuned = copy.deepcopy(before)
    of_half = Subset(images, [i for i in tuning.indices if images.labels[i] < half])
    loss = AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
    fit(tuned, loss, of_half, arguments, arguments.steps)

    (old, new), (asked, asked_new), (base, moved) = (
        tuple(embed_images(tower, part) for tower in (before, tuned))
        for part in (index, queries, fitting)
    )
    labels, query_labels, fit_labels = (
        images.labels[part.indices] for part in (index, queries, fitting)
    )
    lines = []

    def show(name: str, queries: Tensor, index: Tensor, texts: Tensor = texts) -> None:
        unit = nn.functional.normalize(texts)
        right = (nn.functional.normalize(queries) @ unit.T).argmax(dim=1) == query_labels
        cells = []
        for part in (query_labels < half, query_labels >= half):
            found = retrieval_figures(
                index, labels, METRICS, queries=queries[part], query_labels=query_labels[part]
            )
            cells.append([float(right[part].float().mean()), *found.values()])
        same = neighbors_found(queries, asked, index) if index is old else None
        values = [value for pair in zip(*cells, strict=True) for value in pair]
        lines.append(
            [name, *(f"{value:.3f}" for value in values), "" if same is None else f"{same:.2f}"]
        )

    show("untouched, old index", asked, old)
    show("tuned, index embedded again", asked_new, new)
    show("tuned, old index", asked_new, old)
    for count in arguments.fit:
        back = align(moved[:count], base[:count])
        show(f"mapped back, fitted on {count:,} images", back(asked_new), old)
    seen = fit_labels < half
    back = align(moved[seen], base[seen])
    show(f"the same, on {int(seen.sum()):,} of the tuned classes alone", back(asked_new), old)
    if arguments.others:
        others = LabelledImages(arguments.others)
        back = align(embed_images(tuned, others), embed_images(before, others))
        show(f"the same, on {len(others):,} images of other classes", back(asked_new), old)
    upgrade = align(base, moved)
    show("tuned, old index and texts mapped", asked_new, upgrade(old), upgrade(texts))
    places = [
        f"{what}, {of}" for what in ("zero-shot", "R@10", "mAP") for of in ("tuned", "others")
    ]
    print(table(["queries", *places, "same ten"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
