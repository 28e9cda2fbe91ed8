"""
What pairs of different classes should cost
===========================================

The loss of a pair of one class is :math:`1 - S`. For a pair of different classes there are three
forms: ``linear`` costs :math:`S`, ``hinge`` costs what is above a margin, ``squared`` costs
:math:`S^2`. They lead to different places, and this shows where, on scikit-learn's digits.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

from pairclip import AllPairsCosineLoss, class_similarity_matrix, map_at_r

# %%
# The losses work in any PyTorch loop. The encoder is two small layers; every second digit is held
# out.
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def train(loss: torch.nn.Module, steps: int = 200) -> torch.Tensor:
    """Embeddings of the held-out digits after training on the others."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    )
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = 2 * torch.randint(len(images) // 2, (128,))
        optimizer.zero_grad()
        loss(encoder(images[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return encoder(images[1::2])


# %%
# ``linear`` has nothing to gain from turning a similarity of 0 into one of 0, so it pushes two
# groups of classes to opposite sides, and leaves the classes within a group on top of each other:
# blocks of red. The other two tell all ten digits apart.
forms = {
    "linear": AllPairsCosineLoss(negatives="linear", positive_fraction=0.5),
    "hinge, margin 0.2": AllPairsCosineLoss(
        negatives="hinge", margin=0.2, positive_fraction=0.5
    ),
    "squared": AllPairsCosineLoss(negatives="squared", positive_fraction=0.5),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 4), layout="constrained")
for panel, (name, loss) in zip(axes, forms.items()):
    embeddings = train(loss)
    similarity, classes = class_similarity_matrix(embeddings, labels[1::2])
    drawn = panel.imshow(similarity, vmin=-1, vmax=1, cmap="RdBu_r")
    panel.set(title=f"{name}\nMAP@R {map_at_r(embeddings, labels[1::2]):.2f}")
    panel.set(xticks=range(10), yticks=range(10))
figure.colorbar(drawn, ax=axes, label="mean similarity of two classes", shrink=0.7)
plt.show()

# %%
# So take ``squared`` unless you know why not. :doc:`/loss` has the formulas and the reasons.
