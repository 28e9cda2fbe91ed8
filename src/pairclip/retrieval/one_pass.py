"""Metrics computed together, in one pass over the similarities."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip._vectors import highest
from pairclip.retrieval.blocks import Block, Search, over_blocks, prepare
from pairclip.retrieval.pair_counts import PairCounts
from pairclip.retrieval.pair_metrics import PairSeparation, separate
from pairclip.retrieval.ranks import rank_in_place
from pairclip.retrieval.table import Metric


class Outcome(NamedTuple):
    """Metrics and neighbours of each query that has an item of its own class to find."""

    queries: Tensor  # [Q] int64: row of each query, ascending
    per_query: dict[str, Tensor]  # [Q] float64 under the name of each metric
    neighbors: Tensor  # [Q, k] int64: nearest items, first among equals the lower row
    neighbor_scores: Tensor  # [Q, k] float32, descending
    separation: PairSeparation | None
    # Edges of 200 bins over [-1, 1], and int64 the pairs of one class and of two in each.
    histogram: tuple[Tensor, Tensor, Tensor] | None


def outcome_of(
    metrics: Sequence[Metric],
    embeddings: Any,
    labels: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    groups: Tensor | None = None,
    query_groups: Tensor | None = None,
    neighbors: int = 10,
    pairs: bool = True,
) -> Outcome:
    """Metrics of each query, its neighbours and, unless not wanted, the separation of all pairs.

    An item of a query's class and group is neither a find nor a miss. Fewer items than
    `neighbors`, or than a vote asks for, are all taken.
    """
    search = prepare(
        embeddings, labels, queries, query_labels, groups=groups, query_groups=query_groups
    )
    rows, left_out = _findable(search)
    counts = PairCounts(search) if pairs else None
    if counts is not None:
        counts.add_all(left_out)
    neighbors = min(neighbors, len(search.items) - int(search.left_out().max()))
    of_nearest = [metric for metric in metrics if metric.of == "nearest"]
    of_ranks = [metric for metric in metrics if metric.of == "ranks"]
    # A vote looks at one item more, for ties at its last place.
    nearest = max([neighbors, *(1 + (metric.places or 0) for metric in of_nearest)])
    relevant = search.relevant()

    def of_block(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if counts is not None:
            counts.add(block)
        scores, columns = highest(block.scores, nearest)
        values = [metric.function(search, block, (scores, columns)) for metric in of_nearest]
        ranks = rank_in_place(block, relevant[block.rows])  # last: the scores are gone
        values += [metric.function(ranks) for metric in of_ranks]
        return (
            block.rows,
            torch.stack(values, dim=1),
            columns[:, :neighbors],
            scores[:, :neighbors].float().clamp(-1, 1),
        )

    whole: list[Tensor] = []
    for of_rows, *parts in over_blocks(search, rows, of_block):
        # Small tensors kept from each block would leave holes too small for those of the next.
        if not whole:
            whole = [x.new_empty(len(search.queries), *x.shape[1:]) for x in parts]
        for all_rows, part in zip(whole, parts, strict=True):
            all_rows[of_rows] = part
    rows = rows.sort().values
    values, columns, scores = (each[rows] for each in whole)
    names = [metric.name for metric in (*of_nearest, *of_ranks)]
    of_name = dict(zip(names, values.T.contiguous(), strict=True))
    return Outcome(
        queries=rows,
        per_query={
            metric.name: of_name[metric.name] for metric in metrics if metric.name in of_name
        },
        neighbors=columns,
        neighbor_scores=scores,
        separation=None if counts is None else separate(search, counts),
        histogram=None if counts is None else counts.coarse(),
    )


def means(
    metrics: Sequence[Metric], embeddings: Any, labels: Any, queries: Any, query_labels: Any
) -> list[float]:
    """Mean of each metric of ranks over all queries that count, looking no further than needed."""
    search = prepare(embeddings, labels, queries, query_labels)
    rows, _ = _findable(search)
    relevant = search.relevant()
    places = [metric.places for metric in metrics]
    at_least = max((each for each in places if each), default=1)
    alone = metrics[0].alone if len(metrics) == 1 else None

    def of_block(block: Block) -> Tensor:
        total = relevant[block.rows]
        if alone is not None:
            return alone(block, total)[:, None]
        first = max(at_least, int(total.max()) if 0 in places else 0)
        ranks = rank_in_place(block, total, None if None in places else first)
        return torch.stack([metric.function(ranks) for metric in metrics], dim=1)

    of_all: list[float] = torch.cat([*over_blocks(search, rows, of_block)]).mean(dim=0).tolist()
    return of_all


def _findable(search: Search) -> tuple[Tensor, Tensor]:
    """Queries with an item of their class to find, and the others, of which a warning tells.

    Sorted by the number of those items, so that the queries of a block have about as many, and by
    class, so that many have the same.
    """
    if not len(search.queries):
        name = "embeddings" if search.own else "queries"
        raise ValueError(f"`{name}` must have at least one row, got none.")
    rows = search.query_classes.argsort(stable=True)
    relevant, order = search.relevant()[rows].sort(stable=True)
    rows = rows[order]
    left_out = int((relevant < 1).sum())
    if left_out == len(rows):
        raise ValueError(
            f"None of the {left_out} queries has another item of its class to find. Check that "
            "the labels are class ids, and give each class at least two items."
        )
    if left_out:
        warnings.warn(
            f"{left_out} of {len(rows)} queries were left out: no other item is of their class.",
            stacklevel=4,
        )
    return rows[left_out:], rows[:left_out]
