"""Callbacks of a fit: early stopping, averaged weights, trackers, a monitor for collapse."""

from pairclip.callbacks.averaging import WeightAverage
from pairclip.callbacks.base import Callback, FitState
from pairclip.callbacks.collapse import CollapseMonitor
from pairclip.callbacks.stopping import EarlyStopping
from pairclip.callbacks.tracking import Tracker

__all__ = [
    "Callback",
    "CollapseMonitor",
    "EarlyStopping",
    "FitState",
    "Tracker",
    "WeightAverage",
]
