"""What training changes in a tower, taken out and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pairclip.towers import adapters


def trained_tensors(tower: nn.Module) -> dict[str, Tensor]:
    """What training changes in a tower: trainable parameters and saved buffers, by name.

    The names are those in the tower itself, where PEFT or `torch.compile` wrapped it.
    """
    tower = adapters.without_wrapper(tower)
    saved = tower.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in tower.named_buffers() if name in saved}
    weights = {name: p for name, p in tower.named_parameters() if p.requires_grad} | buffers
    return {adapters.plain_name(name): weight for name, weight in weights.items()}


def copy_into(targets: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same name; all or none.

    Raises:
        ValueError: If one has no counterpart, or one of another shape.
    """
    for name, tensor in source.items():
        if name not in targets:
            raise ValueError(
                f"The checkpoint has the weight `{name}`, which the tower lacks. Load the tower "
                "from the source that it was trained from; if PEFT had put adapters into it, put "
                "the same ones in first, by `peft.get_peft_model`."
            )
        if targets[name].shape != tensor.shape:
            raise ValueError(
                f"The checkpoint's weight `{name}` has shape {list(tensor.shape)}, the tower's "
                f"{list(targets[name].shape)}. Load the tower from the source that it was trained "
                "from."
            )
    with torch.no_grad():
        for name, tensor in source.items():
            targets[name].copy_(tensor)
