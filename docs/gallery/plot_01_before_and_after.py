"""
Tune, and see what changed
==========================

A tower that finds everything rather alike, and the same after twenty-four steps: images of one
kind have come together, images of different kinds have moved apart.
"""

import torch
from drawings import TOWER, drawings
from torch.utils.data import random_split

import pairclip

# %%
# Twelve kinds of drawings; a third of them is held out to evaluate on. In your code these are
# ``LabelledImages("photos")`` and ``load_tower("openai/clip-vit-base-patch32")``.
images = pairclip.LabelledImages(drawings(per_class=24))
seeded = torch.Generator().manual_seed(0)
train, test = random_split(images, [2 / 3, 1 / 3], generator=seeded)
tower = pairclip.load_tower(TOWER)

# %%
# Eight images that no training sees, two of each of four kinds, and how similar the tower finds
# them before anything is trained.
labels = pairclip.labels_of(test)
eight = [i for kind in range(4) for i in (labels == kind).nonzero()[:2, 0].tolist()]
pictures = [test[i][0] for i in eight]
before = pairclip.evaluate(tower, test)
similarity = pairclip.similarity_matrix(pairclip.embed_images(tower, pictures))
figure = pairclip.plot_similarity_matrix(pictures, similarity, title="before")

# %%
# Train on all pairs of each batch. The rate suits a tower this small; CLIP wants 1e-5.
loss = pairclip.AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
finetuner = pairclip.Finetuner(tower, loss, learning_rate=6e-4)
history = finetuner.fit(train, batch_size=48, max_steps=24)

# %%
# The same eight images afterwards, on the same scale of colours.
similarity = pairclip.similarity_matrix(pairclip.embed_images(tower, pictures))
figure = pairclip.plot_similarity_matrix(pictures, similarity, title="after")

# %%
# Numbers on all held-out images. The interval says whether a change could be chance.
after = pairclip.evaluate(tower, test)
print("\n".join(after.to_markdown(before).splitlines()[:12]))

# %%
# Which kinds are like which, before and after, in the same order.
figure = pairclip.plot_class_similarity(before, title="kinds, before")

# %%
figure = pairclip.plot_class_similarity(after, order=before, title="kinds, after")
