"""The training loop, against a loop written by hand."""

import copy
import json
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import BatchSampler, SequentialSampler

from pairclip import (
    AllPairsCosineLoss,
    Callback,
    ClassBalancedSampler,
    CosinePairLoss,
    Evaluation,
    Finetuner,
    History,
    PairSampler,
    VisionTower,
    all_pairs_cosine_loss,
    cosine_pair_loss,
    evaluate,
    load_tower,
    newest_checkpoint,
    on_pairs,
)
from pairclip.callbacks import FitState
from pairclip.datasets.loading import HostLoader
from pairclip.finetuner import accelerators

SQUARED = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def pixels_of(tower: VisionTower, pictures: np.ndarray) -> torch.Tensor:
    return torch.stack([tower.preprocess(Image.fromarray(picture)) for picture in pictures])


def test_it_trains_as_a_loop_by_hand_does(tower, images) -> None:
    pictures, labels = images
    by_hand = copy.deepcopy(tower)
    sampler = ClassBalancedSampler(labels, 3, 4, seed=5)
    finetuner = Finetuner(tower, SQUARED, optimizer=sgd, schedule="linear", warmup_ratio=0.25)
    history = finetuner.fit(images, sampler=sampler, epochs=2)

    pixels, classes = pixels_of(by_hand, pictures), torch.tensor(labels)
    sampler = ClassBalancedSampler(labels, 3, 4, seed=5)
    optimizer = sgd(list(by_hand.parameters()))
    by_hand.train()
    losses = []
    factors = [1 / 3, 2 / 3, *(1 - i / 6 for i in range(6))]
    for epoch in range(2):
        for number, batch in enumerate(sampler):
            optimizer.param_groups[0]["lr"] = 0.05 * factors[4 * epoch + number]
            loss = all_pairs_cosine_loss(
                by_hand(pixels[batch]), classes[batch], negatives="squared", positive_fraction=0.5
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    assert_close(weights(tower), weights(by_hand))
    assert [record["loss"] for record in history.steps] == pytest.approx(losses)
    assert [record["learning_rate"] for record in history.steps] == pytest.approx(
        [0.05 * factor for factor in factors]
    )
    assert [record["epoch"] for record in history.steps] == [0] * 4 + [1] * 4
    assert [record["step"] for record in history.steps] == list(range(1, 9))


def test_a_pair_loss_takes_the_pairs_of_its_sampler(tower, images) -> None:
    pictures, labels = images
    by_hand = copy.deepcopy(tower)
    history = Finetuner(tower, CosinePairLoss(), optimizer=sgd, schedule="constant").fit(
        images, batch_size=16, max_steps=1
    )
    batch = next(iter(PairSampler(labels, 8, seed=0)))
    classes = torch.tensor(labels)[batch]
    embeddings = by_hand.train()(pixels_of(by_hand, pictures[batch]))
    expected = cosine_pair_loss(
        *PairSampler.split(embeddings), classes[0::2] == classes[1::2]
    ).item()
    assert history.steps[0]["loss"] == pytest.approx(expected)


def test_it_learns_to_tell_the_classes_apart(tower, images) -> None:
    before = evaluate(tower, images)
    Finetuner(tower, SQUARED, learning_rate=3e-3).fit(images, batch_size=24, epochs=15)
    after = evaluate(tower, images)
    assert after.mean_average_precision > max(0.95, before.mean_average_precision + 0.1)
    assert after.gap > before.gap + 0.5


def test_a_loss_of_pytorch_metric_learning_and_its_parameters_train(tower, images) -> None:
    loss = pml.ArcFaceLoss(num_classes=3, embedding_size=12)
    before = weights(loss)
    history = Finetuner(tower, loss, learning_rate=1e-3).fit(images, batch_size=24, epochs=5)
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    assert not weights(loss)["W"].equal(before["W"])


def test_default_batches_hold_several_images_of_several_classes(tower, images) -> None:
    seen = []

    def loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(sorted(Counter(labels.tolist()).values()))
        return SQUARED(embeddings, labels)

    Finetuner(tower, loss).fit(images, batch_size=12, max_steps=1)
    Finetuner(tower, loss).fit(images, batch_size=16, max_steps=1)
    assert seen == [[4, 4, 4], [8, 8]]


def test_classes_that_allow_no_balanced_batch_get_pairs(tower, images) -> None:
    pictures, _ = images
    labels = [0, 0, 0, 1, 1, 1]
    with pytest.warns(UserWarning, match="Batches of 10 images can't hold equally many"):
        history = Finetuner(tower, SQUARED).fit((pictures[:6], labels), batch_size=10, max_steps=2)
    assert len(history.steps) == 2


def test_no_class_of_two_images_is_left_out_by_default(tower, images) -> None:
    pictures, _ = images
    labels = [0] * 20 + [1] * 20 + [2] * 4 + [3] * 4
    seen: Counter[int] = Counter()

    def loss(embeddings: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        seen.update(of.tolist())
        return SQUARED(embeddings, of)

    Finetuner(tower, loss).fit((pictures, labels), batch_size=16, epochs=2)
    assert set(seen) == {0, 1, 2, 3}
    with pytest.warns(UserWarning, match="Batches of 24 images can't hold equally many"):
        Finetuner(tower, loss).fit((pictures, labels), batch_size=24, epochs=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_seed_gives_the_same_weights_whatever_the_workers(
    tower, images, num_workers
) -> None:
    class Jittered:
        """Draws from all three global generators."""

        def __init__(self, transform) -> None:
            self.transform = transform

        def __call__(self, image: Image.Image) -> torch.Tensor:
            shift = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            return self.transform(image) + shift

    expected = None
    for workers, global_seed in ((0, 1), (num_workers, 2)):
        torch.manual_seed(global_seed)
        copied = copy.deepcopy(tower)
        inner = copied.preprocess
        copied.preprocess = Jittered(inner)
        Finetuner(copied, SQUARED, seed=3).fit(
            images, batch_size=12, max_steps=5, num_workers=workers
        )
        expected = expected or weights(copied)
        for name, value in weights(copied).items():
            assert value.equal(expected[name]), name


def test_global_generators_are_as_before(tower, images) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    Finetuner(tower, SQUARED).fit(images, batch_size=12, max_steps=2)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_evaluations_come_after_each_epoch_or_as_often_as_asked(tower, images) -> None:
    finetuner = Finetuner(tower, SQUARED)
    history = finetuner.fit(images, batch_size=12, epochs=2, eval_dataset=images)
    assert [record["step"] for record in history.evaluations] == [4, 8]
    history = finetuner.fit(images, batch_size=12, max_steps=5, eval_dataset=images, eval_every=2)
    assert [record["step"] for record in history.evaluations] == [2, 4, 5]
    expected = evaluate(tower, images).to_dict()
    single = {key: value for key, value in expected.items() if isinstance(value, (int, float))}
    assert history.evaluations[-1] == {"step": 5, **single}


def test_gradients_are_gone_after_each_step(tower, images) -> None:
    class Look(Callback):
        def on_step(self, fit: FitState) -> None:
            looked.append([p.grad is None for p in fit.parameters])

    looked: list[list[bool]] = []
    Finetuner(tower, SQUARED, callbacks=[Look()]).fit(images, batch_size=12, max_steps=2)
    assert len(looked) == 2
    assert all(map(all, looked))


def test_an_evaluation_lists_no_arrays(tower, images, monkeypatch) -> None:
    """The similarities of 11,000 classes are 128 million numbers, and only figures are kept."""

    def refuse(self: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Evaluation, "to_dict", refuse)
    history = Finetuner(tower, SQUARED).fit(images, batch_size=12, max_steps=1, eval_dataset=images)
    assert {type(value) for value in history.evaluations[0].values()} == {int, float}


@pytest.mark.parametrize("saves", [False, True])
def test_evaluations_load_in_workers_too(
    tower, images, monkeypatch, tmp_path: Path, saves: bool
) -> None:
    loaders = []

    def seen(pixels: object, **options: object) -> object:
        loaders.append(options)
        return HostLoader(pixels, **options)

    monkeypatch.setattr("pairclip.embedding.pixels.HostLoader", seen)
    where = {"checkpoint_dir": tmp_path} if saves else {}
    Finetuner(tower, SQUARED).fit(
        images, batch_size=12, max_steps=1, eval_dataset=images, num_workers=1, **where
    )
    (options,) = loaders
    assert options["num_workers"] == 1
    # As the workers of the training, they leave Ctrl-C to the main process.
    assert (options["worker_init_fn"] is not None) == saves


def test_history_goes_to_json_and_back(tower, images, tmp_path: Path) -> None:
    history = Finetuner(tower, SQUARED).fit(images, batch_size=12, max_steps=2, eval_dataset=images)
    history.to_json(tmp_path / "history.json")
    assert History.from_json(tmp_path / "history.json") == history
    json.loads((tmp_path / "history.json").read_text())


def test_only_trainable_parameters_change_and_modes_are_as_before(tower, images) -> None:
    tower.eval()
    tower.model.vision_model.requires_grad_(False)
    before = weights(tower)
    Finetuner(tower, SQUARED, learning_rate=1e-2).fit(images, batch_size=12, max_steps=3)
    changed = {name for name, value in weights(tower).items() if not value.equal(before[name])}
    assert changed == {"model.visual_projection.weight"}
    assert not any(module.training for module in tower.modules())
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_weight_decay_is_for_matrices_only(tower, images) -> None:
    before = weights(tower)

    def none_at_all(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return embeddings.sum() * 0

    Finetuner(
        tower, none_at_all, learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_ratio=0
    ).fit(images, batch_size=12, max_steps=1)
    for name, value in weights(tower).items():
        factor = 0.95 if before[name].ndim >= 2 and before[name].is_floating_point() else 1
        if "position_ids" not in name:
            assert_close(value, before[name] * factor, msg=name)


def test_bfloat16_trains_and_hands_the_loss_float32(tower, images) -> None:
    seen = []

    def loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((embeddings.dtype, (embeddings @ embeddings.T).dtype))
        return SQUARED(embeddings, labels)

    Finetuner(tower, loss).fit(images, batch_size=12, max_steps=1)
    history = Finetuner(tower, loss, precision="bf16").fit(images, batch_size=12, max_steps=2)
    full = Finetuner(tower, loss).fit(images, batch_size=12, max_steps=1)
    assert history.steps[0]["loss"] != full.steps[0]["loss"]
    assert seen == [(torch.float32, torch.float32)] * 4
    assert all(math.isfinite(record["loss"]) for record in history.steps)


@pytest.mark.parametrize("what", ["loss", "embedding", "gradient"])
@pytest.mark.parametrize("step", [1, 3])
def test_what_is_not_finite_changes_no_weight(tower, images, what: str, step: int) -> None:
    before = []

    def loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        before.append(weights(tower))
        value = SQUARED(embeddings, labels)
        if len(before) < step:
            return value
        if what == "embedding":
            embeddings.data[0, 0] = float("inf")
            return value
        return value * float("nan") if what == "loss" else Poisoned.apply(value)

    words = {"loss": "the loss is nan", "embedding": "an embedding is", "gradient": "gradient's"}
    with pytest.raises(
        FloatingPointError, match=f"Stopped at step {step} of 30: .*{words[what]}.* before this"
    ):
        Finetuner(tower, loss, learning_rate=1e-3).fit(images, batch_size=12, max_steps=30)
    assert len(before) == step
    for name, value in weights(tower).items():
        assert value.equal(before[-1][name]), name


class Poisoned(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


@pytest.mark.parametrize("evaluated", [True, False])
def test_weights_that_overflow_are_neither_evaluated_nor_returned(
    tower, images, evaluated: bool
) -> None:
    def huge(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e38)

    def steep(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return SQUARED(embeddings, labels) * 1e10

    evaluation = {"eval_dataset": images, "eval_every": 1} if evaluated else {}
    steps = 4 if evaluated else 1
    with pytest.raises(
        FloatingPointError, match=f"Stopped at step 1 of {steps}: a weight .* lower `learning_rate`"
    ):
        Finetuner(tower, steep, optimizer=huge, max_grad_norm=None, warmup_ratio=0).fit(
            images, batch_size=12, max_steps=steps, **evaluation
        )


def test_batch_norms_keep_the_statistics_from_before_a_batch_that_is_not_finite(images) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 4))
    shown = []

    def preprocess(image: Image.Image) -> torch.Tensor:
        shown.append(image)
        return ToTensor()(image) * (float("nan") if len(shown) == 27 else 1)

    tower = load_tower(module, image_processor=preprocess)
    shown.clear()
    kept = []

    class Keep(Callback):
        def on_step(self, fit) -> None:
            kept.append({name: value.clone() for name, value in tower.state_dict().items()})

    with pytest.raises(FloatingPointError, match="Stopped at step 3 of 4: an embedding"):
        Finetuner(tower, SQUARED, callbacks=[Keep()]).fit(images, batch_size=12, max_steps=4)
    assert len(kept) == 2
    assert kept[1]["model.1.num_batches_tracked"] == 2
    for name, value in tower.state_dict().items():
        assert value.equal(kept[1][name]), name


class ToTensor:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)
        return pixels / 255 - 0.5


def test_an_optimizer_of_some_parameters_leaves_the_others_out_of_the_norm(tower, images) -> None:
    def last(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters[-1:], lr=1e-12)

    frozen = copy.deepcopy(tower)
    *others, _ = frozen.parameters()
    for parameter in others:
        parameter.requires_grad_(False)
    found = Finetuner(tower, SQUARED, optimizer=last).fit(images, batch_size=12, max_steps=3)
    expected = Finetuner(frozen, SQUARED, optimizer=last).fit(images, batch_size=12, max_steps=3)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


def test_weights_in_half_precision_are_refused(tower, images) -> None:
    tower.bfloat16()
    with pytest.raises(ValueError, match=r"trainable parameter .* in torch\.bfloat16.*float\(\)"):
        Finetuner(tower, SQUARED).fit(images, batch_size=12)


def test_parameters_of_a_loss_in_half_precision_are_called_so(tower, images) -> None:
    loss = pml.ArcFaceLoss(num_classes=3, embedding_size=12).half()
    with pytest.raises(ValueError, match=r"`loss` has the .* W in torch\.float16.*`loss\.float"):
        Finetuner(tower, loss).fit(images, batch_size=12)


def test_a_batch_norm_without_parameters_is_not_told_to_freeze_them(images) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8, affine=False))
    tower = load_tower(module, image_processor=ToTensor())
    with pytest.raises(ValueError, match=r"`model\.2`.*has no parameters to freeze, so train in"):
        Finetuner(tower, SQUARED, micro_batch_size=4).fit(images, batch_size=12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_bfloat16_only_where_the_device_of_the_fit_has_it(monkeypatch, device) -> None:
    state = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(accelerators, "PartialState", lambda cpu: state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A GPU that emulates bfloat16, or one that has it beside a fit on the CPU.
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: device == "cpu" or including_emulation,
    )
    monkeypatch.setattr(accelerators, "Accelerator", lambda mixed_precision: mixed_precision)
    assert accelerators.new_accelerator("auto") == "no"
    if device == "cpu":
        with pytest.raises(ValueError, match="`precision` 'fp16' needs a GPU, got the CPU"):
            accelerators.new_accelerator("fp16")


def test_a_mac_is_told_to_use_the_cpu(tower, images, monkeypatch) -> None:
    monkeypatch.setattr(Accelerator, "device", torch.device("mps"))
    for accelerator in (None, Accelerator(cpu=True)):
        with pytest.raises(ValueError, match=r"'mps', which has no float64.*ACCELERATE_USE_CPU"):
            Finetuner(tower, SQUARED, accelerator=accelerator).fit(images, batch_size=12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_needs_a_gpu(tower, images) -> None:
    with pytest.raises(ValueError, match="`precision` 'fp16' needs a GPU"):
        Finetuner(tower, SQUARED, precision="fp16").fit(images, batch_size=12)


def test_an_evaluation_does_not_change_the_training(tower, images) -> None:
    tower.model.vision_model.embeddings.register_forward_hook(
        lambda module, inputs, output: nn.functional.dropout(output, 0.1, module.training)
    )
    other = copy.deepcopy(tower)
    arguments = {"batch_size": 12, "max_steps": 3}
    alone = Finetuner(tower, SQUARED).fit(images, **arguments)
    watched = Finetuner(other, SQUARED).fit(images, **arguments, eval_dataset=images, eval_every=1)
    assert [s["loss"] for s in alone.steps] == [s["loss"] for s in watched.steps]


def test_any_module_with_a_preprocess_trains(images) -> None:
    tower = load_tower(nn.Sequential(nn.Flatten(), nn.Linear(768, 8)), image_processor=ToTensor())
    history = Finetuner(tower, SQUARED, learning_rate=1e-2).fit(images, batch_size=24, epochs=10)
    assert history.steps[-1]["loss"] < history.steps[0]["loss"] / 2


def test_a_class_of_one_image_trains_and_is_counted_in_one_warning(tower, images) -> None:
    pictures, labels = images
    labels = [*labels[:-1], 9]
    with pytest.warns(UserWarning, match="1 of 4 classes have one item") as caught:
        Finetuner(tower, CosinePairLoss()).fit((pictures, labels), batch_size=12, epochs=2)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="1 of 4 classes have fewer than 4 items") as caught:
        Finetuner(tower, SQUARED).fit((pictures, labels), batch_size=12, epochs=2)
    assert len(caught) == 1


def test_a_corrupt_image_is_named_by_a_worker_too(tower, images, tmp_path: Path) -> None:
    pictures, labels = images
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    paths[5].write_bytes(b"nothing")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"Image 5 \(.*5\.png\) can't be read"):
            Finetuner(tower, SQUARED).fit(
                (paths, labels), batch_size=12, epochs=1, num_workers=workers
            )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "cosine"}, TypeError, "`loss` must be a callable.*got 'cosine'"),
        ({"loss": AllPairsCosineLoss}, TypeError, "`loss` must be a callable, such as an instance"),
        ({"learning_rate": "1e-5"}, TypeError, "`learning_rate` must be a number, got '1e-5'"),
        ({"seed": -1}, ValueError, "`seed` must not be negative, got -1"),
        ({"optimizer": "adam"}, TypeError, "`optimizer` must be a callable that takes"),
        ({"learning_rate": 0.0}, ValueError, r"`learning_rate` must be in \(0, inf\), got 0\.0"),
        (
            {"learning_rate": math.nan},
            ValueError,
            r"`learning_rate` must be in \(0, inf\)",
        ),
        ({"weight_decay": -1.0}, ValueError, r"`weight_decay` must be in \[0, inf\), got -1"),
        ({"warmup_ratio": 1.0}, ValueError, r"`warmup_ratio` must be in \[0, 1\), got 1"),
        ({"schedule": "step"}, ValueError, "`schedule` must be one of 'cosine', 'linear', 'const"),
        ({"precision": "half"}, ValueError, "`precision` must be one of 'auto'"),
        (
            {"max_grad_norm": 0.0},
            ValueError,
            r"`max_grad_norm` must be in .* got 0\.0\. None clips",
        ),
        (
            {"optimizer": sgd, "learning_rate": 1e-3},
            ValueError,
            r"`learning_rate` 0\.001 and `weight_decay` 0\.0 .* Set them in the `optimizer`",
        ),
    ],
)
def test_wrong_settings_are_errors(tower, arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Finetuner(tower, **{"loss": SQUARED, **arguments})


def test_a_tower_must_be_one() -> None:
    with pytest.raises(TypeError, match="`tower` must be a VisionTower, got Linear"):
        Finetuner(nn.Linear(2, 2), SQUARED)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1, got 0"),
        ({"epochs": 2, "max_steps": 3}, ValueError, "`epochs` 2 would be ignored"),
        ({"max_steps": 0}, ValueError, "`max_steps` must be at least 1"),
        ({"eval_every": 2}, ValueError, "`eval_every` 2 would be ignored"),
        ({"num_workers": -1}, ValueError, "`num_workers` must not be negative, got -1"),
        ({"num_workers": 1.5}, TypeError, r"`num_workers` must be an integer, got 1\.5"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"batch_size": 31}, ValueError, "`batch_size` must be even for pairs, got 31"),
        ({"batch_size": 466}, ValueError, "`batch_size` must be at most two per image"),
        (
            {"sampler": BatchSampler(SequentialSampler(range(48)), 100, drop_last=True)},
            ValueError,
            "`sampler` has no batch",
        ),
        ({"sampler": 3}, TypeError, "`sampler` must have `__iter__` and `__len__`, got 3"),
        (
            {"sampler": ClassBalancedSampler([0, 0, 1, 1], 2, 2), "batch_size": 4},
            ValueError,
            "`batch_size` 4 would be ignored: `sampler` decides",
        ),
    ],
)
def test_wrong_fits_are_errors(tower, images, arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Finetuner(tower, SQUARED).fit(images, **arguments)


def test_a_pair_loss_refuses_other_batches(tower, images) -> None:
    sampler = ClassBalancedSampler(images[1], 3, 4)
    with pytest.raises(ValueError, match="takes the pairs of a `PairSampler`, got ClassBalanced"):
        Finetuner(tower, CosinePairLoss()).fit(images, sampler=sampler)


def test_a_pair_loss_of_ones_own_takes_the_pairs_of_a_sampler(tower, images) -> None:
    own, theirs = copy.deepcopy(tower), tower

    def half(a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        return cosine_pair_loss(a, b, same) / 2

    for sampler in (None, PairSampler(images[1], 8, seed=3)):
        losses = []
        for of, loss in ((own, on_pairs(half)), (theirs, CosinePairLoss())):
            size = {} if sampler else {"batch_size": 16}
            history = Finetuner(of, loss).fit(images, sampler=sampler, max_steps=1, **size)
            losses.append(history.steps[0]["loss"])
        assert losses[0] == pytest.approx(losses[1] / 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"evaluate": {}}, TypeError, "`evaluate` must be a callable that takes the tower, got"),
        (
            {"evaluate": dict, "eval_dataset": (np.zeros((2, 8, 8, 3), np.uint8), [0, 0])},
            ValueError,
            "`eval_dataset` would be ignored",
        ),
        ({"evaluate": dict, "eval_every": 0}, ValueError, "`eval_every` must be at least 1"),
        ({"eval_every": 2}, ValueError, "`eval_every` 2 would be ignored: there is no `eval_data"),
    ],
)
def test_wrong_evaluations_are_errors(tower, images, arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Finetuner(tower, SQUARED).fit(images, **arguments)


def test_an_evaluation_of_your_own_gives_numbers_of_any_type(tower, images, tmp_path: Path) -> None:
    numbers = {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3), "d": 1, "e": [1]}
    numbers |= {"step": 99, "mean_average_precision": math.inf}
    history = Finetuner(tower, SQUARED).fit(
        images, batch_size=12, max_steps=1, evaluate=lambda _: numbers, checkpoint_dir=tmp_path
    )
    assert history.evaluations == [
        {"step": 1, "a": 0.5, "b": 0.25, "c": 3.0, "d": 1, "mean_average_precision": None}
    ]
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.figure is None
    with pytest.raises(TypeError, match="`evaluate` must return numbers by name, a dict, got floa"):
        Finetuner(tower, SQUARED).fit(images, batch_size=12, max_steps=1, evaluate=lambda _: 0.5)


def test_settings_can_be_read_and_not_set(tower) -> None:
    finetuner = Finetuner(tower, SQUARED, learning_rate=0.5, schedule="linear", seed=np.int64(3))
    assert (finetuner.learning_rate, finetuner.schedule, finetuner.seed) == (0.5, "linear", 3)
    assert finetuner.max_grad_norm == finetuner.settings.max_grad_norm == 1.0
    with pytest.raises(AttributeError):
        finetuner.learning_rate = 0.1


def test_one_class_alone_can_form_no_batch(tower, images) -> None:
    pictures, labels = images
    for loss in (SQUARED, CosinePairLoss()):
        with pytest.raises(ValueError, match="one class alone"):
            Finetuner(tower, loss).fit((pictures, [0] * len(labels)), batch_size=12)


def test_a_frozen_tower_is_refused(tower, images) -> None:
    tower.requires_grad_(False)
    with pytest.raises(ValueError, match="`tower` has no trainable parameter"):
        Finetuner(tower, SQUARED).fit(images, batch_size=12)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda e, y: e.sum(dim=1), r"must return one number for the batch, got shape \[12\]"),
        (lambda e, y: 0.5, r"must return one number for the batch, got 0\.5"),
        (lambda e, y: e.detach().sum(), "returned a value without a gradient"),
        (CosinePairLoss(reduction="none"), "must return one number for the batch, got shape"),
    ],
)
def test_a_loss_must_give_one_number_with_a_gradient(tower, images, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Finetuner(tower, value).fit(images, batch_size=12, max_steps=1)


class Lists:
    """A batch sampler that yields what it was given, and says any length."""

    def __init__(self, batches: list, length: int) -> None:
        self.batches, self.length = batches, length

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (Lists([[0, 1, 2]], 2), ValueError, "yielded only 1 batches in epoch 0, but its len"),
        (Lists([[0, 1, 2]] * 3, 2), ValueError, "yielded more batches in epoch 0, but its len"),
        (Lists([0, 1], 2), TypeError, "must yield batches, lists of indices, got 0"),
        (Lists([[0, 48]], 1), ValueError, r"indices must be in \[0, 48\)"),
        (Lists([[-1, 0]], 1), ValueError, r"indices must be in \[0, 48\)"),
        (Lists([[]], 1), ValueError, "indices must be in"),
    ],
)
def test_samplers_that_break_their_word_are_errors(tower, images, sampler, error, message) -> None:
    with pytest.raises(error, match=message):
        Finetuner(tower, SQUARED).fit(images, sampler=sampler, epochs=2)


def test_a_batch_sampler_of_torch_is_taken(tower, images) -> None:
    sampler = BatchSampler(SequentialSampler(range(48)), 10, drop_last=False)
    assert len(Finetuner(tower, SQUARED).fit(images, sampler=sampler, epochs=2).steps) == 10


def test_no_progress_bar_where_the_output_is_no_terminal(tower, images, capfd) -> None:
    Finetuner(tower, SQUARED).fit(images, batch_size=12, max_steps=2)
    assert capfd.readouterr().err == ""
