"""
An old index, and a tuned tower
===============================

Tuning moves all embeddings, so an index that was made before no longer fits. A map between the two
spaces, fitted without any label, saves embedding a million images again.
"""

import copy

from drawings import TOWER, drawings
from matplotlib import pyplot as plt

import pairclip

# %%
# The index has embeddings by the untouched tower; then the tower is tuned.
before = pairclip.load_tower(TOWER)
gallery = pairclip.LabelledImages(drawings(per_class=20))
old_index = pairclip.embed_images(before, gallery)

tower = copy.deepcopy(before)
loss = pairclip.AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
train = pairclip.LabelledImages(drawings(per_class=16, seed=1))
finetuner = pairclip.Finetuner(tower, loss, learning_rate=6e-4)
history = finetuner.fit(train, batch_size=36, max_steps=20)

# %%
# The map needs images that both towers have embedded; those of the training will do.
to_tuned = pairclip.align(
    pairclip.embed_images(before, train), pairclip.embed_images(tower, train)
)
print(f"cosine on images that were not fitted: {to_tuned.cosine:.2f}")

# %%
# Other drawings are the queries, in four ways.
queries = pairclip.LabelledImages(drawings(per_class=6, seed=2))
by_before, by_tuned = (pairclip.embed_images(each, queries) for each in (before, tower))
ways = {
    "untouched tower,\nold index": (old_index, by_before),
    "tuned tower,\nold index": (old_index, by_tuned),
    "tuned tower,\nold index, mapped": (to_tuned(old_index), by_tuned),
    "tuned tower,\nembedded again": (pairclip.embed_images(tower, gallery), by_tuned),
}
precision = {
    name: pairclip.mean_average_precision(
        index, gallery.labels, queries=asked, query_labels=queries.labels
    )
    for name, (index, asked) in ways.items()
}
figure, panel = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
bars = panel.barh(list(precision), list(precision.values()))
panel.bar_label(bars, fmt="%.2f", padding=3)
panel.set(xlim=(0, 1), xlabel="mean average precision")
panel.invert_yaxis()
plt.show()

# %%
# :doc:`/keep-text-search` has the way back, for texts, and what both give on photographs.
