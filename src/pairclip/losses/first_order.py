"""Functions whose gradient is computed with their value, and which have no second one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pairclip import _vectors

# Value and gradient of rows [B, D]; the gradient only where it is wanted.
Computation = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


def with_gradient(rows: Tensor, compute: Computation, second_order: str) -> Tensor:
    """``compute(rows, wanted)[0]``, differentiable once; then `second_order` is the error."""
    value: Tensor = _WithGradient.apply(rows, compute, second_order)
    return value


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, compute: Computation, second_order: str) -> Tensor:
        value, gradient = compute(rows, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient, rows)
            ctx.second_order = second_order
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient, rows = ctx.saved_tensors
        # The usual factor of 1 is not worth a copy where looking at it costs no waiting.
        if not (_vectors.at_hand(rows) and grad_outputs[0] == 1):
            gradient = gradient * grad_outputs[0]
        return _FirstOrder.apply(gradient, rows, ctx.second_order), None, None


class _FirstOrder(torch.autograd.Function):
    """Identity that can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, rows: Tensor, second_order: str) -> Tensor:
        ctx.second_order = second_order
        return gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise RuntimeError(ctx.second_order)
