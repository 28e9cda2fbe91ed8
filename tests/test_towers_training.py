"""Training less of a tower: freezing, halves, adapters, rates per layer, blended weights."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import transforms
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pairclip import AllPairsCosineLoss, VisionTower, embed_images, evaluate, load_tower
from pairclip.towers import interpolate, layer_decay, random_tower, tower_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
KINDS = ["clip", "bare clip", "siglip"]
BLOCKS = 3


def new_tower(kind: str, seed: int = 0) -> VisionTower:
    torch.manual_seed(seed)
    square = {"height": 16, "width": 16}
    processor = SiglipImageProcessor(size=square)
    model: nn.Module
    if kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES))
    else:
        processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square)
        config = CLIPVisionConfig(**SIZES, projection_dim=12)
        model = (CLIPVisionModel if kind == "bare clip" else CLIPVisionModelWithProjection)(config)
    with torch.no_grad():  # tiny initial weights would hide a block that is missing
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return load_tower(model.eval(), image_processor=processor)


def plain_tower(**changes: int) -> VisionTower:
    resize = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, changes.get("width", 6)))
    return load_tower(module, image_processor=resize)


def pixels(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def block_of(name: str) -> int | None:
    """Number of the block, from 0, in a parameter's name: an oracle of its own."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_before(name: str) -> bool:
    return ".embeddings." in name or "pre_layrnorm" in name


# Fingerprint


def test_fingerprints_are_the_same_in_another_process_and_after_saving(tmp_path: Path) -> None:
    expected = []
    for kind in KINDS:
        tower = new_tower(kind)
        expected.append(tower.fingerprint())
        assert re.fullmatch(r"[0-9a-f]{64}", expected[-1])
        tower.save_pretrained(tmp_path / kind)
        assert load_tower(tmp_path / kind).train().fingerprint() == expected[-1]
    code = (
        "import sys; from pairclip import load_tower; import pairclip.features;"
        "print(*[load_tower(folder).fingerprint() for folder in sys.argv[1:]]);"
        "assert 'peft' not in sys.modules"
    )
    folders = [str(tmp_path / kind) for kind in KINDS]
    command = [sys.executable, "-W", "ignore", "-c", code, *folders]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert other == expected


def test_a_fingerprint_tells_weights_types_settings_and_preprocessing_apart() -> None:
    found = [new_tower("clip").fingerprint()]
    tower = new_tower("clip")
    with torch.no_grad():
        tower.model.visual_projection.weight[0, 0] += 1e-4
    found.append(tower.fingerprint())
    found.append(new_tower("clip").to(torch.bfloat16).fingerprint())
    tower = new_tower("clip")
    tower.model.config.hidden_act = "gelu"
    found.append(tower.fingerprint())
    tower = new_tower("clip")
    tower.image_processor.image_mean = [0.5, 0.5, 0.5]
    found.append(tower.fingerprint())
    assert len(set(found)) == 5


def test_a_plain_towers_fingerprint_holds_no_address() -> None:
    def transform(image: Image.Image) -> Tensor:
        return torch.zeros(3, 4, 4)

    def another(image: Image.Image) -> Tensor:
        return transform(image)

    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    first = load_tower(module, image_processor=transform).fingerprint()
    assert "0x" in repr(transform)
    assert first == load_tower(copy.deepcopy(module), image_processor=transform).fingerprint()
    assert first != load_tower(module, image_processor=another).fingerprint()


# Blocks and freezing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", range(BLOCKS + 1))
def test_all_but_the_last_blocks_are_frozen(kind: str, last: int, capsys) -> None:
    tower = new_tower(kind)
    assert len(tower.blocks) == BLOCKS
    expected = {
        name: not is_before(name) and (block_of(name) is None or block_of(name) >= BLOCKS - last)
        for name, _ in tower.named_parameters()
    }
    counts = tower.freeze(all_but_last=last)
    assert {n: p.requires_grad for n, p in tower.named_parameters()} == expected
    sizes = {name: p.numel() for name, p in tower.named_parameters()}
    trainable, total = sum(sizes[n] for n, yes in expected.items() if yes), sum(sizes.values())
    assert counts == (trainable, total)
    assert capsys.readouterr().out == (
        f"Trainable: {trainable:,} of {total:,} parameters ({100 * trainable / total:.1f} %), "
        f"{last} of 3 blocks.\n"
    )
    tower.freeze(all_but_last=BLOCKS)
    assert {p.requires_grad for p in tower.blocks[0].parameters()} == {True}


def trainable(tower: nn.Module) -> set[str]:
    return {name for name, p in tower.named_parameters() if p.requires_grad}


def test_parameters_are_chosen_by_name() -> None:
    tower = new_tower("clip")
    names = set(trainable(tower))
    tower.freeze(all_but="projection")
    assert trainable(tower) == {"model.visual_projection.weight"}
    tower.freeze(all_but=["projection", "*.layers.2.*.bias"])
    biases = {n for n in names if block_of(n) == 2 and n.endswith(".bias")}
    assert trainable(tower) == {"model.visual_projection.weight", *biases}
    tower.freeze(all_but="model")
    assert trainable(tower) == names
    tower.freeze("*.embeddings.*")
    tower.freeze(["projection", "*.bias"])
    assert trainable(tower) == {
        n
        for n in names
        if ".embeddings." not in n and "visual" not in n and not n.endswith(".bias")
    }


def test_a_part_of_a_name_is_no_name() -> None:
    tower = new_tower("clip")
    with pytest.raises(
        ValueError, match=r"`all_but` 'visual_projection' matches no .*Near it are:"
    ):
        tower.freeze(all_but="visual_projection")
    with pytest.raises(ValueError, match=r"Near it are: .*model\.visual_projection\.weight"):
        tower.freeze("model.visual_projektion.weight")
    with pytest.raises(ValueError, match=r"`names` 'zzz' matches no parameter. Names are those of"):
        tower.freeze(["projection", "zzz"])
    assert len(trainable(tower)) == len(list(tower.parameters()))


def test_wrong_ways_to_freeze() -> None:
    tower = new_tower("clip")
    with pytest.raises(ValueError, match=r"Give one of `names`, .* got none"):
        tower.freeze()
    with pytest.raises(ValueError, match="got `names` and `all_but_last`"):
        tower.freeze("projection", all_but_last=1)
    with pytest.raises(ValueError, match=r"`all_but_last` must be at most 3, .* got 4"):
        tower.freeze(all_but_last=4)
    with pytest.raises(ValueError, match="`all_but_last` must not be negative, got -1"):
        tower.freeze(all_but_last=-1)
    with pytest.raises(TypeError, match=r"`all_but` must be a name or a list of names, got \[\]"):
        tower.freeze(all_but=[])
    with pytest.raises(ValueError, match=r"SiglipVisionModel has no projection: .*head\.attention"):
        new_tower("siglip").freeze(all_but="projection")
    with pytest.raises(ValueError, match=r"no projection: .*post_layernorm\. Use `all_but"):
        new_tower("bare clip").freeze(all_but="projection")


def test_a_plain_tower_has_no_blocks(capsys) -> None:
    tower = plain_tower()
    for call in (
        lambda: tower.blocks,
        lambda: tower.split(1),
        lambda: tower.freeze(all_but_last=1),
        lambda: tower.freeze(all_but="projection"),
        lambda: layer_decay(tower, 1e-3, 0.5),
    ):
        with pytest.raises(
            NotImplementedError, match=r"Sequential has no row of blocks .*it has no `blocks`"
        ):
            call()
    assert tower.freeze("model.1.weight") == (6, 294)
    assert capsys.readouterr().out == "Trainable: 6 of 294 parameters (2.0 %).\n"


# The class token alone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["clip", "bare clip"])
@pytest.mark.parametrize("part", ["tower", "head"])
def test_the_last_block_computes_the_class_token_alone_and_trains_as_the_whole(
    kind: str, attention: str, part: str
) -> None:
    tower = new_tower(kind).double().train()
    tower.model.config._attn_implementation = attention
    trunk, head = tower.split(2)
    expected = tower._encode(tower.model, pixels().double())
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    tower.zero_grad()
    seen, last = [], tower.blocks[-1]

    class Watched(type(last.mlp)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            seen.append(hidden_states.shape)
            return super().forward(hidden_states)

    last.mlp.__class__ = Watched
    embeddings = tower(pixels().double()) if part == "tower" else head(trunk(pixels().double()))
    (embeddings * weights).sum().backward()
    assert seen == [(6, 1, 32)]
    tolerance = 1e-12 if attention == "sdpa" else 1e-6  # eager attention is float32 inside
    assert_close(embeddings, expected, rtol=tolerance, atol=tolerance)
    largest = max(float(g.norm()) for g in gradients.values() if g is not None)
    for name, parameter in head.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=tolerance, atol=tolerance * largest)


def test_attention_dropout_of_the_last_block_is_that_of_training_alone() -> None:
    tower = new_tower("clip")
    trunk, head = tower.split(1)
    features = trunk(pixels())
    expected = head(features)
    tower.blocks[-1].self_attn.dropout = 0.5
    assert torch.equal(head(features), expected)
    head.train()
    assert not torch.equal(head(features), head(features))


@pytest.mark.parametrize(
    "reason", ["model", "block", "attention", "hook", "gradient hook", "patched", "compiled"]
)
def test_a_last_block_that_is_watched_or_changed_runs_as_it_is(reason: str) -> None:
    tower = new_tower("siglip" if reason == "model" else "clip")
    trunk, head = tower.split(1)
    features, expected = trunk(pixels()).requires_grad_(), tower(pixels())
    last, seen = tower.blocks[-1], []
    attention = last.self_attn

    def noting(old: Callable[..., object]) -> Callable[..., object]:
        def forward(*arguments: object, **options: object) -> object:
            seen.append(reason)
            return old(*arguments, **options)

        return forward

    if reason == "hook":
        attention.register_forward_hook(lambda *_: seen.append(reason))
    elif reason == "gradient hook":
        last.register_full_backward_hook(lambda *_: seen.append(reason))
    elif reason in ("block", "attention"):
        part = last if reason == "block" else attention
        kind = type(part)
        part.__class__ = type("Another", (kind,), {"forward": noting(kind.forward)})
    elif reason == "patched":
        attention.forward = noting(attention.forward)
    elif reason == "compiled":
        attention._compiled_call_impl = noting(attention._call_impl)
    else:
        last.mlp.register_forward_hook(lambda *_: seen.append(reason))
    embeddings = head(features)
    assert_close(embeddings, expected, rtol=0, atol=1e-5)
    embeddings.sum().backward()
    assert seen == [reason]


def test_other_embeddings_than_those_of_the_class_token_are_computed_as_they_are() -> None:
    tower = new_tower("clip")
    vision: Any = tower.model.vision_model

    class MeanOfTokens(type(vision)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = super().forward(*arguments, **options)
            output.pooler_output = output.last_hidden_state.mean(1)
            return output

    vision.__class__ = MeanOfTokens
    expected = tower._encode(tower.model, pixels())
    trunk, head = tower.split(1)
    for embeddings in (tower(pixels()), head(trunk(pixels()))):
        assert_close(embeddings, expected, rtol=0, atol=1e-5)


def test_an_embedding_costs_one_run_of_the_model() -> None:
    tower, seen = new_tower("clip"), []
    tower.model.vision_model.embeddings.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output))
    )
    tower(pixels())
    assert seen == [len(pixels())]


@pytest.mark.parametrize("fewest", [0, 1])
def test_what_is_before_a_head_runs_on_as_few_images_as_the_model_can(fewest: int) -> None:
    tower, seen = new_tower("clip"), []
    stem: Any = tower.model.vision_model.embeddings

    class Stem(type(stem)):  # type: ignore[misc]
        def forward(self, pixel_values: Tensor, **options: Any) -> Any:
            seen.append(len(pixel_values))
            if len(pixel_values) < fewest:
                raise RuntimeError("no image")
            return super().forward(pixel_values, **options)

    stem.__class__ = Stem
    trunk, head = tower.split(1)
    features, expected = trunk(pixels()), tower(pixels())
    seen.clear()
    assert_close(head(features), expected, rtol=0, atol=1e-5)
    assert seen == [fewest]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_parts_are_the_same_in_whatever_mode_they_were_looked_for(mode: Any) -> None:
    tower, other = new_tower("clip"), new_tower("clip")
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(tower.blocks) == 3
    assert tower._anatomy() == other._anatomy()
    assert len(other._projection()) == len(tower._projection()) == 1


@pytest.mark.parametrize("watched", ["model", "vision model", "encoder", "last block"])
def test_who_watches_a_tower_sees_all_tokens(watched: str) -> None:
    tower, seen = new_tower("clip"), []
    expected, vision = tower(pixels()), tower.model.vision_model
    parts = {"model": tower.model, "vision model": vision, "encoder": vision.encoder}
    part = parts.get(watched, tower.blocks[-1])
    part.register_forward_hook(lambda *call: seen.append(call))
    assert_close(tower(pixels()), expected, rtol=0, atol=1e-5)
    ((module, _, output),) = seen
    assert module is part
    states = output if isinstance(output, Tensor) else output[0]
    states = getattr(output, "last_hidden_state", states)
    assert states.shape == (6, 5, 32)


@torch.no_grad()  # with gradients, torch warns of its own
@pytest.mark.parametrize("compiled", ["tower", "model", "block", "returned"])
def test_what_is_compiled_runs_as_it_is(compiled: str) -> None:
    tower = new_tower("clip")
    expected, graphs = tower(pixels()), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    part = {"model": tower.model, "block": tower.blocks[-1]}.get(compiled, tower)
    if compiled == "returned":
        tower.model = torch.compile(tower.model, backend=backend)
    else:
        part.compile(backend=backend)
    assert_close(tower(pixels()), expected, rtol=0, atol=1e-5)
    compiled_once = len(graphs)
    assert compiled_once == 1 or compiled == "block"  # which has a graph more, or two
    for _ in range(2):
        assert_close(tower(pixels()), expected, rtol=0, atol=1e-5)
    assert len(graphs) == compiled_once


def test_a_tower_without_values_has_parts() -> None:
    tower = new_tower("clip").to("meta")
    trunk, head = tower.split(1)
    assert head(trunk(pixels().to("meta"))).shape == (6, 12)
    assert tower._anatomy() == new_tower("clip")._anatomy()


def test_splitting_leaves_each_module_in_its_mode() -> None:
    tower = new_tower("clip").train()
    tower.blocks[1].eval()
    modes = [part.training for part in tower.modules()]
    trunk, head = tower.split(2)
    assert [part.training for part in tower.modules()] == modes
    trunk(pixels())
    head.split(1)
    assert [part.training for part in tower.modules()] == modes


@pytest.mark.parametrize("kind", ["clip", "bare clip"])
@pytest.mark.parametrize("part", ["model", "encoder"])
def test_a_model_with_another_forward_is_not_split(kind: str, part: str) -> None:
    """As Accelerate's offloading gives it one."""
    tower = new_tower(kind)
    encoder = next(p for p in tower.modules() if type(p).__name__ == "CLIPEncoder")
    patched = tower.model if part == "model" else encoder
    patched.forward = patched.forward
    with pytest.raises(NotImplementedError, match="has a `forward` of its own"):
        tower.split(1)


# Halves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(BLOCKS + 1))
def test_head_after_trunk_is_the_tower_bit_for_bit(kind: str, k: int) -> None:
    tower = new_tower(kind)
    trunk, head = tower.split(k)
    features = trunk(pixels())
    assert features.shape == (6, 5 if kind != "siglip" else 4, 32)
    assert not features.requires_grad
    # The last block of CLIP computes the class token alone, but in a trunk.
    tolerance = 0 if k > 0 or kind == "siglip" else 1e-6
    assert_close(head(features), tower(pixels()), rtol=tolerance, atol=tolerance)
    assert_close(head(features.double()), tower(pixels()), rtol=tolerance, atol=tolerance)
    assert (trunk.embedding_dim, trunk.image_size) == (32, 16)
    assert (head.embedding_dim, head.image_size) == (tower.embedding_dim, 16)
    assert [*trunk.blocks, *head.blocks] == tower.blocks
    # The very parameters, under the tower's names.
    whole = dict(tower.named_parameters())
    assert all(parameter is whole[name] for name, parameter in head.named_parameters())
    assert {id(p) for part in (trunk, head) for p in part.parameters()} == set(
        map(id, whole.values())
    )


def test_the_trunk_is_always_in_evaluation_mode() -> None:
    tower = new_tower("clip")
    for block in tower.blocks:
        block.self_attn.dropout = 0.5
    expected = tower(pixels())
    trunk, head = tower.split(1)
    tower.train()
    assert not torch.equal(tower(pixels()), expected)
    features = trunk(pixels())
    assert all(part.training for part in tower.modules())
    tower.eval()
    assert_close(head(features), expected, rtol=0, atol=1e-6)


def test_a_head_can_be_split_again_and_frozen() -> None:
    tower = new_tower("clip")
    trunk, head = tower.split(2)
    middle, last = head.split(1)
    assert_close(last(middle(trunk(pixels()))), tower(pixels()), rtol=0, atol=1e-6)
    assert last.blocks == tower.blocks[-1:]
    head.freeze(all_but_last=1)
    assert {block_of(name) for name in trainable(head)} == {2, None}
    assert len(trainable(tower.blocks[0])) == len(list(tower.blocks[0].parameters()))


@pytest.mark.parametrize("to", [torch.float64, torch.device("meta")])
def test_a_part_moves_the_whole_tower(to: torch.dtype | torch.device) -> None:
    """Else the trunk would stay on the CPU when a fit moves the head to a GPU."""
    tower = new_tower("clip")
    trunk, head = tower.split(2)
    _, last = head.split(1)
    last.to(to)
    for part in (tower, trunk, head, last):
        tensors = [*part.parameters(), *(b for b in part.buffers() if b.is_floating_point())]
        assert {t.device if isinstance(to, torch.device) else t.dtype for t in tensors} == {to}
    assert "_whole" not in str(last)
    assert len(list(last.parameters())) < len(list(tower.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_of_the_head_are_ten_steps_of_the_tower(kind: str) -> None:
    labels, loss = torch.tensor([0, 0, 1, 1, 2, 2]), AllPairsCosineLoss(negatives="squared")
    whole, cut = new_tower(kind), new_tower(kind)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    whole.freeze(all_but_last=2)
    trunk, head = cut.split(2)
    features = trunk(pixels())
    for model, inputs in ((whole, pixels()), (head, features)):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()
    moved, apart = (
        torch.cat([(a[name] - b[name]).flatten() for name in before]).norm()
        for a, b in ((whole.state_dict(), before), (whole.state_dict(), cut.state_dict()))
    )
    assert moved > 0.01
    assert apart <= 1e-4 * moved


def test_halves_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    tower = new_tower("clip")
    trunk, head = tower.split(1)
    with pytest.raises(ValueError, match="`k` must be at most 3, the tower's blocks, got 4"):
        tower.split(4)
    with pytest.raises(TypeError, match=r"`k` must be an integer, got 1\.0"):
        tower.split(1.0)
    for part, name in ((trunk, "trunk"), (head, "head")):
        message = f"A {name} .* isn't {{}} alone. Use the tower that was split"
        with pytest.raises(NotImplementedError, match=message.format("saved")):
            part.save_pretrained(tmp_path / "head")
        with pytest.raises(NotImplementedError, match=message.format("exported")):
            part.export_onnx(tmp_path / "head.onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match=r"features, got Image.*cache_features\(trunk, dataset"):
        head.preprocess(Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match=r"must have shape \[5, 32\], got \[5, 16\]"):
        head.preprocess(torch.zeros(5, 16))
    with pytest.raises(TypeError, match=r"one PIL image, got Tensor.*head of `tower.split\(k\)`"):
        tower.preprocess(torch.zeros(5, 32))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert head.preprocess(torch.ones(5, 32, dtype=dtype)).dtype == torch.float32


# Adapters


def with_lora(tower: VisionTower, *, inside: bool = False, **options: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4} | options
    torch.manual_seed(5)
    if inside:
        tower.model = wrapped = peft.get_peft_model(tower.model, peft.LoraConfig(**options))
    else:
        wrapped = peft.get_peft_model(tower, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide a merge that is missing
                parameter.normal_(std=0.3)
    return wrapped


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_on_saving_and_stay_in_the_tower(
    kind: str, inside: bool, tmp_path: Path, images
) -> None:
    tower = new_tower(kind)
    plain = tower(pixels())
    names = {name.removeprefix("model.") for name in tower.state_dict()}
    wrapped = with_lora(tower, inside=inside)
    model = tower if inside else wrapped
    expected = model(pixels())
    assert (expected - plain).abs().max() > 0.01
    before = {name: value.clone() for name, value in tower.state_dict().items()}

    tower.save_pretrained(tmp_path)
    after = tower.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(pixels()), expected)

    saved = {
        name.removeprefix("vision_model.") for name in load_file(tmp_path / "model.safetensors")
    }
    assert saved == {name.removeprefix("vision_model.") for name in names}
    again = load_tower(tmp_path)
    assert_close(again(pixels()), expected, rtol=0, atol=1e-5)
    assert tower.fingerprint() == again.fingerprint()
    assert_close(embed_images(model, images), embed_images(again, images), rtol=0, atol=1e-5)
    assert evaluate(model, images).recall_at_1 == evaluate(again, images).recall_at_1
    trunk, head = tower.split(2)
    assert_close(head(trunk(pixels())), expected, rtol=0, atol=1e-5)
    assert len(trainable(head)) == 2 * 2 * 2


def test_modules_that_peft_trains_whole_are_saved(tmp_path: Path) -> None:
    tower = new_tower("clip")
    wrapped = with_lora(tower, modules_to_save=["visual_projection"])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    expected = wrapped(pixels())
    tower.save_pretrained(tmp_path)
    assert_close(load_tower(tmp_path)(pixels()), expected, rtol=0, atol=1e-5)


def test_freezing_never_unfreezes_what_peft_froze() -> None:
    tower = new_tower("clip")
    with_lora(tower)
    adapters = trainable(tower)
    assert all("lora_" in name for name in adapters)
    tower.freeze(all_but_last=1)
    assert trainable(tower) == {name for name in adapters if block_of(name) == 2}
    groups = layer_decay(tower, 1e-3, 0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [("block 3, matrices", 5e-4)]


def test_the_tower_inside_a_wrapped_one() -> None:
    tower = new_tower("clip")
    assert tower_of(tower) is tower
    message = r"`tower` must be a VisionTower, got Linear. `pairclip.load_tower` makes one"
    with pytest.raises(TypeError, match=message):
        tower_of(nn.Linear(2, 2))
    assert tower_of(with_lora(tower)) is tower
    plain = plain_tower()
    wrapped = with_lora(plain, target_modules=["1"])
    assert tower_of(wrapped) is plain
    merged = interpolate(plain_tower(), wrapped, 1)
    inputs = torch.randn(2, 3, 4, 4)
    assert_close(merged(inputs), wrapped(inputs))


# Rates per layer


@pytest.mark.parametrize("kind", KINDS)
def test_rates_fall_from_the_last_layer_to_the_first(kind: str) -> None:
    tower = new_tower(kind)
    groups = layer_decay(tower, 1e-3, 0.5, weight_decay=0.1)
    names = {id(p): name for name, p in tower.named_parameters()}
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            block = block_of(name)
            by_hand = {None: 6.25e-5 if is_before(name) else 1e-3, 0: 1.25e-4, 1: 2.5e-4, 2: 5e-4}
            assert group["lr"] == pytest.approx(by_hand[block], rel=1e-12)
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
    assert len({group["name"] for group in groups}) == len(groups)
    assert groups[0]["name"].startswith("after, ")
    torch.optim.AdamW(groups)


def test_only_trainable_parameters_get_a_rate() -> None:
    tower = new_tower("clip")
    tower.freeze(all_but_last=1)
    groups = layer_decay(tower, 1e-3, 0.75)
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in tower.parameters() if p.requires_grad
    }
    tower.freeze("model")
    with pytest.raises(ValueError, match="`tower` has no trainable parameter"):
        layer_decay(tower, 1e-3, 0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.5), "`rate` must be positive and finite, got 0.0"),
        ((1e-3, 0.0), r"`decay` must be in \(0, 1\], got 0.0"),
        ((1e-3, 1.5), r"`decay` must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_rates(arguments: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_decay(new_tower("clip"), *arguments)
    with pytest.raises(ValueError, match="`weight_decay` must be at least 0, got -1"):
        layer_decay(new_tower("clip"), 1e-3, 0.5, weight_decay=-1)
    with pytest.raises(TypeError, match="`rate` must be a number, got '1'"):
        layer_decay(new_tower("clip"), "1", 0.5)


# Blends


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_blend_is_the_weighted_mean_of_the_weights(kind: str, alpha: float) -> None:
    base, tuned = new_tower(kind), new_tower(kind, seed=1)
    before = [copy.deepcopy(tower.state_dict()) for tower in (base, tuned)]
    blend = interpolate(base, tuned, alpha)
    for name, value in blend.state_dict().items():
        own, other = (state[name].double() for state in before)
        assert_close(value.double(), (1 - alpha) * own + alpha * other, rtol=0, atol=1e-7)
    if alpha in (0, 1):
        assert torch.equal(blend(pixels()), (base, tuned)[alpha](pixels()))
    for tower, state in zip((base, tuned), before, strict=True):
        assert all(torch.equal(value, state[n]) for n, value in tower.state_dict().items())
        assert not {id(p) for p in tower.parameters()} & {id(p) for p in blend.parameters()}
    assert type(blend) is type(base)


def test_half_precision_is_blended_in_float32() -> None:
    base, tuned = (new_tower("clip", seed).to(torch.bfloat16) for seed in (0, 1))
    blend = interpolate(base, tuned, 0.3).model.visual_projection.weight
    own, other = (tower.model.visual_projection.weight.float() for tower in (base, tuned))
    assert torch.equal(blend, torch.lerp(own, other, 0.3).to(torch.bfloat16))


def test_adapters_are_merged_into_a_blend() -> None:
    base, tuned = new_tower("clip"), new_tower("clip")
    wrapped = with_lora(tuned)
    before = wrapped(pixels())
    assert_close(interpolate(base, wrapped, 1)(pixels()), before, rtol=0, atol=1e-5)
    assert_close(interpolate(wrapped, base, 0)(pixels()), before, rtol=0, atol=1e-5)
    assert torch.equal(interpolate(base, tuned, 0)(pixels()), base(pixels()))
    assert torch.equal(wrapped(pixels()), before)


def test_towers_that_cannot_be_blended() -> None:
    tower = new_tower("clip")
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got 1.5"):
        interpolate(tower, tower, 1.5)
    message = r"differs, `visual_projection.weight`, is \[12, 32\] in `base` and none in `tuned`"
    with pytest.raises(ValueError, match=message):
        interpolate(tower, new_tower("bare clip"), 0.5)
    with pytest.raises(ValueError, match=r"`1.weight`, is \[6, 48\] in `base` and \[7, 48\] in"):
        interpolate(plain_tower(), plain_tower(width=7), 0.5)
    other = new_tower("clip")
    other.image_processor.image_std = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="preprocess images differently, so no blend fits both"):
        interpolate(tower, other, 0.5)
    with pytest.raises(TypeError, match="`tower` must be a VisionTower, got Linear"):
        interpolate(tower, nn.Linear(2, 2), 0.5)
    trunk, head = tower.split(1)
    for one, other in ((trunk, trunk), (head, tower), (trunk, head)):
        with pytest.raises(ValueError, match="A trunk can't be blended, nor a head with a tower"):
            interpolate(one, other, 0.5)


def test_the_blend_of_heads_is_the_head_of_the_blend() -> None:
    towers = random_tower(depth=2), random_tower(depth=2, seed=1)
    (trunk, head), (_, other) = (tower.split(1) for tower in towers)
    features = trunk(torch.rand(2, 3, 16, 16))
    blend = interpolate(head, other, 0.25)
    whole = interpolate(*towers, 0.25)
    expected = whole.split(1)[1]
    assert blend(features).equal(expected(features))
    assert blend.fingerprint() == expected.fingerprint()


def test_a_blend_has_hooks_of_its_own() -> None:
    base, seen = plain_tower(), []
    blend = interpolate(base, base, 0.5)
    blend.register_forward_hook(lambda *_: seen.append("blend"))
    base(torch.zeros(1, 3, 4, 4))
    assert seen == []
    blend(torch.zeros(1, 3, 4, 4))
    assert seen == ["blend"]


def test_counts_are_not_blended() -> None:
    base, tuned = (
        load_tower(
            nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()),
            image_processor=transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()]),
        )
        for _ in range(2)
    )
    tuned.model[0].num_batches_tracked += 8
    assert int(interpolate(base, tuned, 0.5).model[0].num_batches_tracked) == 8
    assert int(interpolate(base, tuned, 0).model[0].num_batches_tracked) == 0
