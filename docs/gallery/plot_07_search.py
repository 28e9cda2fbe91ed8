"""
Search a folder of images
=========================

An index of a folder, kept on the disk; queries by path; and a picture of what was found.
"""

import tempfile
from pathlib import Path

import drawings
from matplotlib import pyplot as plt
from PIL import Image

import pairclip

# %%
# A folder with a folder for each kind. Yours may be nested in any way.
root = Path(tempfile.mkdtemp())
drawings.save(root / "photos", per_class=20)
photos = pairclip.LabelledImages(root / "photos")
tower = pairclip.load_tower(drawings.TOWER)
index = pairclip.ImageIndex.build(tower, photos)
index.save(root / "index")
size = sum(file.stat().st_size for file in (root / "index").iterdir())
print(len(index), "images,", size, "bytes")

# %%
# Another process opens it in no time, and searches by image, path or embedding. The similarity of
# each match stands above it, with its class.
drawings.save(root / "queries", per_class=1, seed=5)
queries = [
    root / "queries" / kind / "000.png" for kind in ("car", "mushroom", "tree", "clock")
]
index = pairclip.ImageIndex.load(root / "index", tower)
figure, axes = plt.subplots(4, 6, figsize=(8, 6), layout="constrained")
for row, (query, matches) in zip(axes, zip(queries, index.search(queries, k=5))):
    row[0].imshow(Image.open(query))
    row[0].set_title("query", fontweight="bold")
    for panel, match in zip(row[1:], matches):
        panel.imshow(Image.open(match.path))
        panel.set_title(f"{match.class_name} {match.score:.2f}", fontsize=9)
for panel in axes.flat:
    panel.set_axis_off()
plt.show()

# %%
# The tower is not tuned here, and it shows. How often the first match is right, and how often a
# query of each kind is lost, is said by an evaluation, whose queries can be drawn too.
evaluation = pairclip.evaluate(tower, photos)
print(f"recall at 1: {evaluation.recall_at_1:.2f}")
figure = pairclip.plot_retrieval(photos, evaluation, queries=4)
plt.show()
