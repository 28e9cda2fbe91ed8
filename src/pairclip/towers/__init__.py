"""Image towers: any CLIP or SigLIP model, or any module with a preprocess, behind one face."""

from pairclip.towers.base import VisionTower
from pairclip.towers.loading import load_tower

__all__ = ["VisionTower", "load_tower"]
