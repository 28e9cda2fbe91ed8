"""Any labelled image dataset as images and class ids; labels without decoding an image."""

from pairclip.datasets.checking import Problem
from pairclip.datasets.folders import image_files
from pairclip.datasets.labelled_images import (
    LabelledImages,
    check_images,
    class_names_of,
    labels_of,
)
from pairclip.datasets.labels import join_classes
from pairclip.datasets.rgb import as_rgb
from pairclip.datasets.streams import StreamBatches
from pairclip.datasets.tables import TableDataset

__all__ = [
    "LabelledImages",
    "Problem",
    "StreamBatches",
    "TableDataset",
    "as_rgb",
    "check_images",
    "class_names_of",
    "image_files",
    "join_classes",
    "labels_of",
]
