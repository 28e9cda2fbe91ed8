"""What one fit carries from step to step, and what a step does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from pairclip.losses import CosinePairLoss
from pairclip.samplers import PairSampler

if TYPE_CHECKING:
    from pairclip.finetuner import Finetuner

Loss = Callable[[Tensor, Tensor], Tensor]
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
        self.optimizer = accelerator.prepare(self._new_optimizer(self._trainable()))
        groups = self.optimizer.param_groups
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.peak_rates = [group["lr"] for group in groups]
        buffers = [b for module in self.modules for b in module.buffers() if b.is_floating_point()]
        self.state = [*self.parameters, *buffers]
        # What gave the last finite loss, for when the next one isn't.
        self.good = [tensor.detach().clone() for tensor in self.state]

    def _trainable(self) -> list[nn.Parameter]:
        if not any(parameter.requires_grad for parameter in self.tower.parameters()):
            raise ValueError("`tower` has no trainable parameter: all have requires_grad=False.")
        named = [item for module in self.modules for item in module.named_parameters()]
        for name, parameter in named:
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"`tower` has the trainable parameter {name} in {parameter.dtype}, which is "
                    "too coarse for small steps. Call `tower.float()`; `precision` then decides "
                    "what is computed in half precision."
                )
        return [parameter for _, parameter in named if parameter.requires_grad]

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

    def step(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, float | None]:
        """Train on one batch, step number `step` from 1; returns what to record of it."""
        accelerator = self.accelerator
        factor = _rate_factor(
            step - 1, self.num_steps, self.settings.warmup_ratio, self.settings.schedule
        )
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        with accelerator.autocast():
            embeddings = self.tower(pixels.to(accelerator.device, non_blocking=True))
        embeddings = embeddings.float()
        with torch.autocast(accelerator.device.type, enabled=False):
            loss = self.loss(embeddings, labels.to(accelerator.device, non_blocking=True))
        _check_loss(loss)
        for module in self.modules:
            module.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        # One look at the device for all that the host wants to know of this step.
        watched = torch.stack(
            [
                loss.detach().double().reshape(()),
                embeddings.detach().sum(dtype=torch.float64),
                norm.double(),
            ]
        )
        value, total, gradient_norm = watched.tolist()
        self._check_finite(step, value, total, gradient_norm)
        for good, tensor in zip(self.good, self.state, strict=True):
            good.copy_(tensor.detach())
        self.optimizer.step()
        self.skipped_steps += bool(accelerator.optimizer_step_was_skipped)
        return {
            "loss": value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
        }

    def check_weights(self, step: int) -> None:
        """Take back a step that left a weight which isn't finite."""
        sums = torch.stack([p.detach().sum(dtype=torch.float64) for p in self.parameters])
        if not bool(sums.isfinite().all()):
            self._stop(step, "a weight is not finite after it")

    def _check_finite(self, step: int, loss: float, total: float, gradient_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(total):
            # In float16 the scaler skips a step whose gradient overflows.
            if math.isfinite(gradient_norm) or self.accelerator.mixed_precision == "fp16":
                return
            what = f"the gradient's norm is {gradient_norm}"
        elif not math.isfinite(total):
            what = "an embedding is not finite"
        else:
            what = f"the loss is {loss}"
        self._stop(step, what)

    def _stop(self, step: int, what: str) -> NoReturn:
        for good, tensor in zip(self.good, self.state, strict=True):
            tensor.detach().copy_(good)
        raise FloatingPointError(
            f"Stopped at step {step} of {self.num_steps}: {what}. The tower has the last weights "
            "that gave a finite loss. Lower `learning_rate`, or check the loss and the images."
        )


@contextmanager
def training(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Training mode within; afterwards the old modes, no gradients, the old random state."""
    was_training = {part: part.training for module in modules for part in module.modules()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for module in modules:
                module.train()
            yield
        finally:
            for part, was in was_training.items():
                part.training = was
            for module in modules:
                module.zero_grad()


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


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"`loss` must return one number for the batch, got {got}. Reduce it, for instance "
            "with `reduction='mean'`."
        )
    if not value.requires_grad:
        raise ValueError(
            "`loss` returned a value without a gradient, so it can't train anything. Compute it "
            "from the embeddings with differentiable operations."
        )


def new_accelerator(precision: str) -> Accelerator:
    """An Accelerator for one process in the wanted precision."""
    if precision == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 else "no"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("`precision` 'fp16' needs a GPU, and there is none. Use 'auto' or 'no'.")
    # Accelerate keeps the precision of a process's first Accelerator and refuses another one.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"Finetuner trains in one process, got {accelerator.num_processes}. Start it without "
            "`accelerate launch`, or with --num_processes 1."
        )
    return accelerator


def _rate_factor(step: int, num_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of a step (from 0) as a share of the peak."""
    warmup = round(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (num_steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
