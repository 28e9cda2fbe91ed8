"""What each loss gains on the classes it trains on, and what that costs everywhere else.

    python tests/benchmarks/quality.py --data FOLDER --tower FOLDER --others FOLDER

Trains one tower on images of a folder per class, with each method: batches of P classes times K
images (random pairs excepted), with the same steps and schedule. The first seed tries several
rates; where the best is the highest or the lowest of them, its double or its half too. The best has
the highest mean average precision on images of the trained classes that are held out for this
choice alone, and the other seeds train at that rate. Each result is evaluated on yet other images
of the trained classes, on classes that were left out, and on the classes of --others; as it is, and
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
MAP = "mean_average_precision"


class Data(NamedTuple):
    """What is trained on, and where results are evaluated, by place."""

    train: Relabelled
    places: dict[str, tuple[torch.Tensor, torch.Tensor]]
    keep: Any


def main() -> None:
    """Run what is not done yet, then print the table and draw the picture."""
    args = parse()
    torch.set_num_threads(args.threads)
    tower, data = load(args)
    rows = {"untouched": [run(args, tower, data, "untouched", 0.0, 0)]}
    for method in args.methods:
        if "to keep" in method and not args.keep_from:
            continue
        rows[method] = of_all_seeds(args, tower, data, method)
    print(f"\n{table(rows, args.blends)}")
    if args.picture:
        draw(rows, args.blends, args.picture)


def of_all_seeds(
    args: argparse.Namespace, tower: pairclip.VisionTower, data: Data, method: str
) -> list[dict[str, Any]]:
    """The results of a method at its best rate."""
    by_rate = {rate: run(args, tower, data, method, rate, args.seeds[0]) for rate in args.rates}
    while True:
        best = max(by_rate, key=lambda rate: by_rate[rate]["1"]["choice"][MAP])
        beyond = {max(by_rate): 2 * best, min(by_rate): best / 2}.get(best)
        if beyond is None or len(by_rate) >= args.most_rates:
            break
        by_rate[beyond] = run(args, tower, data, method, beyond, args.seeds[0])
    others = [run(args, tower, data, method, best, seed) for seed in args.seeds[1:]]
    return [by_rate[best] | {"by_rate": by_rate}, *others]


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
    parser.add_argument("--train-images", type=int, help="per class; all that are not held out")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classes-per-batch", type=int, default=8)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=list(METHODS),
        help="those with images to keep need --keep-from",
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 6e-4, 1.2e-3])
    parser.add_argument("--most-rates", type=int, default=5)
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
    if args.precision == "bf16" and not torch.cuda.is_available():
        for module in tower.modules():  # on CPUs, PyTorch's fused attention takes twice the time
            if hasattr(getattr(module, "config", None), "_attn_implementation"):
                module.config._attn_implementation = "eager"
    names = class_names_of(whole) or []
    unseen = [names.index(name) for name in left_out]
    seen = [label for label in range(len(names)) if label not in unseen]
    count = args.held_out
    parts = {"choice": some(whole, seen, count, count), "trained": some(whole, seen, 0, count)}
    if unseen:
        parts["left_out"] = some(whole, unseen, 0, count)
    keep = None
    if others is not None:
        classes = list(range(len(others.classes)))
        parts["others"] = some(others, classes[args.keep_from :], 0, count)
        if args.keep_from:
            keep = Relabelled(some(others, classes[: args.keep_from], 0, None))
    places = {place: pixels_of(tower, part) for place, part in parts.items()}
    train_set = Relabelled(some(whole, seen, 2 * count, args.train_images))
    return tower, Data(train_set, places, keep)


def some(dataset: Any, classes: list[int], start: int, count: int | None) -> Subset[Any]:
    """`count` images of each class, from number `start` of a fixed shuffle on."""
    labels = pairclip.labels_of(dataset).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    stop = None if count is None else start + count
    chosen = [order[labels[order] == label][start:stop] for label in classes]
    return Subset(dataset, np.concatenate(chosen).tolist())


def pixels_of(tower: pairclip.VisionTower, part: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a tower takes of some images, made once, and their labels."""
    images = pairclip.LabelledImages(part)
    pixels = tower.preprocess.batch(images[i][0] for i in range(len(images)))
    return torch.stack(pixels), pairclip.labels_of(part)


class Relabelled(torch.utils.data.Dataset[Any]):
    """A dataset with class ids from 0 on, as proxy losses take; each image is decoded once."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = pairclip.LabelledImages(dataset)
        classes, self.targets = pairclip.labels_of(dataset).unique(return_inverse=True)
        self.classes = len(classes)
        self.images: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index not in self.images:
            self.images[index] = self.dataset[index][0]
        return self.images[index], int(self.targets[index])


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
        "train_images": args.train_images,
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
        result[f"{blend:g}"] = {
            place: metrics(args, blended, *of)
            for place, of in data.places.items()
            if place != "choice" or blend == 1
        }
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
    ids, count = data.train.targets, data.train.classes
    objective = METHODS[method](count, tower.embedding_dim)
    own = [] if not isinstance(objective.loss, torch.nn.Module) else [*objective.loss.parameters()]

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        of_loss = {id(parameter) for parameter in own}
        groups = [{"params": [p for p in parameters if id(p) not in of_loss], "lr": rate}]
        groups += [{"params": own, "lr": 10 * rate}] if own else []
        return torch.optim.AdamW(groups, weight_decay=0.0)

    options: dict[str, Any] = {}
    if objective.keep_share:
        options = {"keep": data.keep, "keep_share": objective.keep_share}
    if objective.matching is None:
        chosen = min(args.classes_per_batch, count)
        labelled = round((1 - objective.keep_share) * args.batch_size)
        sampler: Any = pairclip.ClassBalancedSampler(ids, chosen, labelled // chosen, seed=seed)
    else:
        sampler = pairclip.PairSampler(
            ids, args.batch_size // 2, positive_fraction=objective.matching, seed=seed
        )
    pairclip.Finetuner(
        tuned, objective.loss, optimizer=optimizer, precision=args.precision, seed=seed
    ).fit(data.train, sampler=sampler, max_steps=args.steps, **options)
    return tuned


def metrics(
    args: argparse.Namespace,
    tower: pairclip.VisionTower,
    pixels: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, float]:
    """The metrics of a tower on some images."""
    device, bf16 = next(tower.parameters()).device, args.precision == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        embeddings = torch.cat([tower(part.to(device)).float() for part in pixels.split(128)])
    by_name = pairclip.retrieval_figures(embeddings, labels, METRICS)
    return {name: round(value, 4) for name, value in by_name.items()}


def values(results: list[dict[str, Any]], blend: float, place: str, metric: str) -> list[float]:
    """A metric of each seed."""
    return [result[f"{blend:g}"][place][metric] for result in results]


def table(rows: dict[str, list[dict[str, Any]]], blends: list[float]) -> str:
    """Mean and standard deviation over seeds of each method, blended or not."""
    places = [place for place in PLACES if place in rows["untouched"][0]["1"]]
    heads = [f"{PLACES[place]}, {name}" for place in places for name in ("R@1", "mAP", "MAP@R")]
    lines = [
        f"| method | best of rates | blend | {' | '.join(heads)} |",
        "|---|---|---:" + "|---:" * len(heads) + "|",
    ]
    for method, results in rows.items():
        rates = ", ".join(
            f"**{rate:g}**" if rate == results[0]["rate"] else f"{rate:g}"
            for rate in sorted(results[0].get("by_rate", []))
        )
        for blend in blends if rates else [1.0]:
            cells = []
            for place in places:
                for metric in METRICS:
                    of_seeds = values(results, blend, place, metric)
                    spread = f" ± {np.std(of_seeds, ddof=1):.3f}" if len(of_seeds) > 1 else ""
                    cells.append(f"{np.mean(of_seeds):.3f}{spread}")
            lines.append(f"| {method} | {rates} | {blend:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Told apart by those who see few colours, too: Okabe and Ito 2008, "Color Universal Design".
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OUR_MARKERS, PEERS_MARKERS = "osDphH8", "x+1v^*d"


def draw(rows: dict[str, list[dict[str, Any]]], blends: list[float], path: Path) -> None:
    """What is gained on the trained classes, against what is lost elsewhere."""
    import matplotlib.pyplot as plt

    untouched = rows["untouched"][0]["1"]
    elsewhere = [place for place in ("left_out", "others") if place in untouched]
    figure, every = plt.subplots(
        1, len(elsewhere), figsize=(1.5 + 5.5 * len(elsewhere), 6), sharey=True, squeeze=False
    )

    def points(results: list[dict[str, Any]], place: str) -> list[list[float]]:
        """Mean changes elsewhere, and on the trained classes, from no blend to the tuned tower."""
        return [
            [0.0]
            + [
                float(np.mean(values(results, blend, of, MAP))) - untouched[of][MAP]
                for blend in sorted(blends)
            ]
            for of in (place, "trained")
        ]

    for place, axes in zip(elsewhere, every[0], strict=True):
        axes.axvline(0, color="0.8")
        axes.axhline(0, color="0.8")
        for number, (method, results) in enumerate(list(rows.items())[1:]):
            peer = method.startswith("PML")
            style = {
                "marker": (PEERS_MARKERS if peer else OUR_MARKERS)[number % len(OUR_MARKERS)],
                "color": COLORS[number % len(COLORS)],
            }
            line = points(results, place)
            axes.plot(*line, linestyle=":" if peer else "-", label=method, **style)
            for result in results[0]["by_rate"].values():
                axes.plot(*points([result], place), linestyle="", alpha=0.35, markersize=4, **style)
        axes.plot(0, 0, "ks", label="untouched")
        axes.set_xlabel(f"change of mAP on {PLACES[place]}")
    every[0][0].set_ylabel("change of mAP on held-out images of the trained classes")
    figure.suptitle("From the untouched tower over blends to what was trained; pale: other rates")
    every[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
