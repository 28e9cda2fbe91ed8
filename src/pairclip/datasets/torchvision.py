"""Datasets of torchvision and its likes, which tell their labels."""

from __future__ import annotations

from typing import Any

from pairclip.datasets.own import OwnSource, target_transform

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")


class TorchvisionSource(OwnSource):
    """A dataset that keeps its labels in an attribute."""

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        return _attribute(dataset) is not None

    @staticmethod
    def told_labels(dataset: Any) -> Any:
        """The labels as its items have them."""
        labels = _attribute(dataset)
        transform = target_transform(dataset)
        return labels if transform is None else [transform(label) for label in labels]


def _attribute(dataset: Any) -> Any:
    for name in _LABEL_ATTRIBUTES:
        labels = getattr(dataset, name, None)
        if labels is not None and not callable(labels):
            return labels
    return None
