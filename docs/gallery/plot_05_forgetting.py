"""
Tune without forgetting
=======================

A training on some classes costs what the tower knew of others. A term that preserves, and a blend
of the weights before and after, buy most of it back.
"""

import copy

from drawings import TOWER, drawings
from matplotlib import pyplot as plt

import pairclip

# %%
# Eight kinds are trained on. Both they and the four others are then searched, among drawings that
# no training saw.
images, kinds = drawings(per_class=28)
held_out = {"boat", "flower", "key", "umbrella"}


def part(*, trained: bool, first: int, last: int) -> pairclip.LabelledImages:
    """Drawings number `first` to `last` of each kind."""
    wanted = [
        i
        for i, kind in enumerate(kinds)
        if (kind not in held_out) == trained and first <= i % 28 < last
    ]
    return pairclip.LabelledImages(
        ([images[i] for i in wanted], [kinds[i] for i in wanted])
    )


train = part(trained=True, first=0, last=16)
known, unknown = (
    part(trained=True, first=16, last=28),
    part(trained=False, first=0, last=28),
)

# %%
# The same training twice, once with a term that keeps similarities as they were.
untouched = pairclip.load_tower(TOWER)
plain = pairclip.AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
losses = {
    "plain": plain,
    "preserving": pairclip.PreservingLoss(plain, weight=0.5, what="similarities"),
}
lines = {}
for name, loss in losses.items():
    tower = copy.deepcopy(untouched)
    pairclip.Finetuner(tower, loss, learning_rate=6e-4).fit(
        train, batch_size=32, max_steps=20
    )
    lines[name] = []
    for share in (0, 1 / 3, 2 / 3, 1):
        blend = pairclip.interpolate(untouched, tower, share)
        lines[name].append(
            [
                pairclip.evaluate(blend, each).mean_average_precision
                for each in (unknown, known)
            ]
        )

# %%
# Each line goes from the untouched tower to the one that was trained, over blends of the two. Up
# is better on what was trained, to the right is better on what was not.
figure, panel = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
for (name, points), marker in zip(lines.items(), "os"):
    panel.plot(*zip(*points), marker=marker, label=name)
panel.annotate(
    "untouched", lines["plain"][0], xytext=(6, 6), textcoords="offset points"
)
panel.set(xlabel="mAP on kinds never trained on", ylabel="mAP on trained kinds")
panel.legend()
panel.grid(alpha=0.3)
plt.show()

# %%
# :doc:`/forgetting` has the same on real images, and what else moves these lines.
