"""What each step from a tower to a fast search costs in recall at 1, so that its cause is seen.

    pip install -e ".[bench,onnx]"
    python tests/benchmarks/ledger.py --data FOLDER --tower FOLDER

--data has a folder for each class. Of each, --queries images search the others, and a query counts
if the nearest image is of its class. Every step is compared with the exact search on the same
queries: the difference of R@1 has a 95 % paired percentile bootstrap interval over queries. Beside
it, the share of the exact 10 nearest that a step finds. Truncated embeddings are the first numbers
of each; the ONNX file is run by onnxruntime for queries and collection alike. Bytes are those of
one image's embedding. Without --data, digits and a random tower, to try the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import faiss
import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pairclip import ImageIndex, LabelledImages, VisionTower, embed_images, load_tower
from pairclip.evaluation.comparison import paired_intervals
from pairclip.towers import random_tower

K = 10


class Step(NamedTuple):
    """An index to search, by which queries, and what an image takes in it."""

    name: str
    index: Any
    queries: Tensor
    bytes_per_image: float


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder for each class")
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--queries", type=int, default=100, help="of each class")
    parser.add_argument("--per-class", type=int, default=1000, help="images, with the queries")
    parser.add_argument("--cells", type=int, default=64, help="of the approximate indices")
    parser.add_argument("--probes", type=int, default=4, help="cells that a search looks at")
    parser.add_argument("--codes", type=int, nargs="+", default=[32, 16], help="bytes of PQ")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 32], help="truncated to these")
    parser.add_argument("--json", type=Path, help="where the rows go, too")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[VisionTower, LabelledImages]:
    if args.data is not None:
        return load_tower(args.tower), LabelledImages(str(args.data))
    from sklearn.datasets import load_digits

    digits = load_digits()
    return random_tower(patch_size=4), LabelledImages(
        (np.uint8(digits.images * 15.9), digits.target)
    )


def split(labels: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Places of the queries and of the others, the same each time."""
    generator = torch.Generator().manual_seed(0)
    queries, others = [], []
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=generator)][: args.per_class]
        queries.append(places[: args.queries])
        others.append(places[args.queries :])
    return torch.cat(queries), torch.cat(others)


def onnx_embeddings(tower: VisionTower, images: LabelledImages, places: Tensor) -> Tensor:
    """By onnxruntime from the exported tower."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tower.onnx"
        tower.export_onnx(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = [given.name for given in session.get_inputs()]
        for piece in places.split(64):
            pixels = [tower.preprocess(images[place][0]) for place in piece.tolist()]
            rows.append(session.run(None, {name: torch.stack(pixels).numpy()})[0])
    return torch.from_numpy(np.concatenate(rows))


def steps_of(args: argparse.Namespace) -> tuple[list[Step], Tensor, Tensor]:
    """The steps, and the labels of the queries and of the others."""
    tower, images = load(args)
    queries, others = split(images.labels, args)
    places = torch.cat([queries, others])
    rows = embed_images(tower, [images[place][0] for place in places.tolist()])

    def index_of(embeddings: Tensor) -> ImageIndex:
        absent = {"labels": None, "class_names": None, "paths": None, "fingerprint": "none"}
        return ImageIndex(normalize(embeddings[len(queries) :].float()), **absent)

    def searched(name: str, index: Any, embeddings: Tensor, size: float) -> Step:
        return Step(name, index, embeddings[: len(queries)].float(), size)

    exact, dim = index_of(rows), rows.shape[1]
    half = ImageIndex(
        exact.embeddings.half(), labels=None, class_names=None, paths=None, fingerprint="none"
    )
    steps = [
        searched("float32, exact", exact, rows, 4 * dim),
        searched("float16, exact", half, rows, 2 * dim),
    ]
    factories = [(f"IVF{args.cells},Flat", 4 * dim)]
    factories += [(f"IVF{args.cells},PQ{codes}", codes) for codes in args.codes]
    for factory, size in factories:
        approximate = exact.to_faiss(factory, nprobe=args.probes)
        steps.append(searched(f"FAISS {factory}, {args.probes} cells", approximate, rows, size))
    for size in args.dims:
        cut = rows[:, :size]
        steps.append(searched(f"first {size} of {dim} numbers", index_of(cut), cut, 4 * size))
    exported = onnx_embeddings(tower, images, places)
    steps.append(searched("ONNX tower, exact", index_of(exported), exported, 4 * dim))
    return steps, images.labels[queries], images.labels[others]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    steps, wanted, labels = steps_of(args)
    rows, exact_hits, exact_nearest = [], np.zeros(0), torch.zeros(0)
    for step in steps:
        _, nearest = step.index.nearest_neighbors(step.queries, K)
        hits = ((labels[nearest[:, 0]] == wanted) & (nearest[:, 0] >= 0)).double().numpy()
        if not rows:
            exact_hits, exact_nearest = hits, nearest
        same = (exact_nearest[:, :, None] == nearest[:, None, :]).any(2).double().mean()
        interval = paired_intervals(exact_hits[None], hits[None])
        rows.append(
            {
                "step": step.name,
                "bytes": step.bytes_per_image,
                "recall_at_1": hits.mean(),
                "difference": hits.mean() - exact_hits.mean(),
                "interval": interval[0].tolist(),
                "same_nearest": float(same),
            }
        )
    print(f"{len(wanted)} queries, {len(labels)} others, {len(labels.unique())} classes\n")
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    headers = ["step", "bytes", "R@1", "less exact", "95 % interval", "of the exact 10"]

    def line_of(row: dict[str, Any]) -> list[str]:
        low, high = row["interval"]
        return [
            row["step"],
            f"{row['bytes']:,}",
            f"{row['recall_at_1']:.3f}",
            f"{row['difference']:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{row['same_nearest']:.3f}",
        ]

    return _bench.table(headers, map(line_of, rows))


def main() -> int:
    args = parse()
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = measure(args)
    print(report(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
