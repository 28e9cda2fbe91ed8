"""A model with stand-ins for some of its modules, which shares all the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def swapped(model: Any, parent: str, children: Mapping[str, nn.Module]) -> Any:
    """The model with other children of one of its modules; all else is shared."""
    other = _shallow(model)
    if parent:
        name, _, rest = parent.partition(".")
        children = {name: swapped(model._modules[name], rest, children)}
    other._modules = {**model._modules, **children}
    return other


def restricted(
    module: Any, belongs: Callable[[str], bool], stands: Mapping[str, nn.Module], prefix: str = ""
) -> Any:
    """The module, running as it does, of which only some parameters are registered.

    They keep their names. Modules whose parameters are all registered are shared as they are.

    Args:
        module: The model.
        belongs: Whether a parameter, by its full name, is registered.
        stands: Modules that stand for some of the model's, by full name.
        prefix: Name of `module` in the model.
    """
    if prefix in stands:
        return stands[prefix]
    dot = f"{prefix}." if prefix else ""

    def holds_stand(path: str) -> bool:
        return any(stand == path or stand.startswith(f"{path}.") for stand in stands)

    names = [dot + name for name, _ in module.named_parameters(remove_duplicate=False)]
    if all(map(belongs, names)) and not (holds_stand(prefix) if prefix else stands):
        return module
    other = _shallow(module)
    other._modules, other._parameters = {}, {}
    for name, parameter in module._parameters.items():
        if parameter is None or belongs(dot + name):
            other._parameters[name] = parameter
        else:
            other.__dict__[name] = parameter
    for name, child in module._modules.items():
        path = dot + name
        inner = [] if child is None else child.named_parameters(remove_duplicate=False)
        within = [f"{path}.{n}" for n, _ in inner]
        if not within or holds_stand(path) or any(map(belongs, within)):
            inside = None if child is None else restricted(child, belongs, stands, path)
            other._modules[name] = inside
        elif isinstance(module, (nn.Sequential, nn.ModuleList)):
            other._modules[name] = _Unregistered(child)
        else:
            other.__dict__[name] = child
    return other


def _shallow(module: Any) -> Any:
    other = copy.copy(module)
    # Compiled in place, it would run the module that it is a copy of.
    other.__dict__["_compiled_call_impl"] = None
    return other


class _Unregistered(nn.Module):
    """A module that runs, but whose parameters belong to somebody else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)


class Stand(nn.Module):
    """Stands where a block was; what else is asked of it, the block answers."""

    def __init__(self, block: nn.Module, extras: int | None) -> None:
        super().__init__()
        self.__dict__["block"], self.extras = block, extras

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def as_the_block(self, features: Tensor) -> Any:
        """In the form in which the block returns them."""
        return features if self.extras is None else (features, *[None] * self.extras)


class Pass(Stand):
    """Lets through what comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on the first value."""
        return self.as_the_block(args[0] if args else next(iter(kwargs.values())))


class Give(Stand):
    """Gives features, whatever comes."""

    def __init__(self, block: nn.Module, extras: int | None, features: Tensor) -> None:
        super().__init__(block, extras)
        self.features = features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand out the features."""
        return self.as_the_block(self.features)


class Enter(Give):
    """Runs the block on features, with all else (masks, rotary positions) as it comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with the features in place of its first value."""
        block = self.__dict__["block"]
        if args:
            return block(self.features, *args[1:], **kwargs)
        return block(**{**kwargs, next(iter(kwargs)): self.features})


class Stopped(Exception):
    """Carries the features out of a run that was stopped at a block."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


class Stop(Stand):
    """Ends the run: with what comes to the block, or, with `after`, with what it makes of it."""

    def __init__(self, block: nn.Module, extras: int | None, *, after: bool) -> None:
        super().__init__(block, extras)
        self.after = after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `Stopped`."""
        if not self.after:
            raise Stopped(args[0] if args else next(iter(kwargs.values())))
        output = self.__dict__["block"](*args, **kwargs)
        raise Stopped(output if isinstance(output, Tensor) else output[0])
