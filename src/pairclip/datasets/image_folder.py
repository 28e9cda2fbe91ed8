"""torchvision's `ImageFolder`, and what else is a `DatasetFolder`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

from pairclip.datasets.folders import check_no_splits, is_of_system
from pairclip.datasets.labels import MISSING
from pairclip.datasets.rgb import as_rgb
from pairclip.datasets.source import LabelsDiffer
from pairclip.datasets.torchvision import TorchvisionSource


class ImageFolderSource(TorchvisionSource):
    """Its files are read here, not by its loader, which drops transparency."""

    def __init__(self, dataset: DatasetFolder) -> None:
        super().__init__(dataset)
        self._plain = type(dataset).__getitem__ is DatasetFolder.__getitem__
        self._reads = (
            self._plain
            and dataset.loader in (default_loader, pil_loader)
            and torchvision.get_image_backend() == "PIL"
        )
        self.makes_images = self._reads
        if self._plain:
            for index, ((_, label), target) in enumerate(
                zip(dataset.samples, dataset.targets, strict=True)
            ):
                if label != target:
                    raise LabelsDiffer(
                        f"`targets` of {type(dataset).__name__} tells the label {target} of image "
                        f"{index}, but `samples`, which its items are of, has {label}. Change both."
                    )
        check_no_splits(Path(dataset.root), dataset.classes)
        self._leave_out_system(dataset)

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        return isinstance(dataset, DatasetFolder)

    def image(self, index: int) -> Any:
        """The file as a person sees it, through the dataset's transform."""
        if not self._reads:
            return super().image(index)
        path, _ = self.dataset.samples[index]
        transform = self.dataset.transform
        return path if transform is None else transform(as_rgb(path))

    def check_label(self, index: int) -> None:
        """Read the item, unless all are known to agree."""
        if not self._plain:
            super().check_label(index)

    def _leave_out_system(self, dataset: DatasetFolder) -> None:
        """Mark what lies in hidden and system folders, and number the classes without them."""
        start = len(str(dataset.root))
        system = torch.tensor(
            [is_of_system(path[start:]) for path, _ in dataset.samples], device="cpu"
        )
        if not system.any():
            return
        self.system = system
        self.labels[system] = MISSING
        if self.class_names is not None:
            classes = [id_ for id_, name in enumerate(self.class_names) if not is_of_system(name)]
            new = torch.full((len(self.class_names) + 1,), MISSING, device="cpu")
            new[classes] = torch.arange(len(classes), device="cpu")
            self.labels = new[self.labels]
            self.class_names = [self.class_names[id_] for id_ in classes]
