"""What each loss gains on the classes it trains on, and what that costs everywhere else.

    python tests/benchmarks/quality.py --data FOLDER --tower FOLDER --others FOLDER

Trains one tower on images of a folder per class, with each method: batches of P classes times K
images (random pairs excepted), the same steps and schedule, at the best of several rates for each,
by mean average precision of the first seed on held-out images of the trained classes. Each result
is evaluated there, on classes that were left out, and on the classes of --others; as it is, and
blended with the untouched tower by `interpolate`. A loss's own parameters have ten times the rate.

Runs go to --results, one JSON line each, as they come; what is found there isn't repeated, so that
a run that was broken off, or more methods, rates or seeds, go on from there. Without --data, digits
and a random tower take their place, to try the script; their numbers say nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from contenders import ours, pml
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import pairclip
from pairclip.datasets import class_names_of
from pairclip.towers import random_tower

HERE = Path(__file__).parent
METHODS = {**ours.OBJECTIVES, **pml.OBJECTIVES}
PLACES = {"trained": "trained classes", "left_out": "classes left out", "others": "others"}
METRICS = ("recall_at_1", "mean_average_precision", "map_at_r")


class Data(NamedTuple):
    """What is trained on, and where results are evaluated, by place."""

    train: Any
    places: dict[str, Any]
    keep: Any


def main() -> None:
    """Run what is not done yet, then print the table and draw the picture."""
    args = parse()
    torch.set_num_threads(args.threads)
    tower, data = load(args)
    untouched = run(args, tower, data, "untouched", 0.0, 0)
    rows = {"untouched": [untouched]}
    for method in args.methods:
        first = [run(args, tower, data, method, rate, args.seeds[0]) for rate in args.rates]
        best = max(first, key=lambda result: result["1"]["trained"]["mean_average_precision"])
        rows[method] = [best] + [
            run(args, tower, data, method, best["rate"], seed) for seed in args.seeds[1:]
        ]
    print(f"\n{table(rows, args.blends)}")
    if args.picture:
        draw(rows, args.blends, args.picture)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder for each class")
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--others", type=Path, help="a folder for each class, never trained on")
    parser.add_argument(
        "--left-out", nargs="+", default=["bird", "truck"], help="classes of --data"
    )
    parser.add_argument(
        "--keep-from", type=int, default=0, help="first classes of --others to keep"
    )
    parser.add_argument("--held-out", type=int, default=200, help="evaluated images per class")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classes-per-batch", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 6e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blends", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--precision", default="auto", choices=["auto", "no", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "quality.jsonl")
    parser.add_argument("--picture", type=Path, help="where the scatter picture goes")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[pairclip.VisionTower, Data]:
    """The untouched tower, and the images."""
    if args.data is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.uint8(digits.images * 15.9)
        names = [f"digit {target}" for target in digits.target]
        whole: Any = (images, names)
        left_out, others, tower = ["digit 8", "digit 9"], None, random_tower(patch_size=4)
        args.held_out = min(args.held_out, 50)
    else:
        whole, left_out = ImageFolder(args.data), args.left_out
        others = None if args.others is None else ImageFolder(args.others)
        tower = pairclip.load_tower(args.tower)
    names = class_names_of(whole) or []
    unseen = [names.index(name) for name in left_out]
    seen = [label for label in range(len(names)) if label not in unseen]
    places = {"trained": some(whole, seen, 0, args.held_out)}
    if unseen:
        places["left_out"] = some(whole, unseen, 0, args.held_out)
    keep = None
    if others is not None:
        classes = list(range(len(others.classes)))
        places["others"] = some(others, classes[args.keep_from :], 0, args.held_out)
        if args.keep_from:
            keep = some(others, classes[: args.keep_from], 0, None)
    return tower, Data(some(whole, seen, args.held_out, None), places, keep)


def some(dataset: Any, classes: list[int], start: int, count: int | None) -> Subset[Any]:
    """`count` images of each class, from number `start` of a fixed shuffle on."""
    labels = pairclip.labels_of(dataset).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    stop = None if count is None else start + count
    chosen = [order[labels[order] == label][start:stop] for label in classes]
    return Subset(dataset, np.concatenate(chosen).tolist())


def run(
    args: argparse.Namespace,
    tower: pairclip.VisionTower,
    data: Data,
    method: str,
    rate: float,
    seed: int,
) -> dict[str, Any]:
    """Train and evaluate, or read what the results have of it."""
    key = {
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": args.steps if rate else 0,
        "batch_size": args.batch_size if rate else 0,
        "data": [str(args.data), str(args.others), *args.left_out, args.keep_from, args.held_out],
        "tower": str(args.tower),
    }
    blends = args.blends if rate else [1.0]
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    for done in map(json.loads, lines):
        if all(done[name] == value for name, value in key.items()):
            return done | ({} if rate else {f"{blend:g}": done["1"] for blend in args.blends})
    start = time.monotonic()
    tuned = train(args, tower, data, method, rate, seed) if rate else tower
    seconds = time.monotonic() - start
    result: dict[str, Any] = key | {"seconds": round(seconds)}
    for blend in blends:
        blended = pairclip.interpolate(tower, tuned, blend)
        result[f"{blend:g}"] = {place: metrics(blended, of) for place, of in data.places.items()}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(method, rate, seed, f"{seconds:.0f} s", json.dumps(result["1"]), flush=True)
    return result | ({} if rate else {f"{blend:g}": result["1"] for blend in args.blends})


def train(
    args: argparse.Namespace,
    tower: pairclip.VisionTower,
    data: Data,
    method: str,
    rate: float,
    seed: int,
) -> pairclip.VisionTower:
    """A tuned copy of the tower."""
    torch.manual_seed(seed)  # for the classes' vectors of proxy losses
    tuned = copy.deepcopy(tower)
    labels = pairclip.labels_of(data.train)
    # Proxy losses take class ids from 0 on.
    classes, ids = labels.unique(return_inverse=True)
    train_set = Relabelled(data.train, ids)
    objective = METHODS[method](len(classes), tower.embedding_dim)
    own = [] if not isinstance(objective.loss, torch.nn.Module) else [*objective.loss.parameters()]

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        of_loss = {id(parameter) for parameter in own}
        groups = [{"params": [p for p in parameters if id(p) not in of_loss], "lr": rate}]
        groups += [{"params": own, "lr": 10 * rate}] if own else []
        return torch.optim.AdamW(groups, weight_decay=0.0)

    kept: dict[str, Any] = {}
    if objective.keep_share:
        kept = {"keep": data.keep, "keep_share": objective.keep_share}
    if objective.matching is None:
        chosen = min(args.classes_per_batch, len(classes))
        labelled = round((1 - objective.keep_share) * args.batch_size)
        sampler: Any = pairclip.ClassBalancedSampler(ids, chosen, labelled // chosen, seed=seed)
    else:
        sampler = pairclip.PairSampler(
            ids, args.batch_size // 2, positive_fraction=objective.matching, seed=seed
        )
    pairclip.Finetuner(
        tuned, objective.loss, optimizer=optimizer, precision=args.precision, seed=seed
    ).fit(train_set, sampler=sampler, max_steps=args.steps, **kept)
    return tuned


class Relabelled(torch.utils.data.Dataset[Any]):
    """A dataset with other class ids."""

    def __init__(self, dataset: Any, ids: torch.Tensor) -> None:
        self.dataset = pairclip.LabelledImages(dataset)
        self.targets = ids

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index][0], int(self.targets[index])


def metrics(tower: pairclip.VisionTower, dataset: Any) -> dict[str, float]:
    """The metrics of a tower on a dataset."""
    found = pairclip.evaluate(tower, dataset)
    return {name: round(getattr(found, name), 4) for name in METRICS}


def values(results: list[dict[str, Any]], blend: float, place: str, metric: str) -> list[float]:
    """A metric of each seed."""
    return [result[f"{blend:g}"][place][metric] for result in results]


def table(rows: dict[str, list[dict[str, Any]]], blends: list[float]) -> str:
    """Mean and standard deviation over seeds of each method, blended or not."""
    places = [place for place in PLACES if place in rows["untouched"][0]["1"]]
    heads = [f"{PLACES[place]}, {name}" for place in places for name in ("R@1", "mAP", "MAP@R")]
    lines = [
        f"| method | rate | blend | {' | '.join(heads)} |",
        "|---|---:|---:" + "|---:" * len(heads) + "|",
    ]
    for method, results in rows.items():
        for blend in [1.0] if method == "untouched" else blends:
            cells = []
            for place in places:
                for metric in METRICS:
                    found = values(results, blend, place, metric)
                    spread = f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
                    cells.append(f"{np.mean(found):.3f}{spread}")
            rate = f"{results[0]['rate']:g}"
            lines.append(f"| {method} | {rate} | {blend:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: dict[str, list[dict[str, Any]]], blends: list[float], path: Path) -> None:
    """What is gained on the trained classes, against what is lost elsewhere."""
    import matplotlib.pyplot as plt

    metric = "mean_average_precision"
    elsewhere = "others" if "others" in rows["untouched"][0]["1"] else "left_out"
    start = {place: rows["untouched"][0]["1"][place][metric] for place in ("trained", elsewhere)}
    figure, axes = plt.subplots(figsize=(8, 6))
    axes.axvline(start[elsewhere], color="0.8")
    for method, results in rows.items():
        if method == "untouched":
            continue
        line = [
            [start[place]]
            + [np.mean(values(results, blend, place, metric)) for blend in sorted(blends)]
            for place in (elsewhere, "trained")
        ]
        own = not method.startswith("PML")
        axes.plot(*line, marker="o" if own else "x", linestyle="-" if own else ":", label=method)
    axes.plot(start[elsewhere], start["trained"], "ks", label="untouched")
    axes.set_xlabel(f"mAP on {PLACES[elsewhere]}, never trained on")
    axes.set_ylabel("mAP on held-out images of the trained classes")
    axes.set_title("Each line: blended with the untouched tower, from not at all to tuned alone")
    axes.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
