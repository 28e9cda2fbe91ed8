"""The Accelerator of a fit, and a tower on all of its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast, parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def new_accelerator(precision: str) -> Accelerator:
    """An Accelerator in the wanted precision, for the processes that this one was launched with."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    device: torch.device = PartialState(cpu=on_cpu).device
    if precision == "auto":
        launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        on_gpu = device.type == "cuda"
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        # `accelerate launch` says "no" where nothing was asked for.
        precision = launched_with if launched_with != "no" else "bf16" if bf16 else "no"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("`precision` 'fp16' needs a GPU, got the CPU. Use 'auto' or 'no'.")
    # Accelerate keeps the precision of a process's first Accelerator and refuses another one.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision)


@contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Leave Accelerators elsewhere their precision and accumulation, which all of them share.

    Accelerate has no public way to do so, and a new Accelerator changes those of the others.
    """
    shared = [AcceleratorState._shared_state, GradientState._shared_state]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


def check_accelerator(accelerator: Accelerator) -> None:
    """Raise if it is none, or does what the exact step can't allow."""
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"`accelerator` must be an accelerate.Accelerator, got {accelerator!r}.")
    if accelerator.device.type == "mps":
        raise ValueError(
            "`accelerator` is on the device 'mps', which has no float64, and the exact step needs "
            "it. Train on the CPU: set ACCELERATE_USE_CPU=true before the program starts, or pass "
            "`accelerator=Accelerator(cpu=True)`."
        )
    accumulated = accelerator.gradient_accumulation_steps
    if accumulated != 1:
        raise ValueError(
            f"`accelerator` accumulates gradients over {accumulated} steps, which is not the loss "
            "of one large batch. Give a larger batch and `micro_batch_size` instead."
        )
    kind = accelerator.distributed_type
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if kind in sharded:
        raise ValueError(
            f"`accelerator` divides the model by {kind.value}, and Finetuner trains a whole tower "
            "on each process (DDP). Launch it without, and use `micro_batch_size` to save memory."
        )


def on_every_process(
    tower: nn.Module, others: Sequence[nn.Module], accelerator: Accelerator
) -> nn.Module:
    """The tower to call in training: with the weights of the first process, as the others have."""
    if accelerator.num_processes == 1:
        return tower
    for module in others:
        # DDP does this for the tower.
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data.copy_(broadcast(tensor.data))
    handler = accelerator.ddp_handler
    options = {} if handler is None else handler.to_kwargs()
    if accelerator.device.type != "cpu":
        options["device_ids"] = [accelerator.device]
    model = DistributedDataParallel(tower, **options)
    if handler is not None:
        handler.register_comm_hook(model)
    return model
