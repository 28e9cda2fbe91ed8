"""Adapters that PEFT put into a model (LoRA and its likes): seen through, and merged."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

_COMPILED = "_orig_mod"  # what `torch.compile` calls the module in what it returns
# How PEFT merges `modules_to_save`, and layers that their parent merges.
_OWN_WAY = "unload_and_optionally_merge_module"


def without_wrapper(model: Any) -> Any:
    """The model in a `peft.PeftModel` (adapters still inside) or in what `torch.compile` returned.

    Another model as it is.
    """
    # Who has such a model has imported PEFT; it is optional, and no one else needs it.
    peft = sys.modules.get("peft")
    while True:
        if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            model = model.base_model.model
        elif isinstance(model, nn.Module) and _COMPILED in model._modules:
            model = model._modules[_COMPILED]
        else:
            return model


def plain_name(name: str) -> str:
    """Name of a weight or a module without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def uncompiled(model: Any) -> Any:
    """The model with the modules that `torch.compile` returned replaced by those within."""
    model = without_wrapper(model)
    if not any(_COMPILED in part._modules for part in model.modules()):
        return model
    other = copy.copy(model)
    other._modules = {
        name: None if child is None else uncompiled(child) for name, child in model._modules.items()
    }
    return other


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put something into the model."""
    return any(_is_adapter(part) for part in model.modules())


def check_trained(model: nn.Module) -> None:
    """Refuse adapters that a backward pass did not reach: they would train nothing, in silence.

    Raises:
        ValueError: If one has no gradient after it.
    """
    idle = {
        path
        for path, part in model.named_modules()
        if _is_adapter(part)
        and any(p.requires_grad for p in part.parameters())
        and all(p.grad is None for p in part.parameters())
    }
    if idle:
        raise ValueError(
            f"{len(idle)} adapters of PEFT had no gradient after the first backward, first that of "
            f"`{min(idle)}`: the model uses its weight without calling it, so the adapter never "
            "runs. Leave it out of `target_modules`, or target the whole attention module."
        )


def merged(model: nn.Module) -> nn.Module:
    """The model with its active adapters merged into its weights and taken out.

    A model without adapters is returned as it is. One that has them isn't changed: a copy is.
    """
    if not has_adapters(model):
        return uncompiled(model)  # type: ignore[no-any-return]
    model = copy.deepcopy(uncompiled(model))
    _merge_within(model)
    return model


def _is_adapter(part: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(part, BaseTunerLayer) or hasattr(part, _OWN_WAY)


def _merge_within(module: nn.Module) -> None:
    part: Any
    for name, part in list(module.named_children()):
        if not _is_adapter(part):
            _merge_within(part)
            continue
        if hasattr(part, _OWN_WAY):
            plain = getattr(part, _OWN_WAY)(merge=True, safe_merge=False, adapter_names=None)
        else:
            if not part.merged:
                part.merge()
            plain = part.get_base_layer()
        setattr(module, name, plain)
