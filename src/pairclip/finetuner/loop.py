"""The loop of a fit: steps, evaluations, callbacks, checkpoints, and where it may be broken off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from pairclip import _files
from pairclip._progress import progress
from pairclip._randomness import Stream, random_state_kept, seed_all
from pairclip.callbacks import Callback, FitState
from pairclip.finetuner.agreement import BatchDigests, sums_over
from pairclip.finetuner.evaluations import Evaluate
from pairclip.finetuner.resuming import Saver
from pairclip.finetuner.step import Trainer
from pairclip.finetuner.stop_signals import StopSignals


@dataclass(eq=False)
class Loop:
    """Takes a fit from where it is to its end.

    Args:
        trainer: Takes the steps.
        fit: What callbacks see; its `step` is where the fit is.
        callbacks: Called in this order.
        epoch_of: From a step, from 0, to its epoch.
        targets: A row for each image of the fit, if the loss takes them.
        digests: Of the batches that this process has drawn, if there are others to differ from.
        evaluate: Called with the tower every `eval_every` steps and after the last, if given.
        eval_every: Steps between evaluations.
        saver: Writes checkpoints, if given.
        signals: End it after a step, if one was caught.
    """

    trainer: Trainer
    fit: FitState
    callbacks: Sequence[Callback]
    _: KW_ONLY
    epoch_of: Callable[[int], int]
    targets: Tensor | None
    digests: BatchDigests | None
    evaluate: Evaluate | None
    eval_every: int
    saver: Saver | None
    signals: StopSignals

    def train(self, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> bool:
        """Take the steps that are left; whether the end was reached, not a stop signal."""
        fit = self.fit
        for callback in self.callbacks:
            callback.on_fit_start(fit)
        self._agree()
        if fit.step:
            self._settle(resumed=True)
        bar = progress(
            total=fit.num_steps,
            initial=fit.step,
            desc="Fine-tuning",
            unit="step",
            disable=None if fit.accelerator.is_local_main_process else True,
        )
        with bar:
            for pixels, labels, items in () if self._over() else batches:
                record = self._step(pixels, labels, items)
                loss, rate = f"{record['loss']:.4f}", f"{record['learning_rate']:.1e}"
                bar.set_postfix(loss=loss, rate=rate, refresh=False)
                bar.update()
                if self._agree():
                    self._save()
                    return False
                self._settle()
                if self._over():
                    break
        self.trainer.check_weights(fit.step)
        if fit.averages is not None:
            _copy(fit.averages, fit.parameters)
        for callback in self.callbacks:
            callback.on_fit_end(fit)
        return True

    def _step(
        self, pixels: Tensor, labels: Tensor, items: Tensor | None
    ) -> dict[str, float | None]:
        fit, history = self.fit, self.fit.history
        if self.digests is not None:
            loss = float(history.steps[-1]["loss"] or 0) if history.steps else 0.0
            self.digests.check_same(fit.accelerator, fit.step + 1, loss)
        targets = None if self.targets is None else self.targets[items]
        batch, record, skipped = self.trainer(pixels, labels, targets, fit.step + 1)
        epoch = self.epoch_of(fit.step)
        fit.step += 1
        history.steps.append({"step": fit.step, "epoch": epoch, **record})
        history.skipped_steps += skipped
        _, fit.embeddings, fit.labels, fit.targets, fit.gradient = batch
        for callback in self.callbacks:
            callback.on_step(fit)
        return record

    def _agree(self) -> bool:
        """Stop all processes for the reason that one has; whether one caught a stop signal."""
        fit, accelerator = self.fit, self.fit.accelerator
        flags = [self.signals.caught is not None, fit.stop_reason is not None]
        flags.append(fit.averages is not None)
        if accelerator.num_processes == 1:
            return flags[0]
        caught, stopped, averaging = sums_over(accelerator, flags, fit.step)
        if averaging not in (0, accelerator.num_processes):
            raise ValueError(
                f"`callbacks` average the weights on {averaging:.0f} of "
                f"{accelerator.num_processes} processes. Give all of them the same `WeightAverage`."
            )
        if stopped:
            reasons = gather_object([fit.stop_reason])
            fit.stop(next(reason for reason in reasons if reason is not None))
        return bool(caught)

    def _over(self) -> bool:
        return self.fit.step >= self.fit.num_steps or self.fit.stop_reason is not None

    def _settle(self, *, resumed: bool = False) -> None:
        """Evaluate and save what is due after a step; after a stop signal, what was left undone."""
        evaluations = self.fit.evaluations
        last = evaluations[-1]["step"] if evaluations else 0
        evaluating = False
        if self.evaluate is not None and last < self.fit.step and self._due(self.eval_every):
            evaluating = True
            self._evaluate(self.evaluate)
        if self.saver is not None and self._due(self.saver.every) and (evaluating or not resumed):
            self._save()

    def _due(self, every: int) -> bool:
        return self._over() or self.fit.step % every == 0

    def _evaluate(self, evaluate: Evaluate) -> None:
        fit = self.fit
        self.trainer.check_weights(fit.step)
        with _averages_in_place(fit):
            with random_state_kept():
                seed_all(Stream.EVALUATION, self.trainer.settings.seed, fit.step)
                plain = _files.plain(evaluate(fit.tower))
            if fit.accelerator.num_processes > 1:
                # Devices may differ in the last bit, and callbacks must decide alike.
                (plain,) = broadcast_object_list([plain])
            fit.evaluations.append({"step": fit.step, **plain})
            for callback in self.callbacks:
                callback.on_evaluation(fit)
        self._agree()

    def _save(self) -> None:
        if self.saver is not None:
            self.trainer.check_weights(self.fit.step)
            self.saver.save()


@contextmanager
def _averages_in_place(fit: FitState) -> Iterator[None]:
    if fit.averages is None:
        yield
        return
    weights = [parameter.detach().clone() for parameter in fit.parameters]
    _copy(fit.averages, fit.parameters)
    try:
        yield
    finally:
        _copy(weights, fit.parameters)


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for old, new in zip(target, source, strict=True):
            old.copy_(new)
