"""Forward and backward of one batch, exact for any number of processes and micro-batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pairclip._randomness import Stream, random_state_kept, seed_all

Loss = Callable[..., Tensor]  # of embeddings, labels and, where there are some, targets
# As indexing, scattering and one-hot rows say that a class id is beyond the classes of a loss.
_NO_SUCH_CLASS = re.compile("out of bounds|out of range|smaller than num_classes")


class BatchResult(NamedTuple):
    """What a step's backward leaves beside the gradients, of the whole batch, detached."""

    loss: Tensor  # scalar
    embeddings: Tensor  # [B, D] float32
    labels: Tensor  # [B] int64
    targets: Tensor | None  # [B, K] float32
    gradient: Tensor  # [B, D] of the loss with respect to the embeddings, scaled in float16


def backward(
    model: nn.Module,
    loss: Loss,
    pixels: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    *,
    parameters: Sequence[nn.Parameter],
    accelerator: Accelerator,
    micro_batch_size: int | None,
    seed: tuple[int, int],
) -> BatchResult:
    """Leave the gradient of the whole batch's loss in the parameters, which have none before.

    The loss sees the embeddings of the whole batch, so it needs no notion of processes. Its
    gradient with respect to the embeddings is then carried into the model by the surrogate
    ``processes * (embeddings * gradient).sum()``, because DDP averages over processes. With
    micro-batches the embeddings come from a first pass that keeps no activations (Gao et al.
    2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

    Args:
        model: The tower, wrapped in DDP where there are several processes.
        loss: ``loss(embeddings [B, D], labels [B])`` gives a scalar tensor, or, where there are
            targets, ``loss(embeddings, labels, targets [B, K])``.
        pixels: This process's slice of the batch, ``[b, ...]``, on any device.
        labels: Its class ids, ``[b]`` int64.
        targets: Its targets, ``[b, K]``, if the loss takes any.
        parameters: Those that train, of the model and of the loss.
        accelerator: Knows the processes, the precision and the gradient scaler.
        micro_batch_size: Images per piece; None encodes the slice at once.
        seed: (seed, step), from which every random number of the step follows.
    """
    pieces = pixels.split(micro_batch_size or len(pixels))
    process = accelerator.process_index

    def encode(number: int) -> Tensor:
        seed_all(Stream.TOWER, *seed, process, number, device=accelerator.device)
        with accelerator.autocast():
            embeddings: Tensor = model(pieces[number].to(accelerator.device, non_blocking=True))
        return embeddings.float()

    with random_state_kept():
        if len(pieces) == 1:
            local = encode(0)
            detached = local.detach()
        else:
            with torch.no_grad():
                detached = torch.cat([encode(number) for number in range(len(pieces))])
        gather: Any = accelerator.gather
        whole: Tensor = gather(detached.contiguous()).requires_grad_()
        rest = [labels] if targets is None else [labels, targets]
        beside = [gather(each.to(accelerator.device, non_blocking=True)) for each in rest]

        seed_all(Stream.LOSS, *seed, device=accelerator.device)
        with torch.autocast(accelerator.device.type, enabled=False):
            value = _value(loss, whole, *beside)
        _check_loss(value)
        gradient = _differentiate(value, whole, parameters, accelerator.scaler)
        mine = gradient.chunk(accelerator.num_processes)[process] * accelerator.num_processes

        if len(pieces) == 1:
            (local * mine).sum().backward()
        else:
            for number, of_piece in enumerate(mine.split(len(pieces[0]))):
                last = number == len(pieces) - 1
                # Processes add up their gradients once, when the last piece has given its own.
                with nullcontext() if last else accelerator.no_sync(model):
                    (encode(number) * of_piece).sum().backward()
    return BatchResult(
        value.detach(), whole.detach(), beside[0], None if targets is None else beside[1], gradient
    )


def _value(loss: Loss, embeddings: Tensor, labels: Tensor, *targets: Tensor) -> Any:
    try:
        return loss(embeddings, labels, *targets)
    except (IndexError, RuntimeError) as error:
        if not _NO_SUCH_CLASS.search(str(error)):
            raise
        raise ValueError(
            f"`loss` can't take the class ids of this batch, {int(labels.min())} to "
            f"{int(labels.max())}: {error}. A loss with a proxy or a weight for each class wants "
            "ids from 0, and as many classes as it was made for: "
            "`LabelledImages(dataset, relabel=True)` numbers them so."
        ) from error


def _differentiate(
    value: Tensor, embeddings: Tensor, parameters: Sequence[nn.Parameter], scaler: Any
) -> Tensor:
    """The gradient in the embeddings; that of the loss's own parameters is left in them.

    Not by `backward`, which DDP would take for the one backward of the step if the loss looks at
    weights of the tower. In float16 the scaler's factor is in both, and so in all that follows.
    """
    scaled = value if scaler is None else scaler.scale(value)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradient, *own = torch.autograd.grad(scaled, [embeddings, *trained], allow_unused=True)
    for parameter, of_parameter in zip(trained, own, strict=True):
        parameter.grad = of_parameter
    return torch.zeros_like(embeddings) if gradient is None else gradient


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
