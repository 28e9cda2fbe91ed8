"""
Bring your own loss
===================

A loss is any ``loss(embeddings, labels)``. Those of pytorch-metric-learning work as they are, and
so does a function of five lines.
"""

import copy

import torch
from drawings import TOWER, drawings
from matplotlib import pyplot as plt
from pytorch_metric_learning.losses import NTXentLoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner

import pairclip


# %%
# A loss of your own: each image should be classified by the others of its batch, which is
# neighbourhood component analysis on cosines (Goldberger et al. 2004).
def neighbourhood_loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows = torch.nn.functional.normalize(embeddings, dim=1)
    logits = rows @ rows.T / 0.1
    logits = logits.masked_fill(torch.eye(len(labels), dtype=torch.bool), -torch.inf)
    same = labels[:, None] == labels
    return -(logits.softmax(dim=1) * same).sum(dim=1).log().mean()


# %%
# A loss with a miner, as pytorch-metric-learning has them, is a function too.
triplets, miner = TripletMarginLoss(margin=0.1), TripletMarginMiner(margin=0.2)


def mined_triplets(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return triplets(embeddings, labels, miner(embeddings, labels))


# %%
# Each trains the same tower, on the same batches. All get the gradient of the whole batch, on any
# number of processes, and checkpoints that resume.
losses = {
    "all pairs, squared": pairclip.AllPairsCosineLoss(
        negatives="squared", positive_fraction=0.2
    ),
    "NTXentLoss of PML": NTXentLoss(temperature=0.1),
    "mined triplets of PML": mined_triplets,
    "neighbourhood_loss": neighbourhood_loss,
}
train = pairclip.LabelledImages(drawings(per_class=16))
test = pairclip.LabelledImages(drawings(per_class=8, seed=1))
untouched = pairclip.load_tower(TOWER)
results = {"untouched": pairclip.evaluate(untouched, test)}
for name, loss in losses.items():
    tower = copy.deepcopy(untouched)
    pairclip.Finetuner(tower, loss, learning_rate=3e-4).fit(
        train, batch_size=36, max_steps=8
    )
    results[name] = pairclip.evaluate(tower, test)

# %%
# Eight steps at one rate on drawings rank no losses; they show that each of them trains.
figure, panel = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
precision = [result.mean_average_precision for result in results.values()]
bars = panel.barh(list(results), precision)
panel.bar_label(bars, fmt="%.2f", padding=3)
panel.set(xlim=(0, 1), xlabel="mean average precision on new drawings")
panel.invert_yaxis()
plt.show()
