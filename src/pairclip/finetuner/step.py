"""One step of a fit: forward, backward, update; and what it carries to the next one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pairclip.finetuner.accelerators import on_every_process
from pairclip.finetuner.exact_gradient import BatchResult, Loss, backward
from pairclip.finetuner.optimizer import new_optimizer, rate_factor, trainable_parameters
from pairclip.finetuner.settings import Settings
from pairclip.samplers import PairSampler
from pairclip.towers.adapters import check_trained


class StepResult(NamedTuple):
    """What a step did."""

    batch: BatchResult  # as the loss saw it
    record: dict[str, float | None]  # of it in `History.steps`
    skipped: bool  # because a float16 gradient overflowed


class Trainer:
    """Takes the steps of one fit.

    Args:
        tower: Trained in place; moved to the accelerator's device, as the loss is.
        loss: As `Finetuner` takes it.
        settings: Of the fit.
        accelerator: Of the fit.
        num_steps: Steps of the whole fit, which decide the learning rate of each.

    Attributes:
        modules: The tower and, if it is a module, the loss, by those names.
        parameters: All that the optimizer updates.

    Raises:
        ValueError: If nothing is trainable, or something of it can't be trained so.
    """

    def __init__(
        self,
        tower: nn.Module,
        loss: Callable[..., Tensor],
        settings: Settings,
        accelerator: Accelerator,
        num_steps: int,
    ) -> None:
        self.tower = tower.to(accelerator.device)
        self.loss = loss
        self.settings = settings
        self.accelerator = accelerator
        self.num_steps = num_steps
        self.modules: dict[str, nn.Module] = {"tower": self.tower}
        if isinstance(loss, nn.Module):
            self.modules["loss"] = loss.to(accelerator.device)
        if not any(parameter.requires_grad for parameter in self.tower.parameters()):
            raise ValueError("`tower` has no trainable parameter: all have requires_grad=False.")
        if any(parameter.is_inference() for parameter in self.tower.parameters()):
            raise ValueError(
                "`tower` was made inside `torch.inference_mode()`, so its weights can't be "
                "trained. Make it outside."
            )
        trainable = trainable_parameters(self.modules)
        self._check_batch_norms()
        self.model = on_every_process(self.tower, list(self.modules.values())[1:], accelerator)
        self.optimizer = new_optimizer(settings, trainable)
        groups = self.optimizer.param_groups
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.peak_rates = [group["lr"] for group in groups]
        self._on_batches = _on_batches(loss)
        buffers = [b for module in self.modules.values() for b in module.buffers()]
        self._buffers = list({id(buffer): buffer for buffer in buffers}.values())

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

    def __call__(
        self, pixels: Tensor, labels: Tensor, targets: Tensor | None, step: int
    ) -> StepResult:
        """Train on this process's slice of batch number `step`, from 1.

        Raises:
            FloatingPointError: If the loss, an embedding or the gradient isn't finite; no weight
                and no buffer is changed then.
        """
        settings, scaler = self.settings, self.accelerator.scaler
        factor = rate_factor(step - 1, self.num_steps, settings)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self._drop_gradients()
        buffers = [buffer.clone() for buffer in self._buffers]
        batch = backward(
            self.model,
            self._on_batches,
            pixels,
            labels,
            targets,
            parameters=self.parameters,
            accelerator=self.accelerator,
            micro_batch_size=settings.micro_batch_size,
            seed=(settings.seed, step),
        )
        if step == 1:
            check_trained(self.tower)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # One look at the device for all that the host wants to know of this step.
        watched = [batch.loss.reshape(()), batch.embeddings.sum(dtype=torch.float64), norm]
        value, total, gradient_norm = torch.stack([each.double() for each in watched]).tolist()
        trouble = self._not_finite(value, total, gradient_norm)
        if trouble is not None:
            for buffer, old in zip(self._buffers, buffers, strict=True):
                buffer.copy_(old)
            raise FloatingPointError(
                f"Stopped at step {step} of {self.num_steps}: {trouble}. The tower has the weights "
                "that it had before this step. Lower `learning_rate`, or check the loss and the "
                "images."
            )
        if settings.max_grad_norm is not None and not gradient_norm <= settings.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, settings.max_grad_norm, norm)
        skipped = self._update()
        self.optimizer.zero_grad()  # not at the next step: an evaluation before it needs the memory
        record = {
            "loss": value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
        }
        return StepResult(batch, record, skipped)

    def _not_finite(self, loss: float, total: float, gradient_norm: float) -> str | None:
        if not math.isfinite(total):
            return "an embedding is not finite"
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        # In float16 the scaler skips a step whose gradient overflows.
        if math.isfinite(gradient_norm) or self.accelerator.mixed_precision == "fp16":
            return None
        return f"the gradient's norm is {gradient_norm}"

    def _update(self) -> bool:
        """Let the optimizer step; whether the scaler skipped it."""
        scaler: Any = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
            return False
        scaler.step(self.optimizer)
        scale = scaler.get_scale()
        scaler.update()
        return bool(scaler.get_scale() < scale)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        for module in self.modules.values():
            module.zero_grad()

    def check_weights(self, step: int) -> None:
        """Raise if `step` left a weight which isn't finite, before it is used or saved."""
        sums = torch.stack([p.detach().sum(dtype=torch.float64) for p in self.parameters])
        if not bool(sums.isfinite().all()):
            raise FloatingPointError(
                f"Stopped at step {step} of {self.num_steps}: a weight is not finite after it, so "
                "this tower is lost. Load it again, or a checkpoint, and lower `learning_rate`."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next steps but the tower's weights."""
        scaler = self.accelerator.scaler
        loss: Any = self.loss
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "loss": dict(loss.state_dict()) if hasattr(loss, "state_dict") else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["loss"] is not None:
            loss: Any = self.loss
            loss.load_state_dict(state["loss"])

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode within; afterwards the old modes, no gradients, the old random state.

        Batch norms that are frozen stay in evaluation mode, so that their statistics do.
        """
        parts = [part for module in self.modules.values() for part in module.modules()]
        was_training = {part: part.training for part in parts}
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                for module in self.modules.values():
                    module.train()
                for part in parts:
                    if isinstance(part, _BatchNorm) and _frozen(part):
                        part.eval()
                yield
            finally:
                for part, was in was_training.items():
                    part.training = was
                self._drop_gradients()


def _frozen(norm: _BatchNorm) -> bool:
    parameters = list(norm.parameters())
    trainable = not parameters or any(p.requires_grad for p in parameters)
    return not trainable and norm.running_mean is not None


def _on_batches(loss: Callable[..., Tensor]) -> Loss:
    """The loss as a function of a batch's embeddings and labels."""
    if not getattr(loss, "takes_pairs", False):
        return loss

    def on_pairs(embeddings: Tensor, labels: Tensor) -> Tensor:
        (a, b), (of_a, of_b) = PairSampler.split(embeddings), PairSampler.split(labels)
        return loss(a, b, of_a == of_b)

    return on_pairs
