"""pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from contenders.task import (
    BATCH,
    BLOCK,
    CLIP,
    MARGIN,
    PER_CLASS,
    Factory,
    Method,
    Objective,
    Passes,
    Work,
    adamw,
    dataset_of,
)

if TYPE_CHECKING:
    from torch import Tensor


def loss(form: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss

    return ContrastiveLoss(
        pos_margin=1,
        neg_margin=MARGIN if form == "hinge" else -1,
        distance=CosineSimilarity(),
        **options,
    )


def loss_of_sums(form: str) -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning.reducers import SumReducer

    return loss(form, reducer=SumReducer())


def m_per_class() -> Factory:
    from pytorch_metric_learning.samplers import MPerClassSampler

    def make(labels: Any) -> Passes:
        # A pass as long as the data set; it yields single indices, no batches.
        sampler = MPerClassSampler(labels, PER_CLASS, BATCH, length_before_new_iter=len(labels))
        return lambda: len(list(sampler))

    return make


def train(work: Work) -> None:
    import torch
    from pytorch_metric_learning.trainers import MetricLossOnly
    from torch.utils.data import BatchSampler

    class Batches(BatchSampler):
        def __init__(self) -> None: ...

        def __iter__(self) -> Iterator[list[int]]:
            return iter(work.batches)

        def __len__(self) -> int:
            return len(work.batches)

    class Loss(torch.nn.Module):
        def forward(self, embeddings: Any, labels: Any, pairs: Any) -> Any:
            return work.loss(embeddings, labels)

    trainer = MetricLossOnly(
        models={"trunk": work.module},
        optimizers={"trunk_optimizer": adamw(work.module)},
        batch_size=len(work.batches[0]),
        loss_funcs={"metric_loss": Loss()},
        dataset=dataset_of(work),
        sampler=Batches(),
        gradient_clippers={
            "trunk_grad_clipper": lambda: torch.nn.utils.clip_grad_norm_(
                work.module.parameters(), CLIP
            )
        },
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: work.tick(),
    )
    trainer.train(num_epochs=1)


# pairclip's names of its metrics.
METRICS = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
}


def metrics(
    embeddings: Tensor, labels: Tensor, names: Sequence[str] = tuple(METRICS)
) -> dict[str, float]:
    from pytorch_metric_learning.distances import CosineSimilarity

    try:
        from pytorch_metric_learning.evaluation import AccuracyCalculator, CustomKNN
    except ImportError:  # before version 3
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN

    theirs = [METRICS[name] for name in names]
    search = CustomKNN(CosineSimilarity(), batch_size=BLOCK)
    found = AccuracyCalculator(include=theirs, knn_func=search).get_accuracy(embeddings, labels)
    return dict(zip(names, map(found.get, theirs), strict=True))


def objective(name: str, **options: Any) -> Method:
    """A loss of its name, with the options of its paper or of its documentation."""

    def make(classes: int, width: int) -> Objective:
        from pytorch_metric_learning import losses

        if name in ("ArcFaceLoss", "NormalizedSoftmaxLoss", "ProxyAnchorLoss"):
            options.update(num_classes=classes, embedding_size=width)
        return Objective(getattr(losses, name)(**options))

    return make


def mined_triplets(classes: int, width: int) -> Objective:
    """Triplets whose negative is further than the positive, but within the margin."""
    import torch
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    class Mined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = TripletMarginLoss(margin=0.2)
            self.miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")

        def forward(self, embeddings: Tensor, labels: Tensor) -> Any:
            return self.loss(embeddings, labels, self.miner(embeddings, labels))

    return Objective(Mined())


OBJECTIVES: dict[str, Method] = {
    "PML NTXent": objective("NTXentLoss", temperature=0.1),
    "PML SupCon": objective("SupConLoss", temperature=0.1),
    "PML MultiSimilarity": objective("MultiSimilarityLoss"),
    "PML ProxyAnchor": objective("ProxyAnchorLoss"),
    "PML NormalizedSoftmax": objective("NormalizedSoftmaxLoss"),
    "PML ArcFace": objective("ArcFaceLoss"),
    "PML Triplet, semihard": mined_triplets,
}
