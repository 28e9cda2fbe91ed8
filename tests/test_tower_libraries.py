"""Towers of open_clip, timm, sentence-transformers and other models of transformers."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torchvision import transforms
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LevitConfig,
    LevitModel,
    MetaClip2VisionConfig,
    MetaClip2VisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from pairclip import (
    AllPairsCosineLoss,
    Callback,
    Finetuner,
    ImageIndex,
    VisionTower,
    evaluate,
    load_tower,
    write_report,
)
from pairclip.checkpoints import trained_tensors
from pairclip.towers import export, layer_decay, model_card, random_tower, whole_model
from pairclip.towers.preprocess import at_size

VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
NOISE = np.random.default_rng(0).integers(0, 256, (41, 50, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)


def shaken(model: nn.Module) -> nn.Module:
    """Weights that are large enough to show a block that is missing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def processor() -> CLIPImageProcessor:
    """As DINOv2 has it: a crop of a larger image."""
    return CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})


@pytest.mark.parametrize("kind", [ViTModel, Dinov2Model, MetaClip2VisionModelWithProjection])
def test_other_models_of_transformers_are_whole_towers(kind: type, tmp_path: Path) -> None:
    config = {
        ViTModel: lambda: ViTConfig(**VIT),
        Dinov2Model: lambda: Dinov2Config(**VIT, mlp_ratio=2),
        MetaClip2VisionModelWithProjection: lambda: MetaClip2VisionConfig(**VIT, projection_dim=12),
    }[kind]()
    model = shaken(kind(config))
    tower = load_tower(model, image_processor=processor())
    with torch.no_grad():
        output = model(pixel_values=pixels())
        expected = output["image_embeds" if "image_embeds" in output else "pooler_output"]
        assert_close(tower(pixels()), expected)
    assert len(tower.blocks) == 3
    trunk, head = tower.split(1)
    assert_close(head(trunk(pixels())), tower(pixels()), rtol=0, atol=1e-5)
    tower.freeze(all_but_last=1)
    assert {group["name"].split(",")[0] for group in layer_decay(tower, 1e-3, 0.5)} == {
        "block 3",
        "after",
    }
    tower.save_pretrained(tmp_path / "saved")
    again = load_tower(tmp_path / "saved")
    assert_close(again(pixels()), expected, rtol=0, atol=1e-6)
    assert again.fingerprint() == tower.fingerprint()
    larger = load_tower(model, image_processor=processor(), image_size=48)
    assert larger.preprocess(PHOTO).shape == (3, 48, 48)
    assert larger(pixels(48)).shape == expected.shape


def test_a_processor_at_another_size_resizes_by_the_same_factor() -> None:
    settings = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    larger = at_size(CLIPImageProcessor(**settings), 448)
    assert (larger.size["shortest_edge"], larger.crop_size["height"]) == (512, 448)


def test_sentence_transformers_gives_the_same_embedding_from_a_saved_tower(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    tower = random_tower()
    shaken(tower.model)
    tower.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tower(tower.preprocess(PHOTO)[None])[0]
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert_close(torch.tensor(model.encode(PHOTO)), expected, rtol=0, atol=1e-5)
    model.save(str(tmp_path / "again"))
    for source in (model, tmp_path / "again"):
        with pytest.raises(ValueError, match=r"is followed by Dense, .* Give the folder or id"):
            load_tower(source)
    assert_close(load_tower(tmp_path).preprocess(PHOTO), tower.preprocess(PHOTO))


def test_a_sentence_transformer_of_no_images_is_refused() -> None:
    library = pytest.importorskip("sentence_transformers")

    class Words(nn.Module):
        """As those whose first module is a table of words."""

    model = library.SentenceTransformer(modules=[Words()], device="cpu")
    with pytest.raises(ValueError, match="begins with a Words, so it has no image model"):
        load_tower(model)


def open_clip_folder(folder: Path) -> Path:
    open_clip = pytest.importorskip("open_clip")
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32}
        | {"patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    model = shaken(open_clip.CLIP(**model_cfg))
    folder.mkdir()
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def test_a_folder_of_open_clip_in_and_out(tmp_path: Path) -> None:
    folder = open_clip_folder(tmp_path / "model")
    import open_clip

    tower = load_tower(folder)
    whole, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert torch.equal(tower.preprocess(PHOTO), transform(PHOTO))
    with torch.no_grad():
        assert_close(tower(pixels()), whole.eval().encode_image(pixels()), rtol=0, atol=1e-6)
        assert_close(load_tower(whole.visual)(pixels()), tower(pixels()))
    tower.freeze(all_but="projection")
    assert [n for n, p in tower.named_parameters() if p.requires_grad] == ["model.proj"]
    trunk, head = tower.split(2)
    assert_close(head(trunk(pixels())), tower(pixels()), rtol=0, atol=1e-5)
    undecayed = [g for g in layer_decay(load_tower(folder), 1e-3, 0.5, weight_decay=0.1)]
    assert undecayed
    with torch.no_grad():
        tower.model.proj.mul_(2)
    tower.save_pretrained(tmp_path / "saved")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").eval()
    with torch.no_grad():
        assert_close(again.visual(pixels()), tower(pixels()), rtol=0, atol=1e-6)
    texts = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        assert_close(again.encode_text(texts), whole.encode_text(texts))
    assert load_tower(folder, image_size=48)(pixels(48)).shape == (4, 16)
    with pytest.raises(NotImplementedError, match="loads no image tower without its texts"):
        load_tower(whole.visual).save_pretrained(tmp_path / "other")


def test_a_model_of_open_clip_is_saved_with_the_configuration_that_fits_it(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = json.loads((open_clip_folder(tmp_path / "tiny") / "open_clip_config.json").read_text())
    whole = shaken(open_clip.CLIP(**config["model_cfg"], quick_gelu=True))
    transform = open_clip.image_transform(48, is_train=False)
    tower = load_tower(whole, image_processor=transform, image_size=48)
    with pytest.raises(NotImplementedError, match=r"Register its own by `open_clip\.add_model_con"):
        tower.save_pretrained(tmp_path / "saved")
    for name, more in (("a tiny one", {}), ("a tiny quick one", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**config["model_cfg"], **more}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    tower.save_pretrained(tmp_path / "saved")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").eval()
    texts = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        assert_close(again.encode_image(pixels(48)), tower(pixels(48)), rtol=0, atol=1e-6)
        assert_close(again.encode_text(texts), whole.encode_text(texts))


def timm_vit(**options: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8}
    return shaken(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}))


def test_a_model_of_timm_in_and_out(tmp_path: Path) -> None:
    tower = load_tower(timm_vit(num_classes=0))
    import timm

    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=tower.model)
    transform = timm.data.create_transform(**config, is_training=False)
    assert torch.equal(tower.preprocess(PHOTO), transform(PHOTO))
    trunk, head = tower.split(1)
    assert_close(head(trunk(pixels())), tower(pixels()), rtol=0, atol=1e-5)
    groups = layer_decay(tower, 1e-3, 0.5, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(tower.model.pos_embed)] == 0  # as timm's `no_weight_decay` has it
    assert decay[id(tower.model.patch_embed.proj.weight)] == 0.1
    tower.save_pretrained(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(again(pixels()), tower(pixels()), rtol=0, atol=1e-6)
    assert load_tower(tmp_path).fingerprint() == tower.fingerprint()


def test_a_given_preprocessing_that_a_folder_of_a_library_can_not_hold_is_said(
    tmp_path: Path,
) -> None:
    own = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    for name, source in (
        ("timm", timm_vit(num_classes=0)),
        ("open_clip", open_clip_folder(tmp_path / "model")),
    ):
        with pytest.warns(UserWarning, match="not the `image_processor` that this tower") as caught:
            load_tower(source, image_processor=own).save_pretrained(tmp_path / name)
        assert [warning.filename for warning in caught] == [__file__]
        again = load_tower(tmp_path / name, image_processor=own)
        assert torch.equal(again.preprocess(PHOTO), own(PHOTO))


def test_a_model_with_texts_is_saved_without_the_adapters_of_its_tower(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    texts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    texts |= {"num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 8}
    config = ChineseCLIPConfig(text_config=texts, vision_config=VIT, projection_dim=12)
    model = shaken(ChineseCLIPModel(config))
    names = set(model.state_dict())
    with pytest.warns(UserWarning, match="drift apart"):
        tower = load_tower(model, image_processor=processor())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tower, lora)
    tower.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= names
    with pytest.warns(UserWarning, match="drift apart"):
        again = load_tower(tmp_path)
    assert_close(again(pixels()), tower(pixels()), rtol=0, atol=1e-4)


def test_another_image_size_changes_nothing_else_and_nothing_where_it_is_refused() -> None:
    model = ViTModel(ViTConfig(**VIT))
    model.embeddings.dropout.p = 0.25  # by hand, not by its configuration
    load_tower(model, image_processor=processor(), image_size=48)
    assert model.embeddings.dropout.p == 0.25
    sizes = {"image_size": 32, "hidden_sizes": [8, 8, 8], "num_attention_heads": [1, 1, 1]}
    sizes |= {"depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    model = LevitModel(LevitConfig(**sizes))
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match=r"`image_size` .*can't be changed"):
        load_tower(model, image_processor=processor(), image_size=64)
    assert {name: value.shape for name, value in model.state_dict().items()} == before
    assert model.config.image_size == 32


ODD = {
    "config.json": [
        ((), []),
        ((), None),
        (("model_type",), {}),
        (("vision_config",), 5),
        (("hidden_size",), "x"),
        (("num_attention_heads",), 0),
        (("image_size",), []),
        (("architecture",), 5),
        (("model_args",), []),
        (("pretrained_cfg", "interpolation"), 5),
        (("pretrained_cfg", "mean"), "x"),
    ],
    "preprocessor_config.json": [((), 5), (("image_mean",), "x"), (("rescale_factor",), 0)],
    "modules.json": [((), {}), ((0, "path"), None), ((1, "type"), 5)],
    "open_clip_config.json": [
        ((), []),
        (("model_cfg",), None),
        (("model_cfg", "vision_cfg", "layers"), "x"),
        (("model_cfg", "vision_cfg", "patch_size"), 0),
        (("preprocess_cfg",), 5),
        (("preprocess_cfg", "interpolation"), 5),
    ],
}


def changed(content: Any, place: tuple[object, ...], value: object) -> Any:
    """JSON with another value at a place that it has."""
    if place:
        content[place[0]], value = changed(content[place[0]], place[1:], value), content
    return value


def test_whatever_the_files_of_a_folder_hold_is_an_error_that_names_it(tmp_path: Path) -> None:
    random_tower().save_pretrained(tmp_path / "transformers")
    load_tower(timm_vit(num_classes=0)).save_pretrained(tmp_path / "timm")
    open_clip_folder(tmp_path / "open_clip")
    for folder in list(tmp_path.iterdir()):
        (folder / "pairclip_checksums.json").unlink(missing_ok=True)
        for path in (folder / name for name in ODD if (folder / name).is_file()):
            written = path.read_text()
            for place, value in ODD[path.name]:
                try:
                    content = changed(json.loads(written), place, value)
                except KeyError:  # of another library
                    continue
                path.write_text(json.dumps(content))
                with pytest.raises((ValueError, OSError), match=re.escape(str(folder))):
                    load_tower(folder)
            path.write_text(written)
        load_tower(folder)


def test_the_logits_of_a_classifier_are_no_embedding() -> None:
    with pytest.raises(ValueError, match=r"classifier of 7 classes.*reset_classifier\(0\)"):
        load_tower(timm_vit(num_classes=7))


def test_settings_of_every_module_are_in_the_fingerprint_of_a_plain_tower() -> None:
    class Attention(nn.Module):
        def __init__(self, heads: int, activation: nn.Module) -> None:
            super().__init__()
            self.heads, self.linear, self.activation = heads, nn.Linear(48, 8), activation

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.activation(
                self.linear(images.flatten(1)).unflatten(1, (self.heads, -1))[:, 0]
            )

    def to_pixels(image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, 4, 4)

    prints = set()
    for heads, activation in ((2, nn.GELU()), (4, nn.GELU()), (2, nn.GELU("tanh")), (2, nn.ReLU())):
        torch.manual_seed(0)
        tower = load_tower(Attention(heads, activation), image_processor=to_pixels)
        prints.add(tower.fingerprint())
        assert tower.train().fingerprint() in prints
    assert len(prints) == 4


@pytest.mark.parametrize("what", ["tower", "model", "block"])
def test_compiled_towers_have_plain_names(what: str, tmp_path: Path) -> None:
    tower = random_tower()
    names, fingerprint = list(trained_tensors(tower)), tower.fingerprint()
    compiled = tower
    if what == "tower":
        compiled = torch.compile(tower, backend="eager")
    elif what == "model":
        tower.model = torch.compile(tower.model, backend="eager")
    else:
        layers = tower.model.vision_model.encoder.layers
        layers[0] = torch.compile(layers[0], backend="eager")
    assert list(trained_tensors(compiled)) == names
    assert tower.fingerprint() == fingerprint
    assert len(tower.blocks) == 2
    tower.save_pretrained(tmp_path)
    assert load_tower(tmp_path).fingerprint() == fingerprint


class Interrupt(Callback):
    """Ctrl-C in the second step of a compiled tower."""

    def on_step(self, fit: object) -> None:
        if fit.step == 2 and isinstance(fit.tower.model, torch._dynamo.OptimizedModule):
            raise KeyboardInterrupt


def test_a_compiled_tower_is_resumed_and_indexed_as_the_plain_one(tmp_path: Path) -> None:
    data = (np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), [0, 1] * 4)

    def fit(tower: nn.Module, **options: object) -> VisionTower:
        callbacks = [Interrupt()] if options else []
        finetuner = Finetuner(tower, AllPairsCosineLoss(), callbacks=callbacks)
        finetuner.fit(data, batch_size=4, max_steps=3, **options)
        return tower

    def watched() -> VisionTower:  # so that its last block computes all tokens, as compiled
        tower = random_tower()
        tower.blocks[-1].register_forward_hook(lambda *_: None)
        return tower

    compiled, plain = random_tower(), watched()
    compiled.model = torch.compile(compiled.model, backend="eager")
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        fit(compiled, **options)
    fit(plain, **options)
    assert plain.fingerprint() == fit(watched()).fingerprint() != compiled.fingerprint()
    ImageIndex.build(compiled, data[0]).save(tmp_path / "index")
    compiled.model = compiled.model._orig_mod
    assert len(ImageIndex.load(tmp_path / "index", compiled)) == 8


def of_each_library(folder: Path) -> dict[str, VisionTower]:
    towers = {
        "transformers": load_tower(shaken(ViTModel(ViTConfig(**VIT))), image_processor=processor()),
        "open_clip": load_tower(open_clip_folder(folder / "open_clip")),
        "timm": load_tower(timm_vit(num_classes=0)),
        "plain": load_tower(nn.Flatten(), image_processor=transforms.ToTensor()),
    }
    random_tower().save_pretrained(folder / "sentence")
    with contextlib.suppress(ImportError):
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder / "sentence"), device="cpu")
        del model[1]
        towers["sentence_transformers"] = load_tower(model)
    return towers


def test_an_index_and_a_report_take_a_tower_of_every_library(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for name, tower in of_each_library(tmp_path).items():
        ImageIndex.build(tower, images).save(tmp_path / f"index of {name}")
        index = ImageIndex.load(tmp_path / f"index of {name}", tower)
        (matches,) = index.search([Image.fromarray(images[2])], k=1)
        assert matches[0].index == 2
        outcome = evaluate(tower, (images, [0, 1] * 3))
        page = write_report(tmp_path / f"report of {name}", outcome, outcome)
        assert "<html" in page.read_text("utf-8")


class Seen:
    """What passed a module, by a hook on it."""

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[str, torch.Tensor] = {}
        for name, part in model.named_modules():
            part.register_forward_hook(lambda _, __, out, name=name: self.keep(name, out))

    def keep(self, name: str, output: object) -> None:
        if isinstance(output, (tuple, dict)):
            output = next(iter(output.values() if isinstance(output, dict) else output))
        self.values[name] = output


@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "SiglipVisionModel", "ViTModel"])
def test_hooks_see_what_they_see_in_transformers(kind: str) -> None:
    config = getattr(transformers, kind).config_class(**VIT)
    models = [shaken(getattr(transformers, kind)(config)) for _ in range(2)]
    alone, inside = (Seen(model) for model in models)
    models[0](pixel_values=pixels())
    tower = load_tower(models[1], image_processor=processor())
    inside.values.clear()
    tower(pixels())
    assert inside.values.keys() == alone.values.keys()
    for name, value in alone.values.items():
        assert torch.equal(inside.values[name], value), name
    trunk, head = tower.split(1)
    inside.values.clear()
    head(trunk(pixels()))
    blocks = {id(block): n for n, part in models[1].named_modules() for block in [part]}
    for block in tower.blocks:
        name = blocks[id(block)]
        assert torch.equal(inside.values[name], alone.values[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_exported_tower_computes_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    tower = random_tower()
    report = tower.export_onnx(tmp_path / "tower.onnx", images=[PHOTO], dtype=dtype)
    session = runtime.InferenceSession(str(tmp_path / "tower.onnx"))
    (embeddings,) = session.run(None, {"pixel_values": pixels(16).numpy()})
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    with torch.no_grad():
        assert_close(torch.tensor(embeddings), tower(pixels(16)), rtol=0, atol=tolerance)
    assert json.loads((tmp_path / "tower.json").read_text()) == report
    assert report["parity"]["images"] == 1
    content = (tmp_path / "tower.onnx").read_bytes()
    assert report["sha256"] == hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=r"`path` must end with \.onnx"):
        tower.export_onnx(tmp_path / "tower.bin")
    with pytest.raises(ValueError, match=r"`dtype` must be torch\.float32 or torch\.float16"):
        tower.export_onnx(tmp_path / "tower.onnx", dtype=torch.bfloat16)


def test_a_tower_in_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    report = random_tower(width=64).bfloat16().export_onnx(tmp_path / "tower.onnx")
    assert 1e-4 < report["parity"]["largest_difference"] < 2e-2


def test_a_tower_without_weights_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    # It leaves the size to the images.
    tower = load_tower(nn.Flatten(), image_processor=transforms.ToTensor())
    assert tower.export_onnx(tmp_path / "tower.onnx")["parity"]["largest_difference"] == 0


def test_a_model_whose_first_weights_are_integers_computes_in_the_type_of_the_others() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
            self.linear = nn.Linear(48, 8).bfloat16()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(images.flatten(1))

    resize = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
    assert load_tower(Packed(), image_processor=resize).embedding_dim == 8


def test_a_half_that_onnxruntime_crashes_on_is_refused_with_words(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(NotImplementedError, match=r"onnxruntime .* can't open a Some in float16"):
        export.check_opens(b"no graph", "Some")
    tower = load_tower(open_clip_folder(tmp_path / "model"))
    # onnxruntime 1.32 ends with a segmentation fault where it optimizes this graph.
    with contextlib.suppress(NotImplementedError):
        tower.export_onnx(tmp_path / "half.onnx", dtype=torch.float16)
        export.check_opens((tmp_path / "half.onnx").read_bytes(), "CLIP")


def test_revisions_are_of_ids_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`revision` 'v1' would be ignored: .* is a folder"):
        load_tower(tmp_path, revision="v1")
    with pytest.raises(ValueError, match="`revision` 'v1' would be ignored: `source` is an object"):
        load_tower(random_tower().model, revision="v1")


def test_an_adapter_that_never_runs_is_an_error() -> None:
    """Attention of torch uses its last weight without calling the module."""
    peft = pytest.importorskip("peft")

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(192, 16), nn.Linear(16, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.inside(images.flatten(1)), self.outside.weight)

    def to_pixels(image: Image.Image) -> torch.Tensor:
        return torch.tensor(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255

    def fit(*targets: str) -> None:
        tower = load_tower(Attention(), image_processor=to_pixels)
        wrapped = peft.get_peft_model(tower, peft.LoraConfig(r=2, target_modules=list(targets)))
        Finetuner(wrapped, AllPairsCosineLoss()).fit(
            (np.stack([NOISE] * 4), [0, 0, 1, 1]), batch_size=4, max_steps=1
        )

    fit("inside")
    with pytest.raises(ValueError, match=r"1 adapters .* no gradient .*outside`: .*never runs"):
        fit("inside", "outside")


def test_a_tuned_tower_goes_back_beside_its_texts(tmp_path: Path) -> None:
    texts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = random_tower()
    config = CLIPConfig(
        text_config=texts, vision_config=tower.model.config.to_dict(), projection_dim=12
    )
    CLIPModel(config).save_pretrained(tmp_path)
    model = whole_model(tower, tmp_path)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels(16))
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
        assert_close(features, tower(pixels(16)))
    with pytest.raises(ValueError, match=r"has no image tower like this one: `.*` is \[16.*"):
        whole_model(random_tower(width=16), tmp_path)
    model.half().save_pretrained(tmp_path)
    weight = whole_model(tower, tmp_path).visual_projection.weight
    assert torch.equal(weight, tower.model.visual_projection.weight)


def test_a_model_card_says_what_a_tower_is_and_how_to_load_it(tmp_path: Path) -> None:
    card = model_card(
        random_tower(),
        base_model="openai/clip-vit-base-patch32",
        dataset="my photos",
        recipe="squared, 400 steps",
        before={"recall_at_1": 0.5},
        after={"recall_at_1": 0.75, "gap": 0.4},
        license="mit",
    )
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    for words in ("| recall_at_1 | 0.500 | 0.750 |", "| gap | | 0.400 |", "my photos", "400 steps"):
        assert words in card.text
    for library in ("pairclip", "transformers", "sentence_transformers"):
        assert f"import {library}" in card.text or f"from {library}" in card.text
    assert "not by `AutoModel`" in card.text
    random_tower().save_pretrained(tmp_path)
    assert "`CLIPVisionModelWithProjection`" in (tmp_path / "README.md").read_text()
    card.save(tmp_path / "README.md")
    random_tower().save_pretrained(tmp_path)
    assert "license: mit" in (tmp_path / "README.md").read_text()
