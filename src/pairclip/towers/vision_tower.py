"""What every image tower offers, whatever model is inside."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pairclip.towers import adapters, freezing
from pairclip.towers.body import Body
from pairclip.towers.measuring import like, measure
from pairclip.towers.modes import evaluating
from pairclip.towers.preprocess import Preprocess
from pairclip.towers.splitting import Section, split


class VisionTower(Body):
    """An image encoder together with the preprocessing that it was trained with.

    Made by `load_tower`. Calling it takes pixel values ``[B, 3, H, W]`` and gives embeddings
    ``[B, D]``, not normalised.

    With PEFT, ``peft.get_peft_model(tower, config)`` puts adapters into this very tower, whose
    `save_pretrained` and `fingerprint` then see the merged weights.

    Attributes:
        preprocess: Callable from one PIL image, of any mode and size, to float pixel values
            ``[3, image_size, image_size]``.
        embedding_dim: Size ``D`` of an embedding.
        image_size: Height and width, in pixels, of the images that the model takes.

    Example:
        >>> from PIL import Image
        >>> from torch import nn
        >>> from torchvision import transforms
        >>> from pairclip import load_tower
        >>> resize = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
        >>> tower = load_tower(nn.Flatten(), image_processor=resize)
        >>> tower.image_size, tower.embedding_dim
        (8, 192)
        >>> tower.preprocess(Image.new("L", (40, 30))).shape
        torch.Size([3, 8, 8])
    """

    @classmethod
    def _around(cls, model: nn.Module, transform: Any) -> Any:
        """A tower of this class around a model, measured by running it."""
        preprocess = Preprocess(transform)
        embedding_dim, image_size = measure(model, preprocess, cls._encode)
        return cls(model, preprocess, embedding_dim=embedding_dim, image_size=image_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode ``[B, 3, H, W]``, as `preprocess` makes them, into ``[B, D]``."""
        return self._encode(self.model, pixel_values)

    def freeze(
        self,
        names: str | Sequence[str] | None = None,
        *,
        all_but_last: int | None = None,
        all_but: str | Sequence[str] | None = None,
    ) -> tuple[int, int]:
        """Choose which parameters train, and print how many do. Give one of the three.

        Where PEFT put adapters in, nothing is unfrozen: the weights that it froze stay frozen,
        and adapters outside the choice are frozen too.

        Args:
            names: Parameters to freeze; all others stay as they are. A name as in
                ``tower.named_parameters()``, that of a module with all within it, a pattern such
                as ``"*.bias"`` (`fnmatch`), or ``"projection"``; or several.
            all_but_last: Only the last so many blocks, and what comes after them (a norm, and
                the projection or pooling head), train. With 0, only what comes after.
            all_but: Only these train, named as in `names`.

        Returns:
            The numbers of trainable and of all parameters.

        Raises:
            ValueError: If not exactly one is given, `all_but_last` is more than there are
                blocks, or a name matches nothing; the nearest names are listed.
            NotImplementedError: For `all_but_last` or ``"projection"`` of a tower without blocks.

        Example:
            >>> from pairclip.towers import random_tower
            >>> tower = random_tower(depth=3)
            >>> tower.freeze(all_but_last=1)
            Trainable: 8,992 of 32,480 parameters (27.7 %), 1 of 3 blocks.
            (8992, 32480)
            >>> tower.freeze(all_but="projection")
            Trainable: 384 of 32,480 parameters (1.2 %), 0 of 3 blocks.
            (384, 32480)
        """
        freezing.freeze(self, names, all_but_last=all_but_last, all_but=all_but)
        return freezing.say_what_trains(self)

    def split(self, k: int) -> tuple[VisionTower, VisionTower]:
        """Cut into a trunk, up to the last `k` blocks, and a head: those blocks and what follows.

        Both share this tower's modules: training the head trains the tower. The trunk's features
        can be computed once, by `pairclip.cache_features`, and the head be trained on them.
        Put adapters of PEFT into the tower before, not into its parts.

        Args:
            k: Blocks of the head, from 0 to all.

        Returns:
            The trunk, from pixel values ``[B, 3, H, W]`` to features ``[B, ...]`` (of a vision
            transformer ``[B, T, H]``: T tokens of hidden size H), without gradient and always in
            evaluation mode; and the head, from features to embeddings ``[B, D]``, whose
            ``preprocess`` takes features of one image. Save the tower, not its parts.

        Raises:
            ValueError: If `k` is more than there are blocks.
            NotImplementedError: If the head can't compute from features alone what the tower
                does, or the model has another `forward` than its class.

        Example:
            >>> import torch
            >>> from pairclip.towers import random_tower
            >>> tower = random_tower(depth=3)
            >>> trunk, head = tower.split(1)
            >>> pixels = torch.rand(2, 3, 16, 16)
            >>> trunk(pixels).shape
            torch.Size([2, 5, 32])
            >>> torch.allclose(head(trunk(pixels)), tower(pixels), atol=1e-6)
            True
        """
        return split(self, k)

    def _halves(self, cut: int) -> tuple[Trunk, Head]:
        anatomy = self._anatomy()
        return Trunk(self, Section(anatomy, None, cut)), Head(self, Section(anatomy, cut, None))

    def _sample(self) -> Tensor:
        """What the tower takes, of two images that are no plain grey."""
        noise = torch.rand(
            self._grey(2).shape, generator=torch.Generator().manual_seed(0), device="cpu"
        )
        return noise.to(self._grey(1))


class _Half(VisionTower):
    """A part of a tower, whose modules it shares."""

    def __init__(self, whole: VisionTower, section: Section) -> None:
        super().__init__(
            section.restrict(whole._bare()),
            whole.preprocess,
            embedding_dim=whole.embedding_dim,
            image_size=whole.image_size,
        )
        self._encode = whole._encode  # type: ignore[method-assign]
        self._saved_name = whole._saved_name  # type: ignore[method-assign]
        self._whole = (whole,)  # in a tuple, for it is no part of this part
        self._section = section
        self._known = section.anatomy

    def _run(self, inputs: Tensor) -> Tensor:
        grey = self._grey(self._section.grey)
        return self._section.run(self.model, self._encode, inputs, grey)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of this part, in order."""
        return super().blocks[self._section.blocks]

    def _depths(self) -> dict[str, int]:
        first = self._section.start or 0
        return {name: depth - first for name, depth in super()._depths().items()}

    def _merged_weights(self) -> dict[str, Tensor]:
        weights = adapters.merged(self._whole[0]._bare()).state_dict()
        depths = self._known.depths(weights)
        return {
            self._saved_name(name): value
            for name, value in weights.items()
            if self._section.holds(depths[name])
        }

    def _model_settings(self) -> str:
        return self._whole[0]._model_settings()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Half:
        """Move or convert all of the tower: its parts share modules, so they belong together."""
        whole: Any = self._whole[0]
        whole._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> NoReturn:
        """Refuse: it would not be a model that a library knows."""
        self._refuse("saved", "tower.save_pretrained(folder)")

    def export_onnx(self, path: str | os.PathLike[str], **_: Any) -> NoReturn:
        """Refuse: it would not be the whole way from pixel values to embeddings."""
        self._refuse("exported", "tower.export_onnx(path)")

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise NotImplementedError(
            f"A {type(self).__name__.lower()} is a part of a tower and isn't {what} alone. Use the "
            f"tower that was split, `{instead}`: training the head trains it."
        )


class Trunk(_Half):
    """What comes before the last blocks: pixel values to features, never trained."""

    def __init__(self, whole: VisionTower, section: Section) -> None:
        super().__init__(whole, section)
        self.training = False  # its modules are the tower's, and keep their mode

    def forward(self, inputs: Tensor) -> Tensor:
        """Encode pixel values ``[B, 3, H, W]`` into features ``[B, ...]``."""
        with torch.no_grad(), evaluating(self):
            return self._run(inputs)


class Head(_Half):
    """The last blocks and what comes after them: features to embeddings."""

    def __init__(self, whole: VisionTower, section: Section) -> None:
        super().__init__(whole, section)
        mine = set(self.modules())
        self._others = [module for module in whole._bare().modules() if module not in mine]

    def forward(self, features: Tensor) -> Tensor:
        """Embed features ``[B, ...]``, of any floating-point type, into ``[B, D]``."""
        # What is before the blocks may run on a grey image, of which a batch norm must not learn.
        with evaluating(*self._others, deeply=False):
            return self._run(features.to(like(self._whole[0]).dtype))

    def _halves(self, cut: int) -> tuple[Trunk, Head]:
        """Of the head of a tower that was split before."""
        first, anatomy, (whole,) = self._section.start or 0, self._section.anatomy, self._whole
        middle = Trunk(whole, Section(anatomy, first, first + cut))
        middle.preprocess = self.preprocess
        return middle, Head(whole, Section(anatomy, first + cut, None))

    def _sample(self) -> Tensor:
        (whole,), first = self._whole, self._section.start
        features: Tensor = Trunk(whole, Section(self._known, None, first))(whole._sample())
        return features


def check_embeds(tower: object) -> None:
    """Raise a TypeError unless this is a tower, one with adapters, or a part of a split one."""
    if not hasattr(tower, "preprocess"):
        tower_of(tower)


def tower_of(model: object) -> VisionTower:
    """The tower itself, or the one inside what `peft.get_peft_model` made of it."""
    tower = adapters.without_wrapper(model)
    if not isinstance(tower, VisionTower):
        raise TypeError(
            f"`tower` must be a VisionTower, got {type(tower).__name__}. "
            "`pairclip.load_tower` makes one of any module."
        )
    return tower
