"""Which pairs and which negatives serve retrieval best, at equal images seen.

    python tests/benchmarks/quality.py --data FOLDER --tower FOLDER [--rates 1e-4 3e-4]

Trains one starting tower on images of a folder per class, with independent random pairs (as many
match as chance gives), with `PairSampler` and with all pairs of class-balanced batches, in each
form of the negative term. Two classes are held out and evaluated on their own. For each method the
rate with the best mean average precision of the first seed is used for the other seeds. Results
go to tests/benchmarks/results/quality.jsonl as they come, and runs found there aren't repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import pairclip

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
FORMS = ("linear", "hinge", "squared")
METHODS = [
    ("random pairs", "linear"),
    *(("PairSampler", form) for form in FORMS),
    *(("all pairs", form) for form in FORMS),
]


class RandomPairs:
    """Pairs of independently drawn items, which match as often as chance has it."""

    def __init__(self, labels: torch.Tensor, pairs: int, num_batches: int, seed: int) -> None:
        self.shape = (num_batches, 2 * pairs)
        self.num_items = len(labels)
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        drawn = np.random.default_rng(self.seed).integers(0, self.num_items, self.shape)
        yield from drawn.tolist()

    def __len__(self) -> int:
        return self.shape[0]


def train(
    tower: pairclip.VisionTower,
    data: Any,
    method: tuple[str, str],
    args: Any,
    rate: float,
    seed: int,
) -> None:
    """Train on `args.images_seen` images."""
    kind, form = method
    margin = 0.2 if form == "hinge" else 0.0
    steps = args.images_seen // args.batch_size
    labels = pairclip.labels_of(data)
    pairs: Any = pairclip.CosinePairLoss(negatives=form, margin=margin)
    if kind == "random pairs":
        sampler: Any = RandomPairs(labels, args.batch_size // 2, steps, seed)

        def loss(embeddings: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = pairs(embeddings[0::2], embeddings[1::2], of[0::2] == of[1::2])
            return value

    elif kind == "PairSampler":
        sampler = pairclip.PairSampler(
            labels, args.batch_size // 2, positive_fraction=args.positive_fraction, seed=seed
        )
        loss = pairs
    else:
        sampler = None
        loss = pairclip.AllPairsCosineLoss(
            negatives=form, margin=margin, positive_fraction=args.positive_fraction
        )
    finetuner = pairclip.Finetuner(tower, loss, learning_rate=rate, seed=seed)
    length = {"batch_size": args.batch_size} if sampler is None else {"sampler": sampler}
    finetuner.fit(data, max_steps=steps, **length)


def some(folder: ImageFolder, classes: list[int], start: int, count: int) -> Subset[Any]:
    """`count` images of each class, from number `start` of a fixed shuffle on."""
    labels = np.asarray(folder.targets)
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = [order[labels[order] == label][start : start + count] for label in classes]
    return Subset(folder, np.concatenate(chosen).tolist())


def figures(tower: pairclip.VisionTower, seen: Any, unseen: Any) -> dict[str, float]:
    """R@1 and mAP on seen and on held-out classes."""
    found = {}
    for name, data in (("seen", seen), ("held_out", unseen)):
        evaluation = pairclip.evaluate(tower, data)
        found[f"{name}_recall_at_1"] = evaluation.recall_at_1
        found[f"{name}_map"] = evaluation.mean_average_precision
    return found


def run(args: Any, method: tuple[str, str] | None, rate: float, seed: int) -> dict[str, Any]:
    """Train, unless the method is None, and evaluate; or read it from the results file."""
    key = {
        "method": " ".join(method) if method else "untrained",
        "rate": rate,
        "seed": seed,
        "images": args.images_seen if method else 0,
        "fraction": args.positive_fraction if method and method[0] != "random pairs" else 0.0,
    }
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    for done in map(json.loads, lines):
        if all(done[name] == value for name, value in key.items()):
            return done
    folder = ImageFolder(args.data)
    held_out = [folder.class_to_idx[name] for name in args.hold_out]
    classes = [label for label in range(len(folder.classes)) if label not in held_out]
    tower = pairclip.load_tower(args.tower)
    if method:
        train(tower, some(folder, classes, 300, 10**9), method, args, rate, seed)
    result = key | figures(tower, some(folder, classes, 0, 300), some(folder, held_out, 0, 300))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(result, flush=True)
    return result


def main() -> None:
    """Run all methods and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder for each class")
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--hold-out", nargs="+", default=["bird", "truck"])
    parser.add_argument("--images-seen", type=int, default=12800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--positive-fraction", type=float, default=0.5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 6e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=[" ".join(m) for m in METHODS])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    columns = ["seen_recall_at_1", "seen_map", "held_out_recall_at_1", "held_out_map"]
    rows = [("untrained", "", [run(args, None, 0.0, 0)])]
    for method in METHODS:
        if " ".join(method) not in args.methods:
            continue
        first = [run(args, method, rate, args.seeds[0]) for rate in args.rates]
        best = max(first, key=lambda result: result["seen_map"])
        others = [run(args, method, best["rate"], seed) for seed in args.seeds[1:]]
        rows.append((" ".join(method), f"{best['rate']:g}", [best, *others]))
    print("\n| method | rate | " + " | ".join(columns) + " |")
    print("|---|---:|" + "---:|" * len(columns))
    for name, rate, results in rows:
        cells = []
        for column in columns:
            values = [result[column] for result in results]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
        print(f"| {name} | {rate} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
