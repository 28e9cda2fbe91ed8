"""What one fit carries from step to step, and what a step does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pairclip._exact_step import BatchResult, Loss, backward
from pairclip.losses import CosinePairLoss
from pairclip.samplers import PairSampler

if TYPE_CHECKING:
    from pairclip.finetuner import Finetuner

_T = TypeVar("_T", bound=Tensor)
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Run:
    """A tower, a loss and an optimizer on their way through the steps of a fit."""

    def __init__(self, settings: Finetuner, accelerator: Accelerator, num_steps: int) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.num_steps = num_steps
        self.skipped_steps = 0
        self.tower = settings.tower.to(accelerator.device)
        self.loss = _on_batches(settings.loss)
        self.modules: list[nn.Module] = [self.tower]
        if isinstance(settings.loss, nn.Module):
            self.modules.append(settings.loss.to(accelerator.device))
        trainable = self._trainable()
        self._check_batch_norms()
        self.model = self._on_every_process()
        self.optimizer = self._new_optimizer(trainable)
        groups = self.optimizer.param_groups
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.peak_rates = [group["lr"] for group in groups]
        self.buffers = _distinct([b for module in self.modules for b in module.buffers()])

    def _trainable(self) -> list[nn.Parameter]:
        if not any(parameter.requires_grad for parameter in self.tower.parameters()):
            raise ValueError("`tower` has no trainable parameter: all have requires_grad=False.")
        trainable = []
        for owner, module in zip(("tower", "loss"), self.modules, strict=False):
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"`{owner}` has the trainable parameter {name} in {parameter.dtype}, which "
                        f"is too coarse for small steps. Call `{owner}.float()`; `precision` then "
                        "decides what is computed in half precision."
                    )
                trainable.append(parameter)
        return _distinct(trainable)

    def _check_batch_norms(self) -> None:
        processes, pieces = self.accelerator.num_processes, self.settings.micro_batch_size
        if processes == 1 and pieces is None:
            return
        for name, part in self.tower.named_modules():
            if isinstance(part, _BatchNorm) and not _frozen(part):
                by = f"{processes} processes" if pieces is None else f"`micro_batch_size` {pieces}"
                fix = "Freeze its parameters, which fixes its statistics too, or train"
                if not list(part.parameters()):
                    fix = "It has no parameters to freeze, so train"
                raise ValueError(
                    f"`tower` has the batch norm `{name}`, whose statistics are those of the whole "
                    f"batch, and {by} would divide it. {fix} in one process with whole batches."
                )

    def _on_every_process(self) -> nn.Module:
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return self.tower
        for module in self.modules[1:]:
            # DDP does this for the tower.
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.data.copy_(broadcast(tensor.data))
        handler = accelerator.ddp_handler
        options = {} if handler is None else handler.to_kwargs()
        if accelerator.device.type != "cpu":
            options["device_ids"] = [accelerator.device]
        model = DistributedDataParallel(self.tower, **options)
        if handler is not None:
            handler.register_comm_hook(model)
        return model

    def _new_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer is not None:
            return settings.optimizer(parameters)
        matrices = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)

    def step(
        self, pixels: Tensor, labels: Tensor, step: int
    ) -> tuple[BatchResult, dict[str, float | None]]:
        """Train on this process's slice of batch number `step`, from 1.

        Returns the whole batch as the loss saw it, and what to record of the step.
        """
        accelerator, settings = self.accelerator, self.settings
        factor = _rate_factor(step - 1, self.num_steps, settings.warmup_ratio, settings.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad()
        for module in self.modules:
            module.zero_grad()
        buffers = [buffer.clone() for buffer in self.buffers]
        batch = backward(
            self.model,
            self.loss,
            pixels,
            labels,
            parameters=self.parameters,
            accelerator=accelerator,
            micro_batch_size=settings.micro_batch_size,
            seed=(settings.seed, step),
        )
        scaler: Any = accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # One look at the device for all that the host wants to know of this step.
        watched = torch.stack(
            [
                batch.loss.double().reshape(()),
                batch.embeddings.sum(dtype=torch.float64),
                norm.double(),
            ]
        )
        value, total, gradient_norm = watched.tolist()
        trouble = self._not_finite(value, total, gradient_norm)
        if trouble is not None:
            for buffer, old in zip(self.buffers, buffers, strict=True):
                buffer.copy_(old)
            raise FloatingPointError(
                f"Stopped at step {step} of {self.num_steps}: {trouble}. The tower has the weights "
                "that it had before this step. Lower `learning_rate`, or check the loss and the "
                "images."
            )
        if settings.max_grad_norm is not None and not gradient_norm <= settings.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, settings.max_grad_norm, norm)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scale = scaler.get_scale()
            scaler.update()
            self.skipped_steps += scaler.get_scale() < scale
        self.optimizer.zero_grad()  # not at the next step: an evaluation before it needs the memory
        return batch, {
            "loss": value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next steps but the tower's weights."""
        scaler = self.accelerator.scaler
        loss: Any = self.settings.loss
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "loss": dict(loss.state_dict()) if hasattr(loss, "state_dict") else None,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["loss"] is not None:
            loss: Any = self.settings.loss
            loss.load_state_dict(state["loss"])
        self.skipped_steps = state["skipped_steps"]

    def check_weights(self, step: int) -> None:
        """Raise if `step` left a weight which isn't finite, before it is used or saved."""
        sums = torch.stack([p.detach().sum(dtype=torch.float64) for p in self.parameters])
        if not bool(sums.isfinite().all()):
            raise FloatingPointError(
                f"Stopped at step {step} of {self.num_steps}: a weight is not finite after it, so "
                "this tower is lost. Load it again, or a checkpoint, and lower `learning_rate`."
            )

    def _not_finite(self, loss: float, total: float, gradient_norm: float) -> str | None:
        if not math.isfinite(total):
            return "an embedding is not finite"
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        # In float16 the scaler skips a step whose gradient overflows.
        if math.isfinite(gradient_norm) or self.accelerator.mixed_precision == "fp16":
            return None
        return f"the gradient's norm is {gradient_norm}"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode within; afterwards the old modes, no gradients, the old random state."""
        was_training = {part: part.training for module in self.modules for part in module.modules()}
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self.set_training()
                yield
            finally:
                for part, was in was_training.items():
                    part.training = was
                for module in self.modules:
                    module.zero_grad()

    def set_training(self) -> None:
        """Training mode, but for batch norms that are frozen, whose statistics stay as they are."""
        for module in self.modules:
            module.train()
            for part in module.modules():
                if isinstance(part, _BatchNorm) and _frozen(part):
                    part.eval()


def _frozen(norm: _BatchNorm) -> bool:
    parameters = list(norm.parameters())
    trainable = not parameters or any(p.requires_grad for p in parameters)
    return not trainable and norm.running_mean is not None


def _distinct(tensors: list[_T]) -> list[_T]:
    """Each once, though a loss may hold the tower."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _on_batches(loss: Loss | CosinePairLoss) -> Loss:
    """The loss as a function of a batch's embeddings and labels."""
    if not isinstance(loss, CosinePairLoss):
        return loss
    pair_loss = loss

    def on_pairs(embeddings: Tensor, labels: Tensor) -> Tensor:
        (a, b), (of_a, of_b) = PairSampler.split(embeddings), PairSampler.split(labels)
        value: Tensor = pair_loss(a, b, of_a == of_b)
        return value

    return on_pairs


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
    """Leave Accelerators elsewhere their precision and accumulation, which all of them share."""
    shared = [AcceleratorState._shared_state, GradientState._shared_state]
    kept = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, old in zip(shared, kept, strict=True):
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


def _rate_factor(step: int, num_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of a step (from 0) as a share of the peak."""
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (num_steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
