"""All figures of a set of embeddings in one pass, or one figure alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip._blocks import Block, Search, over_blocks, prepare
from pairclip._pairs import PairCounts, PairSeparation, separate
from pairclip._ranking import (
    Ranks,
    average_precision,
    hit,
    map_at_r,
    precision,
    r_precision,
    rank,
    vote,
)
from pairclip._vectors import highest


class Figures(NamedTuple):
    """Figures of each query that has an item of its own class to find, and of all pairs."""

    separation: PairSeparation | None
    # Edges of 200 bins over [-1, 1], and int64 the pairs of one class and of two in each.
    histogram: tuple[Tensor, Tensor, Tensor] | None
    queries: Tensor  # [Q] int64: row of each query, ascending
    recall: Tensor  # [Q, len(ks)] float64, as all figures
    precision: Tensor  # [Q, len(ks)]
    r_precision: Tensor  # [Q]
    map_at_r: Tensor  # [Q]
    average_precision: Tensor  # [Q]
    knn_correct: Tensor  # [Q] chance that the nearest vote for the query's class
    neighbors: Tensor  # [Q, k] int64: nearest items, first among equals the lower row
    neighbor_scores: Tensor  # [Q, k] float32, descending


def all_figures(
    embeddings: Any,
    labels: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    ks: Sequence[int] = (1, 5, 10),
    knn: int = 5,
    neighbors: int = 10,
    separation: bool = True,
) -> Figures:
    """Every figure of `retrieval` in one pass over the similarities.

    Fewer items than `knn` or `neighbors` are all taken.
    """
    search = prepare(embeddings, labels, queries, query_labels)
    rows, left_out = _findable(search)
    counts = PairCounts(search) if separation else None
    if counts is not None:
        counts.add_all(left_out)
    knn, neighbors = (min(k, len(search.items) - int(search.own)) for k in (knn, neighbors))

    relevant = search.relevant()

    def figures(block: Block) -> tuple[Tensor, ...]:
        if counts is not None:
            counts.add(block)
        scores, columns = highest(block.scores, max(neighbors, knn + 1))
        correct = vote(search, block, (scores, columns), knn)
        ranks = rank(block, relevant[block.rows])  # last: it overwrites the scores
        return (
            block.rows,
            torch.stack([hit(ranks, k) for k in ks], dim=1),
            torch.stack([precision(ranks, k) for k in ks], dim=1),
            r_precision(ranks),
            map_at_r(ranks),
            average_precision(ranks),
            correct,
            columns[:, :neighbors],
            scores[:, :neighbors].float().clamp(-1, 1),
        )

    per_query: list[Tensor] = []
    for of_rows, *of_block in over_blocks(search, rows, figures):
        # Small tensors kept from each block would leave holes too small for those of the next.
        if not per_query:
            per_query = [x.new_empty(len(search.queries), *x.shape[1:]) for x in of_block]
        for whole, part in zip(per_query, of_block, strict=True):
            whole[of_rows] = part
    rows = rows.sort().values
    return Figures(
        None if counts is None else separate(search, counts),
        None if counts is None else counts.coarse(),
        rows,
        *(whole[rows] for whole in per_query),
    )


def _findable(search: Search) -> tuple[Tensor, Tensor]:
    """Queries with an item of their class to find, and the others, which are counted aloud.

    Sorted by the number of those items, so that the queries of a block have about as many.
    """
    relevant, rows = search.relevant().sort(stable=True)
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


def means(
    figures: Sequence[Callable[[Ranks], Tensor]],
    embeddings: Any,
    labels: Any,
    queries: Any,
    query_labels: Any,
    *,
    first: int | None = 0,
) -> list[float]:
    """Mean of each figure over all queries that count, in one pass.

    The figures look at the `first` places, or as many as a query has relevant items if these are
    more; at all places if it is None.
    """
    search = prepare(embeddings, labels, queries, query_labels)
    rows, _ = _findable(search)
    relevant = search.relevant()

    def of_block(block: Block) -> Tensor:
        total = relevant[block.rows]
        ranks = rank(block, total, None if first is None else max(first, int(total.max())))
        return torch.stack([figure(ranks) for figure in figures], dim=1)

    found: list[float] = torch.cat([*over_blocks(search, rows, of_block)]).mean(dim=0).tolist()
    return found
