"""pairclip."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from contenders.task import (
    CLASSES_PER_BATCH,
    CLIP,
    MARGIN,
    NEAREST,
    PAIRS,
    PER_CLASS,
    RATE,
    Factory,
    Method,
    Objective,
    Passes,
    Work,
    count_of,
)

if TYPE_CHECKING:
    from torch import Tensor


def loss(form: str) -> Callable[[Tensor, Tensor], Tensor]:
    from pairclip import AllPairsCosineLoss

    return AllPairsCosineLoss(negatives=form, margin=MARGIN if form == "hinge" else 0.0)


def target_loss() -> Callable[[Tensor, Tensor], Tensor]:
    from pairclip import target_similarity_loss

    return target_similarity_loss


def pair_sampler(class_balanced: bool = False) -> Factory:
    from pairclip import PairSampler

    def make(labels: Any) -> Passes:
        sampler = PairSampler(labels, PAIRS, class_balanced=class_balanced)
        return lambda: count_of(sampler)

    return make


def class_balanced_sampler() -> Factory:
    from pairclip import ClassBalancedSampler

    def make(labels: Any) -> Passes:
        sampler = ClassBalancedSampler(labels, CLASSES_PER_BATCH, PER_CLASS)
        return lambda: count_of(sampler)

    return make


def train(work: Work) -> None:
    from pairclip import Callback, Finetuner

    class Clock(Callback):
        def on_step(self, fit: Any) -> None:
            work.tick()

    finetuner = Finetuner(
        work.tower,
        work.loss,
        learning_rate=RATE,
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=CLIP,
        callbacks=[Clock()],
    )
    finetuner.fit((work.images, work.labels), sampler=work.batches)


def evaluate(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip.evaluation import evaluate_embeddings

    found = evaluate_embeddings(embeddings, labels).to_dict()
    return {name: found[name] for name in ("recall_at_1", "mean_average_precision")}


def metrics(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip import retrieval_figures

    return retrieval_figures(embeddings, labels, ("precision_at_1", "r_precision", "map_at_r"))


def metric(embeddings: Tensor, labels: Tensor, name: str) -> dict[str, float]:
    from pairclip.retrieval import map_at_r, precision_at_k, r_precision, recall_at_k

    functions = {
        "recall_at_1": recall_at_k,
        "precision_at_1": precision_at_k,
        "r_precision": r_precision,
        "map_at_r": map_at_r,
    }
    return {name: functions[name](embeddings, labels)}


def neighbors(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from pairclip.similarity import nearest_neighbors

    scores, _ = nearest_neighbors(embeddings, k=NEAREST)
    return {"mean_score": float(scores.mean())}


def objective(**options: Any) -> Method:
    """All pairs of a batch."""

    def make(classes: int, width: int) -> Objective:
        from pairclip import AllPairsCosineLoss

        return Objective(AllPairsCosineLoss(**{"positive_fraction": 0.2, **options}))

    return make


def preserving(similarities: float, embeddings: float, keep_share: float = 0.0) -> Method:
    """All pairs, squared, near what the untouched tower gives."""

    def make(classes: int, width: int) -> Objective:
        from pairclip import AllPairsCosineLoss, PreservingLoss

        loss = AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)
        kept = PreservingLoss(loss, weight=similarities, what="similarities")
        return Objective(PreservingLoss(kept, weight=embeddings), keep_share=keep_share)

    return make


def random_pairs(classes: int, width: int) -> Objective:
    """The plain formula on random pairs, of which one in ten match."""
    from pairclip import CosinePairLoss

    return Objective(CosinePairLoss(), matching=0.1)


OBJECTIVES: dict[str, Method] = {
    "preserving": preserving(0.35, 0.15),
    "preserving, a quarter to keep": preserving(0.35, 0.3, keep_share=0.25),
    "squared": objective(negatives="squared"),
    "squared, positive margin 0.8": objective(negatives="squared", positive_margin=0.8),
    "squared, positive margin 0.9": objective(negatives="squared", positive_margin=0.9),
    "hinge 0.2": objective(negatives="hinge", margin=0.2),
    "hinge 0.5": objective(negatives="hinge", margin=0.5),
    "hinge 0.7": objective(negatives="hinge", margin=0.7),
    "hinge 0.9": objective(negatives="hinge", margin=0.9),
    "linear": objective(negatives="linear"),
    "linear, random pairs": random_pairs,
}
