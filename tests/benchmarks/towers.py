"""What works with which image tower: every library's models against everything a tower does.

    pip install -e ".[bench,lora,open-clip,timm,onnx]"
    python tests/benchmarks/towers.py                     # the table, as Markdown
    python tests/benchmarks/towers.py --only timm:resnet  # rows whose name contains this
    python tests/benchmarks/towers.py --check             # exit with 1 if a cell has a raw error

Random weights, no network. Models are as small as their classes allow. A cell is `yes`, or the
first words of what pairclip says; a traceback in a cell is a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pairclip import AllPairsCosineLoss, Finetuner, ImageIndex, embed_images, load_tower
from pairclip.features import cache_features
from pairclip.towers import layer_decay

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), dtype=np.uint8)
LABELS = [0, 0, 0, 0, 1, 1, 1, 1]
PHOTO = Image.fromarray(IMAGES[0]).resize((90, 70))

# --- models ---------------------------------------------------------------------------------

_CLIP = {"layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
OPEN_CLIP = {
    "ViT": _CLIP,
    "ViT, quick GELU": _CLIP,
    "ViT, average pool": {**_CLIP, "pool_type": "avg"},
    "ViT, no norm before": {
        **_CLIP,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
    },
    "ViT, sine positions": {**_CLIP, "pos_embed_type": "sin_cos_2d"},
    "CoCa": {**_CLIP, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "ViT, layer scale": {**_CLIP, "ls_init_value": 0.1},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None},
    "timm ViT (SigLIP)": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
        "timm_proj": "linear",
    },
    "timm ConvNeXt": {
        "timm_model_name": "convnext_atto",
        "timm_pool": "",
        "timm_proj": "linear",
    },
    "timm ResNet": {"timm_model_name": "resnet18", "timm_pool": "", "timm_proj": "linear"},
    "timm EVA": {
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_pool": "token",
        "timm_proj": "linear",
    },
}
TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convnext_atto",
    "convnextv2_atto",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "densenet121",
    "efficientnet_lite0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "ghostnet_050",
    "hgnetv2_b0",
    "levit_128s",
    "maxvit_pico_rw_256",
    "mobilenetv3_small_050",
    "mobileone_s0",
    "mixer_s32_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repvit_m0_9",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "xcit_nano_12_p16_224",
]
# What makes the large ones small enough to try.
TIMM_SMALLER = {
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64},
    "cait_xxs24_224": {"depth": 3, "img_size": 64},
    "deit3_small_patch16_224": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64},
    "deit_tiny_patch16_224": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64},
    "eva02_tiny_patch14_224": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 56},
    "vit_tiny_patch16_224": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64},
    "vit_base_patch16_siglip_224": {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64},
    "xcit_nano_12_p16_224": {"depth": 3},
}
_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "image_size": 32}
_VIT |= {"num_attention_heads": 2, "patch_size": 8}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIPVisionModelWithProjection", {**_VIT, "projection_dim": 12}),
    "CLIP, no projection": ("CLIPVisionModel", _VIT),
    "SigLIP": ("SiglipVisionModel", _VIT),
    "MetaCLIP 2": ("MetaClip2VisionModelWithProjection", {**_VIT, "projection_dim": 12}),
    "ChineseCLIP": ("ChineseCLIPVisionModel", _VIT),
    "AltCLIP": ("AltCLIPVisionModel", _VIT),
    "AIMv2": ("Aimv2VisionModel", {**_VIT, "use_head": True}),
    "DINOv2": ("Dinov2Model", {**_VIT, "mlp_ratio": 2}),
    "DINOv2, registers": ("Dinov2WithRegistersModel", {**_VIT, "mlp_ratio": 2}),
    "DINOv3": ("DINOv3ViTModel", {**_VIT, "num_register_tokens": 2}),
    "ViT": ("ViTModel", _VIT),
    "DeiT": ("DeiTModel", _VIT),
    "BEiT": ("BeitModel", {**_VIT, "use_mean_pooling": True}),
    "ConvNeXt": ("ConvNextModel", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}),
    "Swin": (
        "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "window_size": 4}
        | {"num_heads": [2, 4]},
    ),
    "ResNet": ("ResNetModel", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}),
}


def open_clip_model(name: str, folder: Path) -> Path:
    """A folder as `open_clip` writes one."""
    import json

    from open_clip import CLIP
    from safetensors.torch import save_file

    size = 224 if "timm" in name else 64  # open_clip makes those of timm at their own size
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": size, **OPEN_CLIP[name]},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    if "quick" in name:
        model_cfg["quick_gelu"] = True
    model = CLIP(
        model_cfg["embed_dim"],
        model_cfg["vision_cfg"],
        model_cfg["text_cfg"],
        quick_gelu="quick" in name,
    )
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {n: v.clone() for n, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def timm_model(name: str) -> Any:
    import timm

    return timm.create_model(name, num_classes=0, **TIMM_SMALLER.get(name, {})).eval()


def transformers_model(name: str) -> tuple[Any, Any]:
    import transformers

    kind, settings = TRANSFORMERS[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    side = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=side)
    return model, processor


# --- cells ----------------------------------------------------------------------------------


class Trial:
    """One model, and what is asked of it."""

    def __init__(self, name: str, root: Path) -> None:
        self.library, self.model_name = name.split(":")
        self.root = root
        self.fresh = 0
        self.source: Any = None

    def load(self) -> Any:
        """A tower with the same weights in every call."""
        torch.manual_seed(0)
        if self.library == "open_clip":
            folder = self.root / "model"
            if not folder.exists():
                open_clip_model(self.model_name, folder)
            return load_tower(folder)
        if self.library == "timm":
            return load_tower(timm_model(self.model_name))
        model, processor = transformers_model(self.model_name)
        return load_tower(model, image_processor=processor)

    def cell_load(self) -> None:
        self.tower = self.load()

    def cell_preprocess(self) -> None:
        if self.library == "open_clip":
            import open_clip

            _, _, expected = open_clip.create_model_and_transforms(
                f"local-dir:{self.root / 'model'}", load_weights=False
            )
            assert torch.equal(self.tower.preprocess(PHOTO), expected(PHOTO))
        elif self.library == "timm":
            import timm

            config = timm.data.resolve_data_config(self.tower.data_config)
            expected = timm.data.create_transform(**config, is_training=False)
            assert torch.equal(self.tower.preprocess(PHOTO), expected(PHOTO))
        else:
            _, processor = transformers_model(self.model_name)
            expected = processor(images=PHOTO, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(self.tower.preprocess(PHOTO), expected)

    def cell_embed(self) -> None:
        embeddings = embed_images(self.tower, IMAGES)
        assert embeddings.shape == (8, self.tower.embedding_dim)
        assert bool(embeddings.isfinite().all())
        self.embeddings = embeddings

    def cell_fit(self) -> None:
        tower = self.load()
        before = [p.clone() for p in tower.parameters()]
        _fit(tower, (IMAGES, LABELS))
        assert any(not torch.equal(p, q) for p, q in zip(before, tower.parameters(), strict=True))

    def cell_freeze(self) -> None:
        tower = self.load()
        trainable, total = tower.freeze(all_but_last=1)
        assert 0 < trainable < total

    def cell_split(self) -> None:
        tower = self.load()
        trunk, head = tower.split(1)
        features = cache_features(
            trunk, (IMAGES, LABELS), self.root / "features", dtype=torch.float32
        )
        apart = (embed_images(head, features) - embed_images(tower, IMAGES)).abs().max()
        assert apart <= 1e-5 * max(1.0, float(self.embeddings.abs().max())), f"apart by {apart}"
        _fit(head, features)

    def cell_layer_decay(self) -> None:
        groups = layer_decay(self.load(), 1e-3, 0.7)
        assert len({group["lr"] for group in groups}) > 1

    def cell_lora(self) -> None:
        import peft

        tower = self.load()
        block = tower.blocks[-1]
        prefix = next(name for name, part in tower.named_modules() if part is block)
        wanted = [
            f"{prefix}.{name}"
            for name, part in block.named_modules()
            if type(part) is torch.nn.Linear or _is_plain_convolution(part)
        ]
        if not wanted:
            raise NotImplementedError("no linear map in the last block")
        config = peft.LoraConfig(r=2, target_modules=wanted)
        wrapped = peft.get_peft_model(tower, config)
        _fit(wrapped, (IMAGES, LABELS))
        embeddings = embed_images(wrapped, IMAGES)
        folder = self.root / "lora"
        tower.save_pretrained(folder)
        _close(embed_images(load_tower(folder), IMAGES), embeddings, 1e-4)

    def cell_size(self) -> None:
        side = self.tower.image_size
        patch = 14 if side % 14 == 0 else 32
        if self.library == "open_clip":
            other = load_tower(self.root / "model", image_size=side + patch)
        elif self.library == "timm":
            other = load_tower(timm_model(self.model_name), image_size=side + patch)
        else:
            model, processor = transformers_model(self.model_name)
            other = load_tower(model, image_processor=processor, image_size=side + patch)
        assert other.image_size == side + patch
        embed_images(other, IMAGES)

    def cell_save(self) -> None:
        folder = self.root / "saved"
        self.tower.save_pretrained(folder)
        again = load_tower(folder)
        _close(embed_images(again, IMAGES), self.embeddings, 1e-6)
        assert again.fingerprint() == self.tower.fingerprint()
        pixels = torch.stack([self.tower.preprocess(PHOTO)])
        with torch.no_grad():
            _close(self._in_its_library(folder, pixels), self.tower(pixels), 1e-6)

    def _in_its_library(self, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
        if self.library == "open_clip":
            import open_clip

            model = open_clip.create_model(f"local-dir:{folder}").eval()
            output = model.visual(pixels)
            return output[0] if isinstance(output, tuple) else output
        if self.library == "timm":
            import timm

            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)
        import transformers

        kind = getattr(transformers, TRANSFORMERS[self.model_name][0])
        output = kind.from_pretrained(folder).eval()(pixel_values=pixels)
        return output.get("image_embeds", output.get("pooler_output")).flatten(1)

    def cell_index(self) -> None:
        index = ImageIndex.build(self.tower, IMAGES)
        index.save(self.root / "index")
        ImageIndex.load(self.root / "index", self.tower)

    def cell_onnx(self) -> None:
        self.tower.export_onnx(self.root / "tower.onnx")


COLUMNS = [
    *("load", "preprocess", "embed", "fit", "freeze", "split", "layer_decay", "lora", "size"),
    *("save", "index", "onnx"),
]


def _is_plain_convolution(part: Any) -> bool:
    return type(part) is torch.nn.Conv2d and part.groups == 1


def _fit(tower: Any, data: Any) -> None:
    loss = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)
    Finetuner(tower, loss, learning_rate=1e-4).fit(data, batch_size=8, max_steps=2)


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    apart = float((a - b).abs().max())
    assert apart <= tolerance * max(1.0, float(b.abs().max())), f"apart by {apart:.1e}"


def row(name: str) -> list[str]:
    """The cells of one model."""
    cells = []
    with tempfile.TemporaryDirectory() as root:
        trial = Trial(name, Path(root))
        for column in COLUMNS:
            cells.append(_cell(getattr(trial, f"cell_{column}")))
            if column == "load" and cells[0] != "yes":
                return cells + ["-"] * (len(COLUMNS) - 1)
    return cells


def _cell(ask: Callable[[], None]) -> str:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            ask()
        except (NotImplementedError, ValueError) as error:
            return f"says: {' '.join(str(error).split())[:90]}"
        except Exception as error:
            return f"ERROR {type(error).__name__}: {' '.join(str(error).split())[:90]}"
    return "yes"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--check", action="store_true", help="fail if a cell has a raw error")
    options = parser.parse_args()
    names = [
        *(f"open_clip:{name}" for name in OPEN_CLIP),
        *(f"timm:{name}" for name in TIMM),
        *(f"transformers:{name}" for name in TRANSFORMERS),
    ]
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    works = total = raw = 0
    words: dict[str, str] = {}
    for name in names:
        if options.only not in name:
            continue
        shown = []
        for column, cell in zip(COLUMNS, row(name), strict=True):
            total, works, raw = total + 1, works + (cell == "yes"), raw + cell.startswith("ERROR")
            shown.append({"yes": "yes", "-": "-"}.get(cell, "no"))
            if cell not in ("yes", "-"):
                words[f"{name}, {column}"] = cell
        print(f"| {name} | {' | '.join(shown)} |", flush=True)
    print(f"\n{works} of {total} cells work, {raw} raise something else than words.\n")
    for place, cell in words.items():
        print(f"- {place}: {cell}")
    return int(options.check and raw > 0)


if __name__ == "__main__":
    sys.exit(main())
