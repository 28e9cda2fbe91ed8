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
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfPq
from pyarrow import parquet

from pairclip import embed_images, load_tower
from pairclip.command.arguments import CLIP, HelpFormatter, whole_number
from pairclip.command.running import obey

TABLE = "images"
FINGERPRINT = b"pairclip.fingerprint"


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


def fill(database: Any, folder: Path) -> Any:
    """The table of images, with the rows of all files *.parquet of a folder in it."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"--parquet '{folder}' has no files *.parquet.")
    schema = table_schema(files[0])
    table = database.create_table(TABLE, schema=schema, exist_ok=True)
    if table.schema.metadata != schema.metadata:
        raise ValueError(f"The database has embeddings of another tower than '{folder}'.")
    there, before = table.count_rows(), 0
    for file in files:
        # A file is added whole or not at all, in the order of their names.
        if before >= there:
            if parquet.read_schema(file).metadata[FINGERPRINT] != schema.metadata[FINGERPRINT]:
                raise ValueError(f"'{file}' was made by another tower than '{files[0]}'.")
            rows = parquet.read_table(file, columns=schema.names)
            table.add(rows.cast(schema))
        before += parquet.read_metadata(file).num_rows
    if table.count_rows() != before:
        raise ValueError(
            f"The database has {table.count_rows()} images, and not the {before} of '{folder}': "
            "files were changed or removed since. Choose another --database."
        )
    table.optimize()  # thousands of additions make thousands of small files
    return table


def table_schema(file: Path) -> pa.Schema:
    """Columns of the database: those of a file, its vectors of one length."""
    there = parquet.read_schema(file)
    first = next(parquet.ParquetFile(file).iter_batches(1, columns=["vector"]))
    vector = pa.list_(pa.float32(), len(first["vector"][0]))
    fields = [pa.field("vector", vector)]
    fields += [there.field(name) for name in ("path", "label") if name in there.names]
    fingerprint = (there.metadata or {}).get(FINGERPRINT, b"unknown")
    return pa.schema(fields, metadata={FINGERPRINT: fingerprint})


def search(
    table: Any, vector: np.ndarray, k: int, *, label: str | None = None, probes: int = 20
) -> list[dict[str, Any]]:
    """The k nearest rows, most similar first, each with its cosine as ``score``."""
    query = table.search(vector, vector_column_name="vector").distance_type("cosine").limit(k)
    query = query.nprobes(probes).refine_factor(10)  # these two only count with an index
    if label is not None:
        quoted = label.replace("'", "''")
        query = query.where(f"label = '{quoted}'", prefilter=True)
    names = [name for name in table.schema.names if name != "vector"]
    rows = query.select([*names, "_distance"]).to_list()
    return [{"score": 1 - row.pop("_distance"), **row} for row in rows]


def run(args: argparse.Namespace) -> None:
    """Fill the database if that is wanted, search it, and print what was found."""
    database = lancedb.connect(args.database)
    table = database.open_table(TABLE) if args.parquet is None else fill(database, args.parquet)
    if args.cells:
        size = table.schema.field("vector").type.list_size
        config = IvfPq(
            distance_type="cosine", num_partitions=args.cells, num_sub_vectors=max(1, size // 8)
        )
        table.create_index("vector", config=config)
    tower = load_tower(args.model)
    fingerprint = table.schema.metadata[FINGERPRINT].decode()
    if fingerprint not in ("unknown", tower.fingerprint()):
        raise ValueError(f"--model '{args.model}' is another tower than that of the database.")
    (vector,) = embed_images(tower, [args.query]).numpy()
    for row in search(table, vector, args.k, label=args.label, probes=args.probes):
        print(f"{row['score']:.3f}", row.get("path"), row.get("label") or "")


def main(arguments: list[str] | None = None) -> int:
    """Search; the exit code."""
    return obey(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
