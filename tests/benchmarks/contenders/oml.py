"""open-metric-learning."""

from __future__ import annotations

from typing import Any

from contenders.task import CLASSES_PER_BATCH, PER_CLASS, Factory, Passes, count_of


def balance() -> Factory:
    from oml.samplers import BalanceSampler

    def make(labels: Any) -> Passes:
        sampler = BalanceSampler(labels.tolist(), CLASSES_PER_BATCH, PER_CLASS)
        return lambda: count_of(sampler)

    return make
