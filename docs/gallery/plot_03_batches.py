"""
What a batch is made of
=======================

A batch decides which images are compared. Three samplers, and what each of them draws from a
collection whose classes are of very different sizes.
"""

import numpy as np
from matplotlib import pyplot as plt

from pairclip import ClassBalancedSampler, GroupSampler, PairSampler

# %%
# Six models of car and six breeds of cat, from 120 images of a class down to 8.
sizes = np.array([120, 80, 40, 24, 12, 8, 120, 80, 40, 24, 12, 8])
labels = np.repeat(np.arange(12), sizes)
kinds = np.repeat(["cars", "cats"], sizes.reshape(2, 6).sum(axis=1))

samplers = {
    "PairSampler": PairSampler(labels, pairs_per_batch=12),
    "PairSampler,\nclass_balanced": PairSampler(
        labels, pairs_per_batch=12, class_balanced=True
    ),
    "ClassBalancedSampler": ClassBalancedSampler(labels, 6, 4),
    "GroupSampler": GroupSampler(
        labels, kinds, classes_per_batch=6, samples_per_class=4
    ),
}

# %%
# A column is a batch of 24 images, and the colour says how many of them are of a class. Pairs
# follow the sizes of the classes, half of them matching. P x K takes K images of each of P classes
# in every batch, which is what a loss over all pairs wants. Groups keep a batch among what looks
# alike: cats against cats.
figure, axes = plt.subplots(1, 4, figsize=(11, 4), sharey=True, layout="constrained")
for panel, (name, sampler) in zip(axes, samplers.items()):
    batches = [batch for batch, _ in zip(sampler, range(16))]
    counts = np.stack(
        [np.bincount(labels[batch], minlength=12) for batch in batches], axis=1
    )
    drawn = panel.imshow(counts, vmin=0, vmax=12, cmap="viridis", aspect="auto")
    panel.set(title=name, xlabel="batch")
axes[0].set_yticks(
    range(12), [f"{'car' if i < 6 else 'cat'}, {n}" for i, n in enumerate(sizes)]
)
figure.colorbar(drawn, ax=axes, label="images of the class in the batch")
plt.show()

# %%
# How long an epoch is follows from that: every sampler says it, and continues where it was stopped.
# :doc:`/sampling` has the rules.
for name, sampler in samplers.items():
    print(" ".join(name.split()), len(sampler), "batches in an epoch")
