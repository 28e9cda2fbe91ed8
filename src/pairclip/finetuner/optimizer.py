"""What is optimised, by what, and at which rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from pairclip.finetuner.settings import Settings


def trainable_parameters(modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The trainable parameters of the tower and of the loss, each once.

    Raises:
        ValueError: If one is in half precision.
    """
    trainable: dict[nn.Parameter, None] = {}  # a loss may hold the tower
    for owner, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"`{owner}` has the trainable parameter {name} in {parameter.dtype}, which "
                    f"is too coarse for small steps. Call `{owner}.float()`; `precision` then "
                    "decides what is computed in half precision."
                )
            trainable[parameter] = None
    return list(trainable)


def new_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the settings, or AdamW that lets no bias and no norm decay."""
    if settings.optimizer is not None:
        return settings.optimizer(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def rate_factor(step: int, num_steps: int, settings: Settings) -> float:
    """Learning rate of a step (from 0) as a share of the peak."""
    warmup = round(settings.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (num_steps - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if settings.schedule == "linear" else 1.0
