"""How well `suspect_labels` tells labels that were changed from those that are right.

    python tests/benchmarks/suspects.py --folder cifar10/train --tower some/clip

A share of the labels of a labelled folder is changed at random, to any other class. The tower was
not trained on these images or these labels: each image is judged by a regression on all the others.
Beside it is the plain way: the share of an image's 20 nearest neighbours that are of its class.
Ends with 1 if the area under the ROC curve is below .85. Without a folder: the drawings of
`examples/offline` and the tower beside them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

OFFLINE = Path(__file__).parents[2] / "examples" / "offline"
WANTED = 0.85
THRESHOLDS = (0.0, 0.2, 0.4, 0.6)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="with a folder for each class (default: drawings)")
    parser.add_argument("--tower", default=str(OFFLINE / "tower"), help="folder or Hugging Face id")
    parser.add_argument("--per-class", type=int, default=500, help="images of each class")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels, changed")
    parser.add_argument("--seeds", type=int, default=5, help="draws of what is changed")
    args = parser.parse_args()

    from pairclip import LabelledImages, embed_images, load_tower, nearest_neighbors
    from pairclip.evaluation import suspect_labels

    if args.folder:
        images = LabelledImages(args.folder)
    else:
        sys.path.insert(0, str(OFFLINE))
        from drawings import drawings

        images = LabelledImages(drawings(per_class=args.per_class))
    labels = images.labels.numpy()
    rows = np.concatenate(
        [np.flatnonzero(labels == label)[: args.per_class] for label in np.unique(labels)]
    )
    labels = labels[rows]
    embeddings = embed_images(
        load_tower(args.tower), ([images[row][0] for row in rows], labels.tolist())
    )
    neighbours = nearest_neighbors(embeddings, k=20)[1].numpy()
    print(f"{len(labels):,} images of {len(np.unique(labels))} classes, {args.share:.0%} changed\n")
    above = " | ".join(f"changed among those above {each}" for each in THRESHOLDS)
    print(f"| seed | AUROC | of 20 neighbours | {above} |")
    print("|---:|" + "---:|" * (2 + len(THRESHOLDS)))
    areas = []
    for seed in range(args.seeds):
        random = np.random.default_rng(seed)
        changed = random.choice(len(labels), round(args.share * len(labels)), replace=False)
        classes, given = np.unique(labels, return_inverse=True)
        given[changed] += random.integers(1, len(classes), len(changed))
        given %= len(classes)
        wrong = np.isin(np.arange(len(labels)), changed)
        scores = suspect_labels(embeddings, given).scores.numpy()
        plain = -(given[neighbours] == given[:, None]).mean(axis=1)
        areas.append(roc_auc_score(wrong, scores))
        shares = [
            f"{wrong[scores > each].mean():.2f} of {int((scores > each).sum())}"
            if (scores > each).any()
            else "-"
            for each in THRESHOLDS
        ]
        cells = [f"{areas[-1]:.3f}", f"{roc_auc_score(wrong, plain):.3f}", *shares]
        print(f"| {seed} | {' | '.join(cells)} |")
    mean = float(np.mean(areas))
    print(f"\nMean AUROC {mean:.3f}; wanted at least {WANTED}.")
    return int(mean < WANTED)


if __name__ == "__main__":
    sys.exit(main())
