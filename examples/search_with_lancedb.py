"""Search more images than one machine holds, in LanceDB, a database in a folder or a bucket.

    pip install -e ".[lancedb]"
    python examples/search_with_lancedb.py query.jpg --parquet embedded --database vectors
    python examples/search_with_lancedb.py query.jpg --database s3://bucket/vectors --label cat

Puts the Parquet files of `embed_with_ray.py`, or others with columns vector, path and label, into
the database, each at once or not at all; those that are in it are left out, so that a start after a
break goes on. Then it prints the images most like the query. The search is exact until `--cells`
makes an index of IVF and PQ, which looks at `--probes` of these cells and compares the nearest
`10 * k` again exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfPq
from pyarrow import parquet

from pairclip import VisionTower, embed_images, load_tower
from pairclip.command.arguments import CLIP, HelpFormatter, whole_number
from pairclip.command.running import obey

TABLE = "images"
FINGERPRINT, UNKNOWN = b"pairclip.fingerprint", b"unknown"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("query", type=Path, help="image to search with")
    add("--database", required=True, help="folder, or s3://, gs:// or az:// with a bucket")
    add("--parquet", type=Path, help="folder of files *.parquet to put into the database")
    add("--model", default=CLIP, help="the tower that embedded them: an id or a folder")
    add("-k", type=whole_number(1), default=10, help="images to find")
    add("--label", help="look at images of this class only")
    add("--cells", type=whole_number(1), help="make an index of so many cells first")
    add("--probes", type=whole_number(1), default=20, help="cells that a search looks at")
    return parser.parse_args(arguments)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Say of an error in which file it is."""
    try:
        yield
    except (KeyError, OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"'{file}' can't be put into the database: {error}") from error


def table_schema(file: Path) -> pa.Schema:
    """Columns of the database: those of a file, its vectors of one length."""
    with naming(file):
        there = parquet.read_schema(file)
        if "vector" not in there.names:
            raise ValueError(f"it has no column 'vector', but {', '.join(there.names)}")
        first = next(parquet.ParquetFile(file).iter_batches(1, columns=["vector"]), None)
        if first is None:
            raise ValueError("it has no rows")
    fields = [pa.field("vector", pa.list_(pa.float32(), len(first["vector"][0])))]
    fields += [there.field(name) for name in ("path", "label") if name in there.names]
    return pa.schema(fields, metadata={FINGERPRINT: fingerprint_of(there)})


def fingerprint_of(schema: pa.Schema) -> bytes:
    """By which tower the vectors of a file or table were made."""
    return (schema.metadata or {}).get(FINGERPRINT, UNKNOWN)


def fill(database: Any, folder: Path, tower: VisionTower) -> Any:
    """The table of images, with the rows of all files *.parquet of a folder in it."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"--parquet '{folder}' has no files *.parquet.")
    schema = table_schema(files[0])
    check_tower(schema, tower)
    counts = []
    for file in files:
        with naming(file):
            counts.append(parquet.read_metadata(file).num_rows)
            if fingerprint_of(parquet.read_schema(file)) != fingerprint_of(schema):
                raise ValueError(f"another tower than that of '{files[0]}' made it")
    table = database.create_table(TABLE, schema=schema, exist_ok=True)
    check_tower(table.schema, tower)
    # A file is added whole or not at all, in the order of their names.
    ends, there = [0, *accumulate(counts)], table.count_rows()
    if there not in ends:
        raise ValueError(
            f"The database has {there} images, which are not the first of the {ends[-1]} of "
            f"'{folder}': files were changed or removed since. Choose another --database."
        )
    for file in files[ends.index(there) :]:
        with naming(file):
            rows = parquet.read_table(file, columns=schema.names).cast(schema)
        table.add(rows)
    table.optimize()  # thousands of additions make thousands of small files
    return table


def check_tower(schema: pa.Schema, tower: VisionTower) -> None:
    """Raise a ValueError if another tower made the vectors."""
    if fingerprint_of(schema) not in (UNKNOWN, tower.fingerprint().encode()):
        raise ValueError("--model is another tower than that of the vectors, which don't compare.")


def add_cells(table: Any, cells: int) -> None:
    """Make an index of IVF and PQ, of a byte for about eight numbers."""
    size = table.schema.field("vector").type.list_size
    codes = next(count for count in range(max(1, size // 8), 0, -1) if size % count == 0)
    config = IvfPq(distance_type="cosine", num_partitions=cells, num_sub_vectors=codes)
    table.create_index("vector", config=config)


def search(
    table: Any, vector: np.ndarray, k: int, *, label: str | None = None, probes: int = 20
) -> list[dict[str, Any]]:
    """The k nearest rows, most similar first, each with its cosine as ``score``."""
    query = table.search(vector, vector_column_name="vector").distance_type("cosine").limit(k)
    query = query.nprobes(probes).refine_factor(10)  # these two only count with an index
    if label is not None:
        if "label" not in table.schema.names:
            raise ValueError("--label can't choose: the database has no column 'label'.")
        quoted = label.replace("'", "''")
        # Numbers are compared as text.
        query = query.where(f"cast(label as string) = '{quoted}'", prefilter=True)
    names = [name for name in table.schema.names if name != "vector"]
    rows = query.select([*names, "_distance"]).to_list()
    return [{"score": 1 - row.pop("_distance"), **row} for row in rows]


def run(args: argparse.Namespace) -> None:
    """Fill the database if that is wanted, search it, and print what was found."""
    tower, database = load_tower(args.model), lancedb.connect(args.database)
    if args.parquet is not None:
        table = fill(database, args.parquet, tower)
    elif TABLE in database.list_tables().tables:
        table = database.open_table(TABLE)
        check_tower(table.schema, tower)
    else:
        raise FileNotFoundError(f"--database '{args.database}' has no images: give --parquet too.")
    if args.cells:
        add_cells(table, args.cells)
    (vector,) = embed_images(tower, [args.query]).numpy()
    rows = search(table, vector, args.k, label=args.label, probes=args.probes)
    if args.label is not None and not rows:
        raise ValueError(f"--label '{args.label}' is that of no image in the database.")
    for row in rows:
        print(f"{row['score']:.3f}", row.get("path") or "", row.get("label", ""))


def main(arguments: list[str] | None = None) -> int:
    """Search; the exit code."""
    return obey(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
