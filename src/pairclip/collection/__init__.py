"""What is in a collection of images, and what a person should look at before a training."""

from pairclip.collection.check import Check, Finding, Item
from pairclip.collection.checking import check_collection

__all__ = ["Check", "Finding", "Item", "check_collection"]
