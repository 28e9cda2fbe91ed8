"""A tower as an ONNX file, with a proof that it computes the same."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

from pairclip._files import whole_file, write_json
from pairclip.towers import adapters
from pairclip.towers.measuring import like
from pairclip.towers.modes import evaluating
from pairclip.towers.optional import needs
from pairclip.towers.preprocess import described, noise_image

if TYPE_CHECKING:
    from pairclip.towers.body import Body

_DTYPES = (torch.float32, torch.float16)
# How far embeddings may be apart, as a share of the largest value.
_EXACT, _HALF = 1e-4, 2e-2
_OPSET = 18
_PROVIDERS = ["CPUExecutionProvider"]
_OPEN = f"""
import sys, onnxruntime
onnxruntime.InferenceSession(sys.stdin.buffer.read(), providers={_PROVIDERS})
"""


class _Encoder(nn.Module):
    """The tower as one module from pixel values to embeddings of float32."""

    def __init__(self, tower: Body, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = adapters.merged(tower.model)
        self._encode, self._dtype = tower._encode, dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._encode(self.model, pixel_values.to(self._dtype)).float()


def export_onnx(
    tower: Body,
    path: str | os.PathLike[str],
    *,
    images: Sequence[Image.Image] | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write as `VisionTower.export_onnx` says."""
    needs("onnx", "onnx")
    needs("onnxruntime", "onnx")
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be torch.float32 or torch.float16, got {dtype}.")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"`path` must end with .onnx, got '{path}'.")
    side = tower.image_size
    images = images or [noise_image(side, side, seed=seed) for seed in range(3)]
    pixels = torch.stack([tower.preprocess(image) for image in images])
    with torch.no_grad(), evaluating(tower):
        expected = tower(pixels.to(like(tower))).float().cpu()
    content = _graph(tower, pixels, dtype)
    if dtype == torch.float16:
        check_opens(content, type(tower.model).__name__)
    embeddings = _run(content, pixels)
    apart = float((embeddings - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    is_half = torch.finfo(dtype).bits == 16 or torch.finfo(like(tower).dtype).bits == 16
    tolerance = _HALF if is_half else _EXACT
    if not apart <= tolerance:
        raise ValueError(
            f"The exported model's embeddings are {apart:.2g} of the largest value away from the "
            f"tower's, more than {tolerance:g}, so no file was written."
            + " Export in torch.float32."
            * (dtype == torch.float16)
        )
    report = {
        "format": "pairclip onnx 1",
        "input": {
            "name": "pixel_values",
            "shape": ["batch", 3, *[tower.image_size] * 2],
        },
        "output": {"name": "embeddings", "shape": ["batch", tower.embedding_dim]},
        "preprocessing": described(tower.preprocess),
        "fingerprint": tower.fingerprint(),
        "dtype": str(dtype).removeprefix("torch."),
        "parity": {"images": len(pixels), "largest_difference": apart},
        "sha256": hashlib.sha256(content).hexdigest(),  # tells the JSON of another file
    }
    with whole_file(path) as file:
        file.write(content)
    write_json(path.with_suffix(".json"), report, indent=2)
    print(f"'{path}': embeddings of {len(pixels)} images differ by at most {apart:.1e}.")
    return report


def _graph(tower: Body, pixels: Tensor, dtype: torch.dtype) -> bytes:
    encoder: Any = _Encoder(tower, dtype)
    if dtype != torch.float32 or any(p.dtype != dtype for p in encoder.parameters()):
        encoder = copy.deepcopy(encoder).to(dtype)
    buffer: Any = io.BytesIO()
    try:
        with (
            evaluating(encoder),
            torch.no_grad(),
            like(encoder).device,
            _traceable(),
            contextlib.redirect_stdout(io.StringIO()),  # the graph around what can't be exported
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of shapes that the tracer takes as constants
            torch.onnx.export(
                encoder,
                (pixels.to(like(encoder).device),),
                buffer,
                input_names=["pixel_values"],
                output_names=["embeddings"],
                dynamic_axes={"pixel_values": {0: "batch"}, "embeddings": {0: "batch"}},
                opset_version=_OPSET,
                dynamo=False,
            )
    except (OnnxExporterError, RuntimeError) as error:
        raise NotImplementedError(
            f"A {type(tower.model).__name__} can't be exported to ONNX: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    content: bytes = buffer.getvalue()
    return content


@contextmanager
def _traceable() -> Iterator[None]:
    """Attention of torch as plain operators, which ONNX has."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def check_opens(content: bytes, model: str) -> None:
    """Raise if onnxruntime crashes, as its optimizer does with some models in half precision."""
    process = subprocess.run([sys.executable, "-c", _OPEN], input=content, capture_output=True)
    if process.returncode:
        import onnxruntime

        raise NotImplementedError(
            f"onnxruntime {onnxruntime.__version__} can't open a {model} in float16 (exit status "
            f"{process.returncode}), so no file was written. Export in torch.float32."
        )


def _run(content: bytes, pixels: Tensor) -> Tensor:
    """Embeddings by onnxruntime: of all images at once, and of one, which a fixed batch refuses."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=_PROVIDERS)
    values = pixels.float().numpy()
    session.run(None, {"pixel_values": values[:1]})
    return torch.from_numpy(session.run(None, {"pixel_values": values})[0])
