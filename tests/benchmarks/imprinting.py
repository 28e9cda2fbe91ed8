"""Proxies that start at the means of their classes, against proxies that start at random.

    python tests/benchmarks/imprinting.py --folder tiny-imagenet-80 --tower some/clip

Tunes a tower with proxy losses of pytorch-metric-learning, whose own rate is ten times the tower's,
for so many steps and for half of them, and searches held-out images of the classes trained on.
"""

from __future__ import annotations

import argparse
import sys

import torch
from _bench import OFFLINE, drawn_images, table
from pytorch_metric_learning import losses
from torch.utils.data import Subset

from pairclip import Finetuner, LabelledImages, VisionTower, evaluate, imprint, load_tower

LOSSES = [
    "NormalizedSoftmaxLoss",
    "ArcFaceLoss",
    "CosFaceLoss",
    "ProxyAnchorLoss",
    "SoftTripleLoss",
]
METRICS = ["recall_at_1", "mean_average_precision"]


def tuned(
    name: str, train: LabelledImages, steps: int, start: bool, rate: float, tower: str
) -> VisionTower:
    """A tower tuned with this loss, whose proxies start at class means or at random."""
    module = load_tower(tower)
    torch.manual_seed(0)
    loss = getattr(losses, name)(
        num_classes=int(train.labels.max()) + 1, embedding_size=module.embedding_dim
    )
    if start:
        imprint(loss, module, train)
    own = set(loss.parameters())

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        of_tower = [each for each in parameters if each not in own]
        groups = [{"params": of_tower}, {"params": list(own), "lr": 10 * rate}]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)

    Finetuner(module, loss, optimizer=optimizer).fit(train, batch_size=128, max_steps=steps)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="images by class; drawings for a try by default")
    parser.add_argument("--tower", default=str(OFFLINE / "tower"))
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--held-out", type=int, default=30, help="images of each class")
    arguments = parser.parse_args()
    images = LabelledImages(arguments.folder or drawn_images(2 * arguments.held_out))
    places = [(images.labels == c).nonzero()[:, 0].tolist() for c in images.labels.unique()]
    count = arguments.held_out
    test = LabelledImages(Subset(images, [i for own in places for i in own[:count]]))
    train = LabelledImages(Subset(images, [i for own in places for i in own[count:]]))
    lines = []
    headers = [
        "loss",
        "steps",
        *(f"{start}, {m}" for start in ("random", "imprinted") for m in ("R@1", "mAP")),
    ]
    for name in arguments.losses:
        for steps in (arguments.steps // 2, arguments.steps):
            cells = []
            for start in (False, True):
                tower = tuned(name, train, steps, start, arguments.rate, arguments.tower)
                found = evaluate(tower, test)
                cells += [f"{getattr(found, metric):.3f}" for metric in METRICS]
            lines.append([name, str(steps), *cells])
            print(*lines[-1], file=sys.stderr, flush=True)
    print(table(headers, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
