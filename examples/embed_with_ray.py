"""Embed a collection too large for one machine with Ray, into Parquet files that an index reads.

    pip install -e ".[ray]"
    python examples/embed_with_ray.py photos --output embedded --model FOLDER_OR_ID
    python examples/embed_with_ray.py images.csv --image path --label class --output embedded
    python examples/embed_with_ray.py parquet_folder --output embedded --towers 8 --gpus 1

The images are those of a folder, however they are nested (the name of each one's folder is its
label), or of a table: CSV, or one or several Parquet files with paths, encoded images, or the
structs of both that Hugging Face writes. Ray Data reads and preprocesses them on all processors,
`--towers` copies of the tower embed, and each `--shard` images become a file `part-*.parquet` with
columns path, label and vector, written whole or not at all. Started again after whatever stopped
it, it embeds what is missing. Then `ImageIndex.from_parquet("embedded")` searches.

It starts Ray on this machine, or joins the cluster that the variable RAY_ADDRESS names. All
machines have to see the images and the tower under these paths; the first one writes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from pyarrow import parquet

from pairclip import LabelledImages, TableDataset, load_tower
from pairclip._files import whole_file
from pairclip.command.arguments import CLIP, HelpFormatter, whole_number
from pairclip.command.running import obey
from pairclip.datasets import image_files

Shard = dict[str, Any]
LISTING = "images.listing"  # no name that `ImageIndex.from_parquet` reads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("images", type=Path, help="folder of images, .csv, .parquet, or folder of .parquet")
    add("--output", type=Path, required=True, help="folder that gets the Parquet files")
    add("--model", default=CLIP, help="the tower: an id, or a folder that all machines see")
    add("--image", default="path", help="the table's column of images")
    add("--label", help="the table's column of classes")
    add("--towers", type=whole_number(1), default=1, help="how many embed at once")
    add("--gpus", type=float, default=0, help="GPUs of each tower")
    add("--batch-size", type=whole_number(1), default=64, help="images per forward pass")
    add("--shard", type=whole_number(1), default=10_000, help="images per file")
    return parser.parse_args(arguments)


def tables(args: argparse.Namespace) -> list[Path]:
    """Parquet files with a row for each image; those of a folder or a CSV file are made first."""
    if not args.images.exists():
        raise FileNotFoundError(
            f"'{args.images}' is no folder and no table: there is no such file."
        )
    if args.images.suffix == ".parquet":
        return [args.images]
    if args.images.is_dir() and (files := sorted(args.images.glob("*.parquet"))):
        return files
    columns: dict[str, Any] = {}
    if args.images.is_dir():
        columns["path"] = [os.path.abspath(path) for path in image_files(args.images)]
        columns["label"] = [Path(path).parent.name for path in columns["path"]]
    else:
        table = TableDataset(args.images, image=args.image, label=args.label or args.image)
        data = LabelledImages(table)
        columns["path"] = [os.path.abspath(data.source.path(row)) for row in range(len(data))]
        if args.label:
            names = data.class_names
            labels = data.labels.tolist()
            columns["label"] = [names[label] for label in labels] if names else labels
    args.image, args.label = "path", "label" if "label" in columns else None
    table, file = pa.table(columns), args.output / LISTING
    if not len(table):
        raise ValueError(f"'{args.images}' has no images.")
    if not file.exists():
        write(table, file, row_group_size=args.shard)
    elif not parquet.read_table(file).equals(table):
        raise ValueError(
            f"'{args.images}' has other images or labels than when '{args.output}' was begun. "
            "Choose another --output, or remove that folder."
        )
    return [file]


def shards_of(files: list[Path], args: argparse.Namespace) -> list[Shard]:
    """Where the rows of each file to write lie."""
    shards: list[Shard] = []
    for file in files:
        try:
            opened = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"'{file}' can't be read: {error}") from error
        there, rows = opened.schema_arrow.names, opened.metadata.num_rows
        for option, column in (("--image", args.image), ("--label", args.label)):
            if column is not None and column not in there:
                raise ValueError(f"{option} '{column}' is no column of '{file}': it has {there}.")
        for first in range(0, rows, args.shard):
            place = {"file": str(file.absolute()), "first": first}
            shards.append({"number": len(shards), **place, "count": min(args.shard, rows - first)})
    if not shards:
        raise ValueError(f"'{args.images}' has no images.")
    return shards


def rows_of(shard: Shard, columns: list[str]) -> pa.Table:
    """The table's rows of a shard, from the row groups that have them."""
    file = parquet.ParquetFile(shard["file"])
    layout = file.metadata
    ends = np.cumsum([layout.row_group(group).num_rows for group in range(layout.num_row_groups)])
    last = shard["first"] + shard["count"] - 1
    low, high = np.searchsorted(ends, [shard["first"], last], side="right").tolist()
    groups = range(low, high + 1)
    before = int(ends[low - 1]) if low else 0
    return file.read_row_groups(groups, columns).slice(shard["first"] - before, shard["count"])


def read(batch: dict[str, Any], args: argparse.Namespace, preprocess: Any) -> Iterator[Any]:
    """The pixel values of a shard's images, a batch after the other; run by Ray's tasks."""
    shard = {name: values.tolist()[0] for name, values in batch.items()}
    rows, beside = rows_of(shard, [args.image])[args.image], Path(shard["file"]).parent
    for first in range(0, len(rows), args.batch_size):
        entries = []
        for value in rows.slice(first, args.batch_size).to_pylist():
            entry = (value["bytes"] or value["path"]) if isinstance(value, dict) else value
            entries.append(str(beside / entry) if isinstance(entry, str) else entry)
        images = LabelledImages((entries, [0] * len(entries)))
        pixels = preprocess.batch(image for image, _ in images)
        places = np.arange(first, first + len(entries))
        number = np.full(len(entries), shard["number"])
        yield {"shard": number, "row": places, "pixels": torch.stack(list(pixels)).numpy()}


class Embed:
    """A tower in a process of its own."""

    def __init__(self, model: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tower = load_tower(model, device=self.device).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed a batch of pixel values."""
        pixels = torch.from_numpy(np.array(batch.pop("pixels"))).to(self.device)
        on_gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            return {**batch, "vector": self.tower(pixels).float().cpu().numpy()}


def write(table: pa.Table, file: Path, **options: Any) -> None:
    """Put a file in place when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as stream:
        parquet.write_table(table, stream, write_page_checksum=True, **options)


class Shards:
    """The files that are made, and those that are there."""

    def __init__(self, args: argparse.Namespace, fingerprint: str) -> None:
        self.args = args
        self.fingerprint = fingerprint

    def file(self, shard: Shard) -> Path:
        """Where a shard goes."""
        return self.args.output / f"part-{shard['number']:06}.parquet"

    def is_there(self, shard: Shard) -> bool:
        """Whether a shard is written; an error if the file is of something else."""
        file = self.file(shard)
        if not file.exists():
            return False
        if (parquet.read_schema(file).metadata or {}) != self._metadata(shard):
            raise ValueError(
                f"'{file}' was made by another tower, or of other images or shards. Choose another "
                "--output, or remove that folder."
            )
        return True

    def write(self, shard: Shard, vectors: np.ndarray) -> None:
        """Write a shard whose vectors are complete."""
        args, columns = self.args, {}
        if not np.isfinite(vectors).all():
            raise ValueError(f"An embedding is not finite in {self._metadata(shard)[b'source']!r}.")
        names = [args.image, args.label] if args.label else [args.image]
        rows = rows_of(shard, names)
        images = rows[args.image].to_pylist()
        paths = [image.get("path") if isinstance(image, dict) else image for image in images]
        columns["path"] = pa.array([p if isinstance(p, str) else None for p in paths], pa.string())
        if args.label:
            columns["label"] = rows[args.label]
            if columns["label"].null_count:
                raise ValueError(f"A label is missing in {self._metadata(shard)[b'source']!r}.")
        flat = pa.array(vectors.reshape(-1))
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = pa.table(columns).replace_schema_metadata(self._metadata(shard))
        write(table, self.file(shard))

    def _metadata(self, shard: Shard) -> dict[bytes, bytes]:
        file = Path(shard["file"])
        rows = f"rows {shard['first']} to {shard['first'] + shard['count']}"
        source = f"{self.args.image}, {rows} of {file.name} of {file.stat().st_size} bytes"
        return {b"pairclip.fingerprint": self.fingerprint.encode(), b"source": source.encode()}


def run(args: argparse.Namespace) -> None:
    """Embed what is not embedded yet."""
    tower = load_tower(args.model, device="cpu")
    shards = Shards(args, tower.fingerprint())
    plan = shards_of(tables(args), args)
    missing = [shard for shard in plan if not shards.is_there(shard)]
    images = sum(shard["count"] for shard in plan)
    print(f"{images} images in {len(plan)} shards, {len(plan) - len(missing)} of them there.")
    if not missing:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    embedded = (
        ray.data.from_items(missing, override_num_blocks=len(missing))
        .map_batches(read, batch_size=1, fn_kwargs={"args": args, "preprocess": tower.preprocess})
        # A tower takes no processor from those that read, so one of them is never without any.
        .map_batches(
            Embed,
            fn_constructor_args=[args.model],
            batch_size=args.batch_size,
            compute=ray.data.ActorPoolStrategy(size=args.towers),
            num_gpus=args.gpus,
            num_cpus=0,
        )
    )
    try:
        collect(embedded, {shard["number"]: shard for shard in missing}, shards)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"A worker failed: {error.cause}") from error


def collect(embedded: Any, missing: dict[int, Shard], shards: Shards) -> None:
    """Write each shard when its last vector has come, in whatever order they come."""
    begun: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    start, done = time.monotonic(), 0
    for batch in embedded.iter_batches(batch_size=None):
        for number in np.unique(batch["shard"]).tolist():
            shard, own = missing[number], batch["shard"] == number
            vectors = batch["vector"][own]
            if number not in begun:
                empty = np.empty((shard["count"], vectors.shape[1]), np.float32)
                begun[number] = empty, np.zeros(shard["count"], bool)
            into, is_there = begun[number]
            into[batch["row"][own]], is_there[batch["row"][own]] = vectors, True
            if is_there.all():
                shards.write(shard, begun.pop(number)[0])
                done += shard["count"]
                rate = done / (time.monotonic() - start)
                print(f"{shards.file(shard).name}: {done} images, {rate:.0f}/s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Embed; the exit code."""
    return obey(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
