"""Image towers: any CLIP or SigLIP model, or any module with a preprocess, behind one face."""

from pairclip.towers.base import VisionTower, tower_of
from pairclip.towers.loading import load_tower
from pairclip.towers.training import interpolate, layer_decay
from pairclip.towers.untrained import random_tower

__all__ = ["VisionTower", "interpolate", "layer_decay", "load_tower", "random_tower", "tower_of"]
