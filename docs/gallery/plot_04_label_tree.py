"""
Labels that form a tree
=======================

A boat is more of a car than of a flower. With plain classes a training pushes all of them equally
far apart; with a tree of labels each pair has the similarity that the tree says.
"""

import torch
from drawings import KINDS, TOWER, drawings
from matplotlib import pyplot as plt

import pairclip

TREE = {
    "animals": ["butterfly", "fish"],
    "plants": ["flower", "mushroom", "tree"],
    "vehicles": ["boat", "car"],
    "at home": ["clock", "cup", "key", "umbrella", "house"],
}

# %%
# Two kinds of one branch are to have a similarity of 0.4, others 0. The rows of the targets are
# those numbers, one row for each kind, in the order of the class ids.
branch = {kind: name for name, kinds in TREE.items() for kind in kinds}
names = sorted(KINDS)
targets = pairclip.hierarchy_targets(
    [(branch[kind], kind) for kind in names], weights=[2, 3]
)

images = pairclip.LabelledImages(drawings(per_class=12))
tower = pairclip.load_tower(TOWER)
before = pairclip.evaluate(tower, images)
finetuner = pairclip.Finetuner(
    tower, pairclip.TargetSimilarityLoss(), learning_rate=6e-4
)
history = finetuner.fit(
    images, batch_size=36, max_steps=20, targets=targets[images.labels]
)
after = pairclip.evaluate(tower, pairclip.LabelledImages(drawings(per_class=6, seed=1)))

# %%
# Left the start, in the middle what was asked for, on the right what new drawings have become.
order = [names.index(kind) for kinds in TREE.values() for kind in kinds]
wanted = pairclip.similarity_matrix(targets)
panels = {
    "before": torch.as_tensor(before.class_similarity),
    "the tree": wanted,
    "after": torch.as_tensor(after.class_similarity),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), sharey=True, layout="constrained")
for panel, (title, similarity) in zip(axes, panels.items()):
    drawn = panel.imshow(similarity[order][:, order], vmin=-1, vmax=1, cmap="RdBu_r")
    panel.set_title(title)
    panel.set_xticks(range(12), [names[i] for i in order], rotation=90)
axes[0].set_yticks(range(12), [names[i] for i in order])
figure.colorbar(drawn, ax=axes, label="mean similarity", shrink=0.7)
plt.show()

# %%
# Several labels of one image work alike: :doc:`/soft-labels`.
