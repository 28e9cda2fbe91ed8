"""A model whose parts are known, with what identifies it and the forms in which it is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pairclip._files import bytes_of
from pairclip.towers import adapters
from pairclip.towers.anatomy import Anatomy, examine
from pairclip.towers.export import export_onnx
from pairclip.towers.measuring import like
from pairclip.towers.modes import evaluating
from pairclip.towers.module_settings import settings_of
from pairclip.towers.preprocess import described
from pairclip.towers.saving import save


class Body(nn.Module):
    """An image encoder with the preprocessing of its images, which together decide an embedding.

    Attributes:
        model: What encodes.
        preprocess: From one PIL image to pixel values.
        embedding_dim: Size of an embedding.
        image_size: Height and width, in pixels, of the images that it takes.
        origin: Folder that it was loaded from.
    """

    origin: Path | None = None

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        *,
        embedding_dim: int,
        image_size: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.embedding_dim = embedding_dim
        self.image_size = image_size
        self.training = model.training

    @staticmethod
    def _encode(model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Embeddings of a model of this kind."""
        embeddings: Tensor = model(pixel_values)
        return embeddings

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order; NotImplementedError if the model has no row of them."""
        known = self._anatomy()
        row: Any = self._bare().get_submodule(known.parent)._modules
        return [row[name] for name in known.names]

    def _bare(self) -> nn.Module:
        """The model itself, where PEFT or `torch.compile` wrapped it; adapters are still inside."""
        model: nn.Module = adapters.uncompiled(self.model)
        return model

    def _anatomy(self) -> Anatomy:
        model = self._bare()
        known: Anatomy | None = self.__dict__.get("_known")
        if known is None or not known.fits(model):
            # What a gradient reaches is asked, in whatever mode the tower is at this moment.
            device = like(model).device.type
            has_autocast = torch.amp.is_autocast_available(device)  # not so "meta"
            autocast_off = torch.autocast(device, enabled=False) if has_autocast else nullcontext()
            with torch.inference_mode(False), autocast_off:
                plain = adapters.merged(model)
                with evaluating(plain):
                    known = examine(plain, self._encode, self._grey(2))
            self._known = known
        return known

    def _grey(self, count: int) -> Tensor:
        """Pixel values of grey images, of the model's type, where the model is."""
        return like(self.model).new_zeros(count, 3, self.image_size, self.image_size)

    def _depths(self) -> dict[str, int]:
        """How deep each parameter is: 0 before the blocks, i in block i from 1, then one more."""
        bare = dict(self._bare().named_parameters())
        depths = self._anatomy().depths(bare)
        of = {parameter: depths[name] for name, parameter in bare.items()}
        return {name: of[parameter] for name, parameter in self.named_parameters()}

    def _no_decay(self) -> set[str]:
        """Parameters to which their library gives no weight decay, such as position embeddings."""
        return {
            f"model.{path}.{name}".replace("..", ".")
            for path, part in self._bare().named_modules()
            if callable(declared := getattr(part, "no_weight_decay", None))
            for name in declared()
        }

    def _projection(self) -> list[nn.Parameter]:
        """Parameters of the linear map that comes last, or a ValueError that says what does."""
        return self._anatomy().projections(self._bare())

    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding: weights, settings and preprocessing.

        The same in every process, on every device and after `save_pretrained` and `load_tower`
        (which loads in float32). Adapters of PEFT count as merged. A plain transform is known by
        its ``repr``.

        Returns:
            64 hexadecimal digits.

        Example:
            >>> from torch import nn
            >>> from torchvision import transforms
            >>> from pairclip import load_tower
            >>> tower = load_tower(nn.Flatten(), image_processor=transforms.ToTensor())
            >>> len(tower.fingerprint())
            64
        """
        digest = hashlib.sha256(self.settings().encode())
        for name, value in sorted(self._merged_weights().items()):
            digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(bytes_of(value))
        return digest.hexdigest()

    def _merged_weights(self) -> dict[str, Tensor]:
        """What `save_pretrained` writes: plain names, with adapters of PEFT merged."""
        return {
            self._saved_name(name): value
            for name, value in adapters.merged(self.model).state_dict().items()
        }

    def _saved_name(self, name: str) -> str:
        """What `save_pretrained` calls a weight of the model."""
        return name

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that the model's own library and `load_tower` load again.

        A model card, ``README.md``, says how, unless there is one. The projection of a CLIP tower
        is lost by `AutoModel`, which has no class for it: `CLIPVisionModelWithProjection` has.

        Adapters of PEFT are merged into the weights that are written; the tower keeps them. The
        folder is there whole or not at all. In one that exists, files of the same name are
        replaced and others stay. `load_tower` verifies the files by ``pairclip_checksums.json``,
        which no other library reads; who changes one by hand deletes it. Where a library will
        preprocess images otherwise than the tower, which has an `image_processor` of your own, a
        warning says so.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            FileExistsError: If `folder` is a file.
            OSError: If it can't be written; an older model is then as it was.
            NotImplementedError: If no library loads such a model again.
        """
        save(self, folder)

    def _write(self, folder: Path) -> None:
        """Write the model and what preprocesses its images into an empty folder."""
        raise NotImplementedError(
            f"A tower around {type(self.model).__name__} has no `save_pretrained`: towers of "
            "transformers, open_clip and timm have it. Save this one with "
            "`safetensors.torch.save_model(tower, path)`."
        )

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        images: Sequence[Image.Image] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Write an ONNX file from pixel values ``[B, 3, H, W]`` to embeddings ``[B, D]``, B free.

        Beside it, in JSON, is its checksum, how an image is preprocessed and how well onnxruntime
        agrees with the tower. Needs the extra ``onnx``.

        Args:
            path: File to write, which ends with ``.onnx``.
            images: On which they are compared; None takes three of noise.
            dtype: ``torch.float32`` or ``torch.float16`` of the weights; in and out is float32.

        Returns:
            What is in the JSON.

        Raises:
            ValueError: If the embeddings differ by more than 1e-4 of the largest value (2e-2 where
                the file or the tower is in half precision): nothing is written then.
            NotImplementedError: If the model can't be traced, or onnxruntime can't open what came
                of it in float16.
            ImportError: If onnx or onnxruntime is not installed.
            OSError: If a file can't be written.
        """
        return export_onnx(self, path, images=images, dtype=dtype)

    def settings(self) -> str:
        """What decides an embedding beside the weights."""
        return self._model_settings() + described(self.preprocess)

    def _model_settings(self) -> str:
        return f"{settings_of(adapters.merged(self._bare()))}\n"
