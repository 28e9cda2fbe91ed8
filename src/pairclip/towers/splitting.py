"""What a part of a tower is made of: some of its blocks, with what is before or after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip.towers import class_token
from pairclip.towers.anatomy import Anatomy
from pairclip.towers.modes import evaluating
from pairclip.towers.views import Enter, Give, Pass, Stop, Stopped, restricted, swapped

if TYPE_CHECKING:
    from pairclip.towers.vision_tower import Head, Trunk, VisionTower


class FeaturePreprocess:
    """Features of one image, of any floating-point type, as float32."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, features: Any) -> Tensor:
        """Check the shape and convert."""
        if not (isinstance(features, Tensor) and features.is_floating_point()):
            raise TypeError(
                "The head of a split tower takes a tensor of the trunk's features, got "
                f"{type(features).__name__}. Compute them once, "
                "`features = cache_features(trunk, dataset, folder)`, and use them as the dataset."
            )
        if tuple(features.shape) != self.shape:
            raise ValueError(
                f"The features of an image must have shape {list(self.shape)}, got "
                f"{list(features.shape)}. Take them from the trunk of the same `tower.split(k)`."
            )
        return features.float()


class Section:
    """Which part of a model: from what block to what block.

    Attributes:
        start: The block that the features enter, 0 for the first; after the last one where it is
            their number. None for all that comes before the blocks too.
        stop: The block that gives no more, so that features come out; None for all that follows.
        grey: How many grey images what is before the part runs on.
    """

    def __init__(self, anatomy: Anatomy, start: int | None, stop: int | None) -> None:
        self.anatomy = anatomy
        self.start = start
        self.stop = stop
        self.grey = 1

    @property
    def blocks(self) -> slice:
        """Those of the model's blocks that are in this part."""
        return slice(self.start, self.stop)

    def holds(self, depth: int) -> bool:
        """Whether what is so deep in the model is in this part."""
        after = len(self.anatomy.names) + 1
        return (
            (-1 if self.start is None else self.start)
            < depth
            <= (after if self.stop is None else self.stop)
        )

    def restrict(self, model: nn.Module) -> Any:
        """The model with only the parameters of this part."""
        row: Any = model.get_submodule(self.anatomy.parent)._modules
        mine = range(len(self.anatomy.names))[self.blocks]
        stands = {
            self.anatomy.path(i): Pass(row[name], self.anatomy.extras)
            for i, name in enumerate(self.anatomy.names)
            if i not in mine
        }
        names: dict[nn.Parameter, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, set()).add(name)
        depths = self.anatomy.depths(name for several in names.values() for name in several)
        for several in names.values():
            if len({self.holds(depths[name]) for name in several}) > 1:
                raise NotImplementedError(
                    f"A {type(model).__name__} can't be split there: blocks on both sides share "
                    f"`{min(several)}`."
                )
        return restricted(model, lambda name: self.holds(depths[name]), stands)

    def run(
        self,
        model: nn.Module,
        encode: Callable[[nn.Module, Tensor], Tensor],
        inputs: Tensor,
        grey: Tensor,
    ) -> Tensor:
        """From pixel values or features to features or embeddings.

        What is before the part runs on a grey image, or none: masks, rotary positions and the
        like, which blocks are given beside the features, come from there.

        Args:
            model: What `restrict` made.
            encode: Function of a model and pixel values that gives embeddings.
            inputs: Pixel values ``[B, 3, H, W]`` if `start` is None, else features ``[B, ...]``.
            grey: Pixel values of so many images.
        """
        if self.start is not None and self.start == self.stop:
            return inputs
        anatomy = self.anatomy
        row: Any = model.get_submodule(anatomy.parent)._modules
        names, extras = anatomy.names, anatomy.extras
        stands: dict[str, Any] = {}
        last, is_head = names[-1], self.stop is None and self.start != len(names)
        if is_head and class_token.is_enough(model, row[last]):
            stands[last] = class_token.ClassToken(row[last], extras)
        if self.start is not None:
            features = inputs.movedim(0, anatomy.batch_dim)
            at = names[min(self.start, len(names) - 1)]
            entrance = Enter if self.start < len(names) else Give
            stands[at] = entrance(stands.get(at, row[at]), extras, features)
            inputs = grey
        if self.stop is not None:
            at = names[min(self.stop, len(names) - 1)]
            stands[at] = Stop(stands.get(at, row[at]), extras, after=self.stop == len(names))
        try:
            return encode(swapped(model, anatomy.parent, stands), inputs)
        except Stopped as stopped:
            return stopped.features.movedim(anatomy.batch_dim, 0)


def split(tower: VisionTower, k: int) -> tuple[Trunk, Head]:
    """Cut as `VisionTower.split` says, and check that the halves compute what the tower does."""
    count = len(tower.blocks)
    k = _checks.check_count("k", k)
    if k > count:
        raise ValueError(f"`k` must be at most {count}, the tower's blocks, got {k}.")
    _check_forwards(tower._bare(), tower._anatomy().parent)
    trunk, head = tower._halves(count - k)
    with torch.no_grad(), evaluating(tower):
        inputs = tower._sample()
        # What is before the head costs nothing on no image, but models may count their images.
        for grey in (0, 1):
            trunk._section.grey = head._section.grey = grey
            why, cause = _difference(tower, trunk, head, inputs)
            if not why:
                return trunk, head
    raise NotImplementedError(f"A {type(tower.model).__name__} can't be split: {why}") from cause


def _difference(
    tower: VisionTower, trunk: Trunk, head: Head, inputs: Tensor
) -> tuple[str, Exception | None]:
    """Why the halves don't compute what the tower does, and the error if there was one."""
    try:
        features = trunk(inputs)
        trunk.embedding_dim = features.shape[-1]
        head.preprocess = FeaturePreprocess(tuple(features.shape[1:]))
        whole, halves = tower(inputs), head(features)
    except (RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        return f"its head can't run on features alone: {error}", error
    if not _same(halves, whole):
        return "its last blocks are given more than what the one before gave.", None
    return "", None


def _check_forwards(model: nn.Module, parent: str) -> None:
    """Refuse a model that would not run the stand-ins in its blocks' places."""
    path = [parent.rsplit(".", i)[0] for i in range(parent.count(".") + 1)] if parent else []
    for part in (model, *map(model.get_submodule, path)):
        if "forward" in vars(part):
            raise NotImplementedError(
                f"The tower's {type(part).__name__} has a `forward` of its own, as offloading "
                "gives it one, which would run all blocks in both halves. Split a tower without it."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two computations of the same embeddings differ by rounding alone."""
    if one.is_meta or one.shape != other.shape:
        return one.shape == other.shape
    exact = one.dtype in (torch.float32, torch.float64)
    tolerance = (1e-4 if exact else 5e-2) * float(other.abs().max())
    return torch.allclose(one, other, rtol=10 * tolerance, atol=tolerance)
