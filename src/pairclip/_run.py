"""What one fit carries from step to step, and what a step does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate import Accelerator
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
        modules: list[nn.Module] = [self.tower]
        if isinstance(settings.loss, nn.Module):
            modules.append(settings.loss.to(accelerator.device))
        if not any(parameter.requires_grad for parameter in self.tower.parameters()):
            raise ValueError("`tower` has no trainable parameter: all have requires_grad=False.")
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = accelerator.prepare(self._new_optimizer())
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        # The weights that gave the last finite loss, for when the next one isn't.
        self.good = [parameter.detach().clone() for parameter in self.parameters]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer is not None:
            return settings.optimizer(self.parameters)
        matrices = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)

    def step(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, float]:
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
        self.optimizer.zero_grad()
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
        for good, parameter in zip(self.good, self.parameters, strict=True):
            good.copy_(parameter.detach())
        self.optimizer.step()
        self.skipped_steps += bool(accelerator.optimizer_step_was_skipped)
        return {
            "loss": value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": gradient_norm,
        }

    def check_weights(self) -> None:
        """Take back the last step if it left a weight that isn't finite."""
        sums = torch.stack([p.detach().sum(dtype=torch.float64) for p in self.parameters])
        if not bool(sums.isfinite().all()):
            self._stop(self.num_steps, "a weight is not finite after it")

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
        for good, parameter in zip(self.good, self.parameters, strict=True):
            parameter.detach().copy_(good)
        raise FloatingPointError(
            f"Stopped at step {step} of {self.num_steps}: {what}. The tower has the last weights "
            "that gave a finite loss. Lower `learning_rate`, or check the loss and the images."
        )


@contextmanager
def training(tower: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode within; afterwards the old modes, no gradients, the old random state."""
    was_training = {module: module.training for module in tower.modules()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        tower.train()
        try:
            yield
        finally:
            for module, training in was_training.items():
                module.training = training
            tower.zero_grad()


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
    wanted: str | None = precision
    if precision == "auto":
        # None keeps what `accelerate launch` or an earlier Accelerator set.
        wanted = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else None
    accelerator = Accelerator(mixed_precision=wanted)
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
