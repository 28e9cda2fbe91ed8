"""Image towers of every library, or any module with a preprocess, behind one face."""

from pairclip.towers.interpolation import interpolate
from pairclip.towers.layer_rates import layer_decay
from pairclip.towers.loading import load_tower
from pairclip.towers.publishing import model_card, push_to_hub, whole_model
from pairclip.towers.untrained import random_tower
from pairclip.towers.vision_tower import VisionTower, tower_of

__all__ = [
    "VisionTower",
    "interpolate",
    "layer_decay",
    "load_tower",
    "model_card",
    "push_to_hub",
    "random_tower",
    "tower_of",
    "whole_model",
]
