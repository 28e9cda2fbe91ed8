"""Towers against `transformers` itself: same weights, same pixels, same embeddings."""

import json
import os
import pickle
import re
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import every_kill
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.utils import logging

from pairclip import VisionTower, _files, load_tower
from pairclip.towers import loading, random_tower
from pairclip.towers.preprocess import Preprocess
from pairclip.towers.transformers_tower import quiet

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ["clip", "siglip"]
WHOLE = "drift apart"
DEFAULT = "No image processor came with"


def new_model(family: str) -> CLIPModel | SiglipModel:
    torch.manual_seed(0)
    if family == "clip":
        # The nested projection_dim stays at its 512, as in many checkpoints.
        config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
        model = CLIPModel(config)
    else:
        model = SiglipModel(
            SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION)
        )
    with torch.no_grad():  # tiny initial weights would hide a wrong position
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def new_processor(family: str, size: int = 32) -> CLIPImageProcessor | SiglipImageProcessor:
    square = {"height": size, "width": size}
    if family == "clip":
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    return SiglipImageProcessor(size=square)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole saved model of each family; tests only read them."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        new_model(family).save_pretrained(root / family)
        new_processor(family).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the CLIP folder, to damage."""
    return Path(shutil.copytree(folders["clip"], tmp_path / "damaged"))


def noise(mode: str = "RGB", size: tuple[int, int] = (50, 41), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "RGBA":
        return Image.fromarray(values)
    rgb = Image.fromarray(values[:, :, :3])
    return rgb if mode == "RGB" else rgb.convert(mode)


def batch(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def image_features(model: CLIPModel | SiglipModel, pixel_values: Tensor, **options: bool) -> Tensor:
    features = model.get_image_features(pixel_values=pixel_values, **options)
    return features if isinstance(features, Tensor) else features.pooler_output


def load_whole(model: nn.Module, **options: object) -> VisionTower:
    with pytest.warns(UserWarning, match=WHOLE):
        return load_tower(model, **options)


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_embeds_as_transformers_does(family: str, folders: dict[str, Path]) -> None:
    tower = load_tower(folders[family])
    model = AutoModel.from_pretrained(folders[family]).eval()
    image = noise()
    processor = AutoImageProcessor.from_pretrained(folders[family])
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(tower.preprocess(image), pixel_values[0])
    with torch.no_grad():
        embeddings = tower(tower.preprocess(image)[None])
        assert_close(embeddings, image_features(model, pixel_values), rtol=0, atol=1e-6)
        assert_close(tower(batch()), image_features(model, batch()), rtol=0, atol=1e-6)
    assert tower.embedding_dim == embeddings.shape[1] == (24 if family == "clip" else 32)
    assert tower.image_size == 32
    assert not tower.training
    assert not any(part.training for part in tower.modules())
    assert not any("text" in name for name, _ in tower.named_parameters())


def test_only_vision_folders_and_objects(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        ("clip", CLIPVisionModelWithProjection, "image_embeds", 24),
        ("clip", CLIPVisionModel, "pooler_output", 32),
        ("siglip", SiglipVisionModel, "pooler_output", 32),
    ]
    for family, kind, output, size in cases:
        config = AutoModel.from_pretrained(folders[family]).config
        vision_config = config.vision_config
        vision_config.projection_dim = 24
        model = kind.from_pretrained(folders[family], config=vision_config).eval()
        folder = tmp_path / kind.__name__
        model.save_pretrained(folder)
        new_processor(family).save_pretrained(folder)
        with torch.no_grad():
            expected = getattr(model(pixel_values=batch()), output)
            for source in (folder, str(folder), model):
                tower = load_tower(source, image_processor=new_processor(family))
                assert tower.embedding_dim == size
                assert_close(tower(batch()), expected, rtol=0, atol=1e-6)
            tower.save_pretrained(tmp_path / "again")
            again = load_tower(tmp_path / "again")
            assert_close(again(batch()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_loaded_in_float32(dtype: torch.dtype, folder: Path) -> None:
    new_model("clip").to(dtype).save_pretrained(folder)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {dtype}
    tower = load_tower(folder)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert_close(tower(batch()), image_features(model, batch()), rtol=0, atol=1e-6)
    tower.save_pretrained(folder.with_name("again"))
    values = load_file(folder.with_name("again") / "model.safetensors").values()
    assert {value.dtype for value in values} == {torch.float32}


def test_threads_that_load_leave_the_verbosity_of_transformers_as_it_was() -> None:
    before, entered = logging.get_verbosity(), threading.Event()

    def load(seconds: float, *, first: bool) -> None:
        if not first:
            entered.wait()
        with quiet():
            entered.set()
            time.sleep(seconds)

    threads = [
        threading.Thread(target=load, args=(seconds,), kwargs={"first": first})
        for seconds, first in ((0.05, True), (0.1, False))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logging.get_verbosity() == before


def test_loading_says_nothing(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    for family in FAMILIES:
        load_tower(folders[family])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "text_model" not in captured.err
    assert "nexpected" not in captured.err


def test_device_moves_the_tower(folders: dict[str, Path]) -> None:
    tower = load_tower(folders["clip"], device="meta")
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    tower = load_tower(folders["clip"])
    assert {parameter.device.type for parameter in tower.parameters()} == {"cpu"}


# Model objects


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_shares_its_image_tower_and_keeps_its_texts(family: str) -> None:
    model = new_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tower = load_tower(model, image_processor=new_processor(family))
    assert [str(w.message).split(":")[0] for w in caught] == [
        f"Training changes only the image tower of this {type(model).__name__}"
    ]
    assert caught[0].filename == __file__
    with torch.no_grad():
        assert_close(tower(batch()), image_features(model, batch()), rtol=0, atol=1e-6)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    tower(batch()).square().sum().backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    vision = {n for n in before if n.startswith(("vision_model.", "visual_projection."))}
    assert {"vision_model.embeddings.patch_embedding.weight"} < changed <= vision
    assert all(value.grad is None for n, value in model.named_parameters() if n not in vision)
    with torch.no_grad():
        assert_close(tower(batch()), image_features(model, batch()), rtol=0, atol=1e-6)


def test_a_model_object_keeps_its_mode_and_dtype() -> None:
    model = new_model("clip").double().train()
    model.vision_model.encoder.eval()
    tower = load_whole(model, image_processor=new_processor("clip"))
    assert tower.training
    assert tower.model.training
    assert model.training
    assert not model.vision_model.encoder.training
    assert tower(batch()).dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_image_processor_the_family_default_is_used_aloud(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "bare"))
    (folder / "preprocessor_config.json").unlink()
    kind = CLIPVisionModel if family == "clip" else SiglipVisionModel
    for source in (folder, kind.from_pretrained(folder)):
        with pytest.warns(UserWarning, match=f"{DEFAULT}.*32 x 32.*Pass `image_pro") as caught:
            tower = load_tower(source)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        expected = new_processor(family)(images=noise(), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(tower.preprocess(noise()), expected)


def test_a_whole_processor_is_accepted(folders: dict[str, Path]) -> None:
    class Whole:
        image_processor = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.0] * 3
        )

    assert "image_processor" in getattr(CLIPProcessor, "attributes", ["image_processor"])
    tower = load_tower(folders["clip"], image_processor=Whole())
    pixel_values = Whole.image_processor(images=noise(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tower.preprocess(noise()), pixel_values)


# Preprocessing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "YCbCr"])
def test_pixels_are_those_of_the_saved_image_processor(
    family: str, mode: str, folders: dict[str, Path]
) -> None:
    processor = AutoImageProcessor.from_pretrained(folders[family])
    preprocess = load_tower(folders[family]).preprocess
    for size in [(50, 41), (20, 90), (32, 32)]:
        image = noise(mode, size)
        assert image.mode == mode
        seen = image.convert("RGB")
        if mode == "RGBA":
            seen = Image.new("RGB", size, "white")
            seen.paste(image, mask=image)
        expected = processor(images=seen, return_tensors="pt")["pixel_values"][0]
        pixel_values = preprocess(image)
        assert pixel_values.dtype == torch.float32
        assert pixel_values.shape == (3, 32, 32)
        assert torch.equal(pixel_values, expected)


def test_preprocess_goes_to_workers_without_the_weights(folders: dict[str, Path]) -> None:
    tower = load_tower(folders["clip"])
    pickled = pickle.dumps(tower.preprocess)
    assert len(pickled) < 5000
    assert torch.equal(pickle.loads(pickled)(noise()), tower.preprocess(noise()))


def test_preprocess_takes_one_pil_image(folders: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match=r"`image` must be one PIL image, got ndarray.*fromarray"):
        load_tower(folders["clip"]).preprocess(np.zeros((32, 32, 3), np.uint8))


# Image size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [16, 48])
def test_image_size_is_what_transformers_interpolates_on_the_fly(
    family: str, size: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(folders[family]).eval()
    with torch.no_grad():
        expected = image_features(model, batch(size), interpolate_pos_encoding=True)
        tower = load_tower(folders[family], image_size=size)
        assert tower.image_size == size
        assert tower.preprocess(noise()).shape == (3, size, size)
        assert_close(tower(batch(size)), expected, rtol=0, atol=1e-5)

        tower.save_pretrained(tmp_path / "resized")
        kind = CLIPVisionModelWithProjection if family == "clip" else SiglipVisionModel
        plain = kind.from_pretrained(tmp_path / "resized").eval()
        assert plain.config.image_size == size
        output = plain(pixel_values=batch(size))
        output = output.image_embeds if family == "clip" else output.pooler_output
        assert_close(output, tower(batch(size)), rtol=0, atol=1e-6)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "resized")
    expected = new_processor(family, size)(images=noise(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tower.preprocess(noise()), expected)
    assert torch.equal(processor(images=noise(), return_tensors="pt")["pixel_values"][0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_size_changes_a_model_object_in_place_but_not_a_processor(
    family: str, tmp_path: Path
) -> None:
    model, processor = new_model(family), new_processor(family)
    settings = processor.to_dict()
    with torch.no_grad():
        expected = image_features(model, batch(48), interpolate_pos_encoding=True)
    tower = load_whole(model, image_processor=processor, image_size=48)
    assert processor.to_dict() == settings
    assert model.config.vision_config.image_size == 48
    assert tower.model.config.image_size == 48
    model.save_pretrained(tmp_path / "whole")
    again = AutoModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        for whole in (model, again):
            assert_close(image_features(whole, batch(48)), expected, rtol=0, atol=1e-5)
        # The size is the model's own now: nothing is left to interpolate.
        on_the_fly = image_features(model, batch(48), interpolate_pos_encoding=True)
        assert torch.equal(on_the_fly, image_features(model, batch(48)))
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    tower(batch(48)).square().sum().backward()
    optimizer.step()


def test_image_size_of_a_half_precision_object_is_interpolated_in_float32() -> None:
    half, full = new_model("clip").bfloat16(), new_model("clip").bfloat16().float()
    half = load_whole(half, image_processor=new_processor("clip"), image_size=48)
    full = load_whole(full, image_processor=new_processor("clip"), image_size=48)
    for one, other in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16())


def test_the_own_image_size_changes_nothing(folders: dict[str, Path]) -> None:
    one, other = load_tower(folders["clip"]), load_tower(folders["clip"], image_size=32)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert torch.equal(one.preprocess(noise()), other.preprocess(noise()))


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        (36, ValueError, r"multiple of the patch size 8, got 36\. Use 40\."),
        (0, ValueError, r"`image_size` must be at least 1, got 0"),
        (-8, ValueError, r"`image_size` must be at least 1, got -8"),
        (32.0, TypeError, r"`image_size` must be an integer, got 32\.0"),
    ],
)
def test_wrong_image_sizes(
    size: int, kind: type[Exception], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(kind, match=message):
        load_tower(folders["clip"], image_size=size)


# Saving


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_again(family: str, tmp_path: Path) -> None:
    model = new_model(family)
    tower = load_whole(model, image_processor=new_processor(family))
    target = tmp_path / "new" / "tower"
    tower.train().save_pretrained(str(target))
    assert tower.training
    written = {path.name for path in target.iterdir()}
    assert written >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert [path.name for path in target.parent.iterdir()] == ["tower"]
    # `transformers` 4 knows the weights by these names only.
    names = load_file(target / "model.safetensors")
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in names)
    architecture = json.loads((target / "config.json").read_text())["architectures"]
    kind = CLIPVisionModelWithProjection if family == "clip" else SiglipVisionModel
    assert architecture == [kind.__name__]

    again, plain = load_tower(target), kind.from_pretrained(target).eval()
    with torch.no_grad():
        expected = image_features(model.eval(), batch())
        output = plain(pixel_values=batch())
        output = output.image_embeds if family == "clip" else output.pooler_output
        assert_close(again(batch()), expected, rtol=0, atol=1e-6)
        assert_close(output, expected, rtol=0, atol=1e-6)
    assert torch.equal(again.preprocess(noise()), tower.preprocess(noise()))


def test_saving_into_a_folder_replaces_files_of_the_same_name(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    tower = load_tower(folder)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(0.5)
    tower.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(folder.parent.iterdir()) == [folder]
    assert_close(load_tower(folder)(batch()), tower(batch()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError, SafetensorError])  # the library's own, on a full disk
def test_a_failed_save_leaves_nothing_half_written(
    error: type[Exception], existing: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = load_tower(folder)
    target = folder if existing else folder.with_name("new")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise error("No space left on device")

    monkeypatch.setattr(type(tower.image_processor), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        tower.save_pretrained(target)
    assert list(folder.parent.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kill_while_a_tower_is_saved_leaves_the_old_or_the_new_one(
    folder: Path, tmp_path: Path
) -> None:
    old, new = load_tower(folder), load_tower(folder)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.5)
    fingerprints = {old.fingerprint(): "old", new.fingerprint(): "new"}
    (tmp_path / "all").mkdir()
    shutil.copytree(folder, tmp_path / "all" / "tower")
    found = [
        fingerprints[load_tower(left / "tower").fingerprint()]
        for left in every_kill(
            tmp_path / "all", lambda where: new.save_pretrained(where / "tower"), stride=5
        )
    ]
    assert set(found) == {"old", "new"}


def test_a_tower_that_is_saved_while_it_is_loaded_is_one_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = load_tower(folder)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(0.5)
    tower.image_processor.image_mean = [0.25, 0.25, 0.25]
    read, times = loading._read_model, []

    def saved_after(*arguments: Any) -> Any:
        model = read(*arguments)
        if not times:
            tower.save_pretrained(folder)
        times.append(model)
        return model

    monkeypatch.setattr(loading, "_read_model", saved_after)
    assert load_tower(folder).fingerprint() == tower.fingerprint()
    assert len(times) == 2


def test_damage_of_a_saved_tower_is_named(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tower = load_tower(folder)
    tower.save_pretrained(saved)
    sums = saved / "pairclip_checksums.json"
    assert load_tower(saved).fingerprint() == tower.fingerprint()
    # The card is for people to write into.
    files = [p for p in saved.rglob("*") if p.is_file() and p.name != "README.md"]
    assert set(json.loads(sums.read_text())["files"]) == {
        path.relative_to(saved).as_posix() for path in files if path != sums
    }
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}' is damaged"):
            load_tower(saved)
        if path != sums:
            path.unlink()
            with pytest.raises(
                FileNotFoundError, match=rf"{re.escape(str(path))}' is missing\. Sa"
            ):
                load_tower(saved)
        path.write_bytes(whole)
    sums.write_text("[]")
    with pytest.raises(ValueError, match=r"pairclip_checksums\.json' is damaged: its checksum"):
        load_tower(saved)
    _files.write_json(sums, _files.sealed({"format": 1}))
    with pytest.raises(
        ValueError, match=r"pairclip_checksums\.json' is damaged: it names no files"
    ):
        load_tower(saved)


def test_the_folder_that_the_process_is_in_stays_its_folder(tmp_path: Path, monkeypatch) -> None:
    for place in (tmp_path / "saved" / "within", tmp_path / "saved"):
        place.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(place)
        tower = random_tower(image_size=8, patch_size=4, seed=len(place.parts))
        tower.save_pretrained(tmp_path / "saved")
        assert Path.cwd() == place
        assert load_tower(tmp_path / "saved").fingerprint() == tower.fingerprint()
    assert load_tower(".").fingerprint() == tower.fingerprint()


def test_a_saved_tower_that_was_changed_by_hand_says_how_it_can_be_loaded(
    folder: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    load_tower(folder).save_pretrained(saved)
    config = saved / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"the change was meant, delete '.*pairclip_checksums\.js"):
        load_tower(saved)
    (saved / "pairclip_checksums.json").unlink()
    load_tower(saved)


def test_saving_onto_a_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match=r"`folder` must be a folder, got the file '.*taken'"):
        load_tower(folders["clip"]).save_pretrained(tmp_path / "taken")


# Sources that cannot be loaded


def test_missing_folders_and_files(folder: Path, tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "a b"):
        with pytest.raises(FileNotFoundError, match="is neither a folder nor a Hugging Face id"):
            load_tower(source)
    with pytest.raises(NotADirectoryError, match=r"must be a folder, got the file '.*config.json'"):
        load_tower(folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"'.*' has no config\.json"):
        load_tower(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_tower(folder)
    assert str(caught.value) == (f"Folder '{folder}' has no weights: model.safetensors is missing.")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (self.path, 0o700)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {}}, {"weight_map": {"a": 5}}])
def test_an_index_that_names_no_safetensors_is_not_one_of_weights(
    index: object, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match=r"lacks weights that its model\.safetensors\.index"
    ):
        load_tower(folder)


@pytest.mark.parametrize("index", [False, True])
def test_pickles_are_never_loaded(index: bool, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"bomb": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    if index:
        names = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    message = r"(is missing|index\.json names)\. Its pickled.*never loaded.*save_pretrained\(fol"
    with pytest.raises(FileNotFoundError, match=message):
        load_tower(folder)
    assert not (tmp_path / "exploded").exists()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_tower(folder)
    assert not (tmp_path / "exploded").exists()


def test_shards_of_safetensors_are_loaded(folder: Path) -> None:
    expected = load_tower(folder)(batch())
    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert_close(load_tower(folder)(batch()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["visual_projection.weight", "vision_model.post_layernorm.bias"])
def test_missing_weights_are_never_random(name: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = f"lack 1 parameters of the image tower, first `{re.escape(name)}`"
    with pytest.raises(ValueError, match=message):
        load_tower(folder)


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    message = r"The weights of '.*damaged' are damaged or do not fit"
    for damaged in (content[: len(content) // 2], b"", content[:100] + b"\0" * 10 + content[110:]):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as caught:
            load_tower(folder)
        assert caught.value.__cause__ is not None
    weights.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_tower(folder)


def test_damaged_or_foreign_configs(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json' is damaged: it is not valid") as caught:
        load_tower(folder)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    for model_type in ("bert", "unheard_of", None):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=rf"is of model type {model_type!r}, .*of images"):
            load_tower(folder)
    (folder / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match=r"NaFlex\), which is not supported: use .*fixed"):
        load_tower(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"vision_config": 3}),
        ("config.json", {"vision_config": {"patch_size": 0}}),
        ("preprocessor_config.json", {"image_std": []}),
        ("preprocessor_config.json", {"resample": -1}),
        ("preprocessor_config.json", {"resample": "sharp"}),
    ],
)
def test_what_a_library_can_not_make_of_a_file_names_the_folder(
    folder: Path, file: str, change: dict[str, Any]
) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=re.escape(f"'{folder}'")):
        load_tower(folder)


def test_an_image_processor_of_another_size_is_refused(folder: Path) -> None:
    new_processor("clip", 24).save_pretrained(folder)
    message = r"makes images of 24 x 24 pixels .* but the model takes 32 x 32\. Pass"
    with pytest.raises(ValueError, match=message):
        load_tower(folder)
    assert load_tower(folder, image_processor=new_processor("clip")).image_size == 32
    assert load_tower(folder, image_size=32).preprocess(noise()).shape == (3, 32, 32)
    uncropped = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(ValueError, match="but the model takes 32 x 32"):
        load_tower(folder, image_processor=uncropped)
    unresized = SiglipImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match="makes images of 33 x 64 pixels"):
        load_tower(folder, image_processor=unresized)


def test_a_given_image_processor_replaces_a_damaged_one(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match="preprocessor_config"):
        load_tower(folder)
    assert load_tower(folder, image_processor=new_processor("clip")).image_size == 32


def test_an_image_processor_nested_in_a_processor_is_found(folder: Path) -> None:
    saved = folder / "preprocessor_config.json"
    nested = {"image_processor": json.loads(saved.read_text()), "processor_class": "CLIPProcessor"}
    expected = load_tower(folder).preprocess(noise())
    saved.unlink()
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert torch.equal(load_tower(folder).preprocess(noise()), expected)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Nothing listens on the discard port of this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(
        OSError, match=r"'nobody/nothing' is no folder here.*give a local"
    ) as caught:
        load_tower("nobody/nothing")
    assert caught.value.__cause__ is not None
    assert time.monotonic() - start < 10


# Objects that cannot be wrapped, and those that can


def test_model_objects_of_other_families_are_refused() -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ValueError, match=r"`source` BertModel is of model type 'bert', .*CLIP"):
        load_tower(BertModel(config))


def test_a_model_without_a_pooling_head_is_refused() -> None:
    config = SiglipConfig(text_config=TEXT, vision_config=VISION | {"vision_use_head": False})
    with pytest.raises(ValueError, match="has no pooling head"):
        load_tower(SiglipModel(config), image_processor=new_processor("siglip"))


def test_wrong_types(folders: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match=r"`source` must be a Hugging Face id, .* got int"):
        load_tower(3)
    with pytest.raises(TypeError, match=r"`image_processor` of a CLIP model .* got function"):
        load_tower(folders["clip"], image_processor=to_pixels)
    with pytest.raises(TypeError, match="`image_processor` must be callable, got int"):
        load_tower(Encoder(), image_processor=3)


def to_pixels(image: Image.Image, size: int = 6) -> Tensor:
    values = np.array(image.resize((size, size)), dtype=np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 6 * 6, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.norm(pixel_values).flatten(1))


class EncoderWithPreprocess(Encoder):
    def preprocess(self, image: Image.Image) -> Tensor:
        return to_pixels(image)


@pytest.mark.parametrize("own", [False, True])
def test_any_module_with_a_preprocess_is_a_tower(own: bool) -> None:
    module = EncoderWithPreprocess() if own else Encoder()
    module.norm.eval()
    running = module.norm.running_mean.clone()
    tower = load_tower(module, image_processor=None if own else to_pixels)
    assert (tower.image_size, tower.embedding_dim) == (6, 5)
    assert tower.training
    assert module.training
    assert not module.norm.training
    assert module.head.training
    assert torch.equal(module.norm.running_mean, running)
    assert torch.equal(tower.preprocess(noise("L")), to_pixels(noise("L").convert("RGB")))
    assert torch.equal(tower(batch(6)), module(batch(6)))
    assert {id(p) for p in tower.parameters()} == {id(p) for p in module.parameters()}
    with pytest.raises(NotImplementedError, match="of transformers, open_clip and timm have it"):
        tower.save_pretrained("anywhere")


def test_a_module_can_use_an_image_processor_of_transformers() -> None:
    processor = SiglipImageProcessor(size={"height": 6, "width": 6})
    tower = load_tower(Encoder(), image_processor=processor)
    expected = processor(images=noise(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tower.preprocess(noise()), expected)


def test_modules_that_are_no_tower() -> None:
    with pytest.raises(ValueError, match=r"`source` Encoder has no `preprocess`. Pass `image_proc"):
        load_tower(Encoder())
    with pytest.raises(ValueError, match="`image_size` 64 would be ignored: pairclip does"):
        load_tower(Encoder(), image_processor=to_pixels, image_size=64)
    with pytest.raises(ValueError, match=r"into a float tensor \[3, S, S\], got torch.uint8 \[3, "):
        load_tower(Encoder(), image_processor=lambda image: to_pixels(image).byte())
    with pytest.raises(ValueError, match=r"got torch.float32 \[3, 4, 6\]"):
        load_tower(Encoder(), image_processor=lambda image: to_pixels(image)[:, :4])
    with pytest.raises(ValueError, match=r"into a float tensor .* got Image"):
        load_tower(Encoder(), image_processor=lambda image: image)
    with pytest.raises(ValueError, match=r"Encoder could not encode .* \[3, 7, 7\]") as caught:
        load_tower(Encoder(), image_processor=lambda image: to_pixels(image, 7))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match=r"Identity must turn .* got torch.float32 \[1, 3, 6, 6\]"):
        load_tower(nn.Identity(), image_processor=to_pixels)
    whole = new_model("clip").vision_model
    nested = nn.Sequential(whole)
    with pytest.raises(ValueError, match=r"Sequential must turn .* got BaseModelOutputWithPooling"):
        load_tower(nested, image_processor=lambda image: to_pixels(image, 32))


def test_no_progress_bar_where_the_output_is_no_terminal(folder, tmp_path, capfd) -> None:
    load_tower(folder).save_pretrained(tmp_path / "again")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", [CLIPImageProcessor, SiglipImageProcessor])
def test_a_batch_is_preprocessed_as_each_image_alone(kind) -> None:
    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in [(40, 30), (30, 40), (16, 16), (7, 90), (64, 64)] * 7
    ]
    preprocess = Preprocess(kind(size=kind().size))
    for one, other in zip(preprocess.batch(images), map(preprocess, images), strict=True):
        assert one.equal(other)


def test_a_random_tower_is_the_same_for_one_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    tower = random_tower()
    assert torch.get_rng_state().equal(state)
    assert not tower.training
    assert tower.fingerprint() == random_tower().fingerprint() != random_tower(seed=1).fingerprint()
    config = random_tower(width=16, heads=4, depth=3, hidden_act="gelu").model.config
    assert (config.hidden_size, config.num_attention_heads, config.hidden_act) == (16, 4, "gelu")
    assert config.num_hidden_layers == 3
