"""
A threshold for "no match"
==========================

A search always finds something. From which similarity on is it the same thing? Choose the share of
false matches that you can live with, and see what it costs.
"""

from drawings import TOWER, drawings
from matplotlib import pyplot as plt

import pairclip

# %%
# A tower tuned on eight kinds. The four others stand for what people will search for.
images, kinds = drawings(per_class=20)
new = {"boat", "flower", "key", "umbrella"}


def of(*, kind_is_new: bool) -> pairclip.LabelledImages:
    """The drawings of the new kinds, or of the others."""
    wanted = [i for i, kind in enumerate(kinds) if (kind in new) == kind_is_new]
    return pairclip.LabelledImages(
        ([images[i] for i in wanted], [kinds[i] for i in wanted])
    )


tower = pairclip.load_tower(TOWER)
loss = pairclip.AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
finetuner = pairclip.Finetuner(tower, loss, learning_rate=6e-4)
history = finetuner.fit(of(kind_is_new=False), batch_size=32, max_steps=20)

# %%
# Fresh drawings say where the threshold is. A search compares a query with every image of the
# index, here 160, so one false match in twenty pairs would nearly always find something: allow one
# in five hundred.
fresh = pairclip.LabelledImages(drawings(per_class=15, seed=1))
embeddings = pairclip.embed_images(tower, fresh)
chosen = pairclip.choose_threshold(embeddings, fresh.labels, false_match_rate=0.002)
print(f"threshold {chosen.threshold:.2f}")
print("with other kinds between {:.2f} and {:.2f}".format(*chosen.interval))
print(f"{chosen.match_rate:.0%} of the pairs of one kind are matched")
low, high = chosen.false_match_interval
print(f"false matches of other kinds: {low:.2%} to {high:.2%}")

# %%
# The line in the histogram is what was chosen: right of it is called a match.
figure = pairclip.plot_pair_histogram(pairclip.evaluate(tower, fresh))
figure.axes[0].axvline(chosen.threshold, color="black", linestyle="--")
plt.show()

# %%
# In a search, ``min_score`` leaves out what is below. The index has the eight kinds alone, so for
# these what is asked for is in it, and for the four new ones it is not.
index = pairclip.ImageIndex.build(tower, of(kind_is_new=False))
answers = index.search(embeddings, k=1, min_score=chosen.threshold)
names = [match[0].class_name if match else "no match" for match in answers]
asked = [fresh.class_names[label] for label in fresh.labels]
for title, is_new in (("kinds in the index", False), ("new kinds", True)):
    some = [(name, kind) for name, kind in zip(names, asked) if (kind in new) == is_new]
    right = sum(name == kind for name, kind in some) / len(some)
    nothing = sum(name == "no match" for name, _ in some) / len(some)
    print(f"{title}: {right:.0%} find their kind, {nothing:.0%} nothing, others err")

# %%
# Some kinds are harder than others. The threshold is one for all, what it does to each is told.
figure, panel = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
panel.barh(fresh.class_names, chosen.class_match_rates)
panel.set(xlim=(0, 1), xlabel="share of the pairs of this kind that are matched")
plt.show()
