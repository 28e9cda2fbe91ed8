"""sentence-transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from contenders.task import (
    BATCH,
    CLIP,
    NEAREST,
    RATE,
    Factory,
    Passes,
    Step,
    Work,
    backward_of,
    count_of,
)

if TYPE_CHECKING:
    from torch import Tensor


def online(embeddings: Tensor) -> Step:
    import torch
    from sentence_transformers.sentence_transformer.losses import OnlineContrastiveLoss

    left, right = (half.clone().requires_grad_() for half in embeddings.chunk(2))
    matching = torch.arange(len(left)) % 2
    # The model encodes sentences before the loss; here the embeddings are there already.
    loss = OnlineContrastiveLoss(model=None)
    return backward_of(
        lambda: loss.compute_loss_from_embeddings([left, right], matching), left, right
    )


class _LabelColumn:
    """As much of a `datasets.Dataset` as the sampler asks for."""

    column_names = ("label",)

    def __init__(self, labels: list[int]) -> None:
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, column: str) -> list[int]:
        return self._labels


def group_by_label() -> Factory:
    import torch
    from sentence_transformers.base.sampler import GroupByLabelBatchSampler

    def make(labels: Any) -> Passes:
        sampler = GroupByLabelBatchSampler(
            _LabelColumn(labels.tolist()),
            batch_size=BATCH,
            drop_last=False,
            valid_label_columns=["label"],
            generator=torch.Generator(),
        )
        return lambda: count_of(sampler)

    return make


def train(work: Work) -> None:
    import torch
    from datasets import Dataset
    from PIL import Image
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from transformers import TrainerCallback

    class Images(InputModule):
        """The tower as a first module; the image processor takes the whole batch."""

        modalities = ("image",)

        def __init__(self) -> None:
            super().__init__()
            self.tower = work.module

        def preprocess(self, inputs: Any, prompt: str | None = None, **options: Any) -> Any:
            pixels = work.tower.image_processor(images=inputs, return_tensors="pt")
            return {"pixel_values": pixels["pixel_values"]}

        def forward(self, features: Any, **options: Any) -> Any:
            return features | {"sentence_embedding": self.tower(features["pixel_values"])}

        def save(self, *arguments: Any, **options: Any) -> None: ...

    class Loss(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Any, labels: Any) -> Any:
            return work.loss(self.model(features[0])["sentence_embedding"], labels)

    class Batches(DefaultBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter(work.batches)

        def __len__(self) -> int:
            return len(work.batches)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            work.tick()

    def opened(rows: Any) -> Any:
        return rows | {"image": [Image.fromarray(work.images[i]) for i in rows["image"]]}

    indices = list(range(len(work.labels)))
    data = Dataset.from_dict({"image": indices, "label": work.labels}).with_transform(opened)
    model = SentenceTransformer(modules=[Images()], device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                folder,
                use_cpu=True,
                num_train_epochs=1,
                per_device_train_batch_size=len(work.batches[0]),
                batch_sampler=Batches,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=data,
            loss=Loss(model),
            callbacks=[Clock()],
        ).train()


def semantic(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    from sentence_transformers.util import semantic_search

    found = semantic_search(embeddings, embeddings, top_k=NEAREST + 1)
    scores = [hit["score"] for hits in found for hit in hits[1:]]
    return {"mean_score": sum(scores) / len(scores)}
