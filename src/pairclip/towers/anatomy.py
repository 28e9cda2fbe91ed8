"""How an image model is put together, seen by running it, whatever library it is from.

A row of blocks is a run of siblings of one class that hand one tensor on to the next, each called
once. Of all such rows the one with the most parameters is the model's. What its first block is
given was made by the *stem*; what else an embedding is made of comes *after* the blocks; a linear
map that is the very last is the *projection*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pairclip.towers.views import Give, swapped

_Encode = Callable[[nn.Module, Tensor], Tensor]
# A row with a smaller share of the parameters is a detail of the model, not its body.
_LEAST_SHARE = 0.2
# One member with a larger share of its row has the blocks inside.
_LARGEST_SHARE = 0.9
_PASSED_THROUGH = {"TBackward0", "TransposeBackward0", "ToCopyBackward0", "ExpandBackward0"}


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are, by name.

    Attributes:
        parent: Module whose children the blocks are, "" for the model itself.
        names: The blocks' names in it, in order.
        stem: Parameters that the input of the first block is made of, and those of no use.
        after: All other parameters outside the blocks.
        projection: Parameters of the linear map that comes last, if one does.
        batch_dim: Dimension of the images in what blocks hand on; 1 where tokens come first.
        extras: Values beside the tensor that a block returns, None for a bare tensor.
    """

    parent: str
    names: tuple[str, ...]
    stem: frozenset[str]
    after: frozenset[str]
    projection: tuple[str, ...]
    batch_dim: int
    extras: int | None

    def path(self, index: int) -> str:
        """Full name of a block."""
        return f"{self.parent}.{self.names[index]}".lstrip(".")

    def fits(self, model: nn.Module) -> bool:
        """Whether the model still has these blocks."""
        try:
            present = model.get_submodule(self.parent)._modules
        except AttributeError:
            return False
        return tuple(name for name in present if name in self.names) == self.names

    def depths(self, names: Iterable[str]) -> dict[str, int]:
        """Of each parameter or buffer: 0 in the stem, i in block i from 1, then one more."""
        last = len(self.names) + 1
        depths = dict.fromkeys(self.stem, 0) | dict.fromkeys(self.after, last)
        # What PEFT put beside a weight, or around it, is where that weight is.
        owners = {name.rpartition(".")[0]: depth for name, depth in depths.items()}
        owners |= {self.path(i): i + 1 for i in range(len(self.names))}

        def depth(name: str) -> int:
            while name not in depths and name not in owners:
                name = name.rpartition(".")[0]
            return depths[name] if name in depths else owners[name]

        owners.setdefault("", last)
        return {name: depth(name) for name in names}

    def projections(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of the linear map that comes last, with what PEFT put into it.

        Raises:
            ValueError: If none does.
        """
        if not self.projection:
            last = sorted({name.rpartition(".")[0] for name in self.after}) or ["nothing"]
            raise ValueError(
                f"This {type(model).__name__} has no projection: no linear map comes last, but "
                f"after its blocks {' and '.join(last)}. Use `all_but_last=0` to train only that."
            )
        owners = {name.rpartition(".")[0] for name in self.projection}
        others = {name.rpartition(".")[0] for name in self.stem | self.after - {*self.projection}}
        if owners & others:
            return [model.get_parameter(name) for name in self.projection]
        return [p for owner in owners for p in model.get_submodule(owner).parameters()]


def examine(model: nn.Module, encode: _Encode, pixel_values: Tensor) -> Anatomy:
    """Learn the anatomy of a model by running it twice.

    Args:
        model: As it is called; in evaluation mode.
        encode: Function of a model and pixel values ``[B, 3, H, W]`` that gives embeddings.
        pixel_values: Those of two images, ``[2, 3, H, W]``.

    Raises:
        NotImplementedError: If no row of blocks is the model's body.
    """
    with _Watch(model) as watch, torch.no_grad():
        encode(model, pixel_values)
    total = sum(parameter.numel() for parameter in model.parameters())
    row = watch.body(total)
    if row is None:
        raise NotImplementedError(
            f"A tower around {type(model).__name__} has no row of blocks that hand one tensor on "
            "and hold much of its parameters, so it has no `blocks`: it can't be split, frozen up "
            "to a block or given a rate per layer. Freeze parameters by name."
        )
    stem, after, projection = _outside(model, encode, pixel_values, row)
    prefixes = tuple(f"{row.parent}.{name}.".lstrip(".") for name in row.names)
    unused = {
        name
        for name, _ in model.named_parameters()
        if not name.startswith(prefixes) and name not in stem | after
    }
    return Anatomy(
        parent=row.parent,
        names=tuple(row.names),
        stem=frozenset(stem | unused),
        after=frozenset(after),
        projection=projection,
        batch_dim=row.shape[:2].index(2),
        extras=row.extras,
    )


def first_tensor(values: Any) -> Tensor | None:
    """The tensor among what a module is given or gives."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, (tuple, list)):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


@dataclass
class _Row:
    parent: str
    kind: type
    names: list[str]
    output: Tensor
    shape: tuple[int, ...]
    extras: int | None
    sizes: list[int]

    @property
    def size(self) -> int:
        return sum(self.sizes)


class _Watch:
    """Follows, during a run, which child of each module takes what its last child gave."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: list[_Row] = []
        self.calls: dict[str, int] = {}

    def __enter__(self) -> _Watch:
        self._hooks = [
            child.register_forward_hook(self._follower(path, name), with_kwargs=True)
            for path, parent in self.model.named_modules()
            for name, child in parent.named_children()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _follower(self, path: str, name: str) -> Callable[..., None]:
        def follow(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            full = f"{path}.{name}"
            self.calls[full] = self.calls.get(full, 0) + 1
            given, made = first_tensor(args or tuple(kwargs.values())), first_tensor(output)
            if given is None or made is None:
                return
            size = sum(parameter.numel() for parameter in module.parameters())
            before = next((row for row in reversed(self.rows) if row.parent == path), None)
            if before is not None and before.output is given and before.kind is type(module):
                before.names.append(name)
                before.sizes.append(size)
                before.output = made
            else:
                extras = None if isinstance(output, Tensor) else len(output) - 1
                shape = tuple(given.shape)
                self.rows.append(_Row(path, type(module), [name], made, shape, extras, [size]))

        return follow

    def body(self, total: int) -> _Row | None:
        """The row of blocks that is most of the model, or None."""
        once = [row for row in self.rows if self._is_sound(row)]
        rows = [row for row in once if len(row.names) > 1]
        best = max(rows, key=lambda row: row.size, default=None)
        # A stem and a body that are both `Sequential` are no row of blocks: the row is in the body.
        while best is not None and max(best.sizes) > _LARGEST_SHARE * best.size:
            largest = best.names[best.sizes.index(max(best.sizes))]
            body = f"{best.parent}.{largest}".lstrip(".")
            inner = [row for row in rows if f"{row.parent}.".startswith(f"{body}.")]
            if not inner:
                break
            best = max(inner, key=lambda row: row.size)
        if best is None or best.size < _LEAST_SHARE * total:
            # A model of a single block keeps it, as others keep theirs, in a list.
            lists = [row for row in once if self._is_list(row.parent)]
            best = max(lists, key=lambda row: row.size, default=None)
        return best if best is not None and best.size >= _LEAST_SHARE * total else None

    def _is_sound(self, row: _Row) -> bool:
        called_once = all(self.calls[f"{row.parent}.{name}"] == 1 for name in row.names)
        return called_once and len(row.shape) > 1 and 2 in row.shape[:2]

    def _is_list(self, path: str) -> bool:
        return isinstance(self.model.get_submodule(path), nn.ModuleList)


class _FirstInput(Give):
    """Stands for the first block, and keeps what it was given."""

    def __init__(self, block: nn.Module, extras: int | None, features: Tensor) -> None:
        super().__init__(block, extras, features)
        self.inputs: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inputs.extend(_tensors([*args, *kwargs.values()]))
        return super().forward(*args, **kwargs)


def _outside(
    model: nn.Module, encode: _Encode, pixel_values: Tensor, row: _Row
) -> tuple[set[str], set[str], tuple[str, ...]]:
    """Names of the parameters before the blocks, after them, and of a linear map at the end."""
    blocks: Any = model.get_submodule(row.parent)._modules
    # No block runs: each gives what the last one gave, whose shape is what comes after expects.
    stands: dict[str, nn.Module] = {
        name: Give(blocks[name], row.extras, row.output) for name in row.names
    }
    first = stands[row.names[0]] = _FirstInput(blocks[row.names[0]], row.extras, row.output)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    with _all_require_grad(model), torch.enable_grad():
        embeddings = encode(swapped(model, row.parent, stands), pixel_values)
        stem = {names[leaf] for leaf in _leaves(first.inputs) if leaf in names}
        after = {names[leaf] for leaf in _leaves([embeddings]) if leaf in names} - stem
        projection = tuple(names[leaf] for leaf in _last_linear(embeddings) if leaf in names)
    return stem, after, projection


@contextmanager
def _all_require_grad(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _leaves(tensors: list[Tensor]) -> set[Tensor]:
    """Leaves of the graph that made these: the parameters that they depend on."""
    leaves = {t for t in tensors if t.grad_fn is None and t.requires_grad}
    nodes: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    done = set()
    while nodes:
        node = nodes.pop()
        if node in done:
            continue
        done.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [inner for inner, _ in node.next_functions if inner is not None]
    return leaves


def _last_linear(embeddings: Tensor) -> list[Tensor]:
    """Parameters of the matrix product that embeddings are, seen through reshapes and scalings."""
    node: Any = embeddings.grad_fn
    while node is not None:
        leaves: list[Any] = []
        inner: list[Any] = []
        for before, _ in node.next_functions:
            while before is not None and before.name() in _PASSED_THROUGH:
                if not hasattr(before.next_functions[0][0], "variable"):
                    break
                before = before.next_functions[0][0]
            if before is not None:
                (leaves if hasattr(before, "variable") else inner).append(before)
        weights = [leaf.variable for leaf in leaves]
        if any(weight.ndim >= 2 for weight in weights):
            return weights
        if weights or len(inner) != 1:
            return []
        node = inner[0]
    return []
