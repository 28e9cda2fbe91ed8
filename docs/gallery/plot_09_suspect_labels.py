"""
Find labels that may be wrong
=============================

One label in twenty is changed at random, without telling the tower. Which ones, it says by itself,
without any training.
"""

import numpy as np
from drawings import TOWER, drawings
from matplotlib import pyplot as plt
from sklearn.metrics import roc_auc_score

import pairclip
from pairclip.evaluation import suspect_labels

# %%
# Twenty-five drawings of each kind, and a twentieth of the labels moved to another kind.
images, kinds = drawings(per_class=25)
data = pairclip.LabelledImages((images, kinds))
names, true = data.class_names, np.asarray(data.labels)
rng = np.random.default_rng(0)
changed = rng.choice(len(true), len(true) // 20, replace=False)
labels = true.copy()
labels[changed] = (true[changed] + rng.integers(1, 12, len(changed))) % 12

# %%
# Each image's class is predicted from all other images, and the score says how much better another
# class fits than its own.
embeddings = pairclip.embed_images(pairclip.load_tower(TOWER), images)
suspicion = suspect_labels(embeddings, labels)
scores = suspicion.scores.numpy()
print(f"area under the ROC curve: {roc_auc_score(labels != true, scores):.3f}")

# %%
# The ten most suspect images: what the label says, and what fits better. Frames are red where the
# label was indeed changed.
figure, axes = plt.subplots(2, 5, figsize=(9, 4.6), layout="constrained")
for panel, i in zip(axes.flat, np.argsort(-scores)[:10]):
    panel.imshow(images[i])
    better = names[suspicion.classes[i]]
    panel.set_title(f'"{names[labels[i]]}"?\n{better} ({scores[i]:.2f})', fontsize=9)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set(color="red" if i in changed else "grey", linewidth=3)
plt.show()

# %%
# ``pairclip check`` lists them for a folder or a table, with copies and damaged files:
# :doc:`/command`.
