"""The exact step in one process: micro-batches, randomness, Accelerators, memory, refusals.

`test_processes.py` does the same with several processes.
"""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings, strategies as st
from processes import small
from processes.cases import noisy_losses
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pairclip import AllPairsCosineLoss, Callback, CosinePairLoss, Finetuner
from pairclip.finetuner.exact_gradient import backward

SQUARED = AllPairsCosineLoss(negatives="squared", positive_fraction=0.3)


@pytest.fixture(autouse=True)
def _no_accelerator_of_another_test() -> Iterator[None]:
    for start in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if start:
            yield


def squared_by_hand(extra: nn.Module | None = None, steps: int = 1) -> tuple[Any, Any, Any]:
    return small.by_hand(
        small.new_tower(extra),
        small.naive_loss("squared"),
        small.shuffled_batches(),
        steps=steps,
    )


def squared_fit(extra: nn.Module | None = None, **arguments: Any) -> tuple[Any, Any, Any]:
    return small.fit(small.new_tower(extra), SQUARED, small.new_sampler("squared"), **arguments)


# Gradients and weights


@pytest.mark.parametrize("name", small.LOSSES)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name: str) -> None:
    wanted, _, _ = small.by_hand(
        small.new_tower(), small.naive_loss(name), [next(iter(small.new_sampler(name)))]
    )
    for size in (None, 16, 4, 5, 31, 100):
        found, _, _ = small.fit(
            small.new_tower(), small.new_loss(name), small.new_sampler(name), micro_batch_size=size
        )
        small.assert_same_gradient(found, wanted)


@pytest.mark.parametrize("name", small.LOSSES)
def test_plain_steps_with_micro_batches_end_where_whole_batches_do(name: str) -> None:
    tower, loss, sampler = small.new_tower(), small.naive_loss(name), small.new_sampler(name)
    start = small.weights(tower, loss)
    batches = [batch for _ in range(small.STEPS) for batch in sampler][: small.STEPS]
    _, wanted, losses = small.by_hand(tower, loss, batches, steps=small.STEPS)
    for size in (None, 5):
        _, found, history = small.fit(
            small.new_tower(),
            small.new_loss(name),
            small.new_sampler(name),
            micro_batch_size=size,
            steps=small.STEPS,
        )
        small.assert_same_training(found, wanted, start)
        assert [record["loss"] for record in history.steps] == pytest.approx(losses, rel=1e-4)


@given(
    batch=st.integers(1, 12),
    micro=st.none() | st.integers(1, 14),
    seed=st.integers(0, 5),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_batch_and_any_micro_batch(batch: int, micro: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 6, generator=generator)
    labels = torch.randint(3, (batch,), generator=generator)
    matrix = torch.randn(4, 6, generator=generator).requires_grad_()
    model = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(matrix)

    def loss(embeddings: Tensor, of: Tensor) -> Tensor:
        # Neither a sum nor a mean of terms of one item each.
        return (embeddings.tanh() @ embeddings.T).logsumexp(dim=(0, 1)) * (1 + of.float().mean())

    result = backward(
        model,
        loss,
        pixels,
        labels,
        parameters=list(model.parameters()),
        accelerator=Accelerator(cpu=True),
        micro_batch_size=micro,
        seed=(0, 1),
    )
    wanted = loss(pixels @ matrix.T, labels)
    wanted.backward()
    torch.testing.assert_close(result.loss, wanted.detach())
    torch.testing.assert_close(model.weight.grad, matrix.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.embeddings, (pixels @ matrix.T).detach())
    assert result.labels.equal(labels)


def test_batches_of_different_sizes() -> None:
    order = [index for batch in small.shuffled_batches() for index in batch]
    batches = [order[:20], order[20:27], order[27:28], order[28:]]
    start = small.weights(small.new_tower())
    wanted = small.by_hand(small.new_tower(), small.naive_loss("linear"), batches[:2], steps=2)[1]
    found = small.fit(
        small.new_tower(),
        AllPairsCosineLoss(),
        small.Batches(batches),
        micro_batch_size=8,
        steps=2,
    )[1]
    small.assert_same_training(found, wanted, start)
    sizes = []

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        sizes.append((len(embeddings), len(labels)))
        return embeddings.square().mean()

    small.fit(small.new_tower(), loss, small.Batches(batches), micro_batch_size=8, steps=4)
    assert sizes == [(20, 20), (7, 7), (1, 1), (36, 36)]


@pytest.mark.parametrize(("micro", "passes"), [(None, 1), (32, 1), (8, 2), (5, 2)])
def test_each_image_is_encoded_once_or_with_micro_batches_twice(
    micro: int | None, passes: int
) -> None:
    counts = {True: 0, False: 0}
    largest = 0

    class Counting(nn.Module):
        def forward(self, embeddings: Tensor) -> Tensor:
            nonlocal largest
            if self.training:
                counts[torch.is_grad_enabled()] += len(embeddings)
                largest = max(largest, len(embeddings))
            return embeddings

    squared_fit(Counting(), micro_batch_size=micro, steps=2)
    assert counts == {True: 64, False: 64 * (passes - 1)}
    assert largest == (micro or 32)


@pytest.mark.parametrize("micro", [None, 5])
def test_what_a_loss_is_given(micro: int | None) -> None:
    seen = []

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        seen.append((embeddings, labels))
        assert embeddings.is_leaf
        assert embeddings.requires_grad
        assert not torch.is_autocast_enabled("cpu")
        assert (embeddings @ embeddings.T).dtype == torch.float32
        return SQUARED(embeddings, labels).reshape(1)

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        _, _, history = small.fit(
            small.new_tower(),
            loss,
            small.new_sampler("squared"),
            micro_batch_size=micro,
            accelerator=accelerator,
        )
    assert len(history.steps) == len(seen) == 1
    embeddings, labels = seen[0]
    assert (embeddings.dtype, list(embeddings.shape)) == (torch.float32, [32, small.DIMENSION])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [small.LABELS[item] for item in small.shuffled_batches()[0]]


@pytest.mark.parametrize("micro", [None, 5])
def test_what_a_callback_sees_of_a_step(micro: int | None) -> None:
    class Watcher(Callback):
        def on_step(self, fit: Any) -> None:
            self.seen = fit.embeddings, fit.labels, fit.gradient, fit.step, fit.steps[-1]

    watcher = Watcher()
    squared_fit(micro_batch_size=micro, callbacks=[watcher])
    embeddings, labels, gradient, step, record = watcher.seen
    assert not any(tensor.requires_grad for tensor in (embeddings, labels, gradient))
    leaf = embeddings.clone().requires_grad_()
    value = small.naive_loss("squared")(leaf, labels)
    value.backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert record["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert step == record["step"] == 1


def test_a_loss_of_its_own_parameters_alone_leaves_the_tower_as_it_is() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            return self.weight.square()

    for micro in (None, 5):
        tower, loss = small.new_tower(), Alone()
        before = small.weights(tower)
        small.fit(tower, loss, small.new_sampler("squared"), micro_batch_size=micro)
        assert loss.weight.item() == pytest.approx(1 - 2 * small.RATE)
        assert all(a.equal(b) for a, b in zip(small.weights(tower), before, strict=True))


@pytest.mark.parametrize("micro", [None, 5])
def test_a_loss_may_look_at_the_weights_of_the_tower(micro: int | None) -> None:
    tower = small.new_tower()
    loss = small.with_decay(small.naive_loss("squared"), tower)
    start = small.weights(tower)
    _, wanted, _ = small.by_hand(tower, loss, small.shuffled_batches(), steps=2)
    tower = small.new_tower()
    loss = small.with_decay(SQUARED, tower)
    found = small.fit(tower, loss, small.new_sampler("squared"), steps=2, micro_batch_size=micro)[1]
    small.assert_same_training(found, wanted, start)


def test_a_loss_may_hold_the_tower() -> None:
    class Holding(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            decayed = small.with_decay(SQUARED, self.tower)
            return self.weight * decayed(embeddings, labels)

    tower = small.new_tower()
    start = small.weights(tower)
    wanted = small.by_hand(tower, small.with_decay(SQUARED, tower), small.shuffled_batches())[1]
    tower = small.new_tower()
    small.fit(tower, Holding(tower), small.new_sampler("squared"))
    small.assert_same_training(small.weights(tower), wanted, start)


def test_activation_checkpointing_and_dropout_and_micro_batches() -> None:
    class Block(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(small.DIMENSION, 16), nn.Dropout(0.5), nn.Linear(16, small.DIMENSION)
            )
            self.checkpointed = checkpointed

        def forward(self, embeddings: Tensor) -> Tensor:
            if self.checkpointed:
                return checkpoint(self.layers, embeddings, use_reentrant=False)
            return self.layers(embeddings)

    gradients = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        gradients.append(squared_fit(Block(checkpointed), micro_batch_size=8)[0])
    small.assert_same_gradient(*gradients)


# Randomness


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_both_passes_of_a_piece_draw_the_same(source: str) -> None:
    noise = small.Noise(source)
    found, _, _ = squared_fit(noise, micro_batch_size=5)
    assert len(noise.with_gradient) == len(noise.without_gradient) == 7
    for one, other in zip(noise.with_gradient, noise.without_gradient, strict=True):
        assert one.equal(other)
    whole = torch.cat(noise.with_gradient)
    assert len(whole.unique()) > 0.9 * whole.numel()
    wanted, _, _ = squared_by_hand(small.Noise(source, whole))
    small.assert_same_gradient(found, wanted)


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_the_seed_decides_what_a_tower_draws(source: str) -> None:
    drawn = []
    for seed in (0, 0, 1):
        noise = small.Noise(source)
        squared_fit(noise, seed=seed, steps=2)
        drawn.append(torch.stack(noise.with_gradient))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert not drawn[0][0].equal(drawn[0][1])


def test_loss_tower_items_and_sampler_draw_different_numbers() -> None:
    loss_draws, item_draws, sampler_draws = [], [], []

    class Jitter:
        def __call__(self, image: Any) -> Tensor:
            item_draws.append(torch.rand(()).item())
            return small.to_tensor(image)

    class Sampler(small.Batches):
        def __iter__(self) -> Iterator[Any]:
            sampler_draws.append(torch.rand(()).item())
            return super().__iter__()

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        loss_draws.append(torch.rand(()).item())
        return embeddings.square().mean()

    noise = small.Noise("torch")
    tower = small.new_tower(noise)
    tower.preprocess = Jitter()
    batches = [[0, 1, 2], [3, 4, 5]]
    small.fit(tower, loss, Sampler(batches), steps=6, micro_batch_size=2)
    tower_draws = [piece[0, 0].item() for piece in noise.with_gradient]
    assert (len(loss_draws), len(tower_draws), len(item_draws)) == (6, 12, 18)
    everything = [*loss_draws, *tower_draws, *item_draws, *sampler_draws]
    assert len(set(everything)) == len(everything)


def test_a_loss_that_draws_does_so_alike_for_all_micro_batches() -> None:
    values = []
    for global_seed, micro in enumerate((None, 4, 5)):
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        torch.manual_seed(global_seed)
        values.append(noisy_losses(micro))
    whole, *others = values
    for other in others:
        assert other == pytest.approx(whole, rel=1e-4)
    assert len(set(whole)) == 3


def test_a_loss_that_draws_leaves_the_generators_of_the_rest_alone() -> None:
    seen = []

    class Watcher(Callback):
        def on_step(self, fit: Any) -> None:
            seen.append((random.random(), np.random.random()))  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    squared_fit(steps=2, callbacks=[Watcher()])
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    assert torch.get_rng_state().equal(states[2])
    expected = [(random.random(), np.random.random()) for _ in range(2)]  # noqa: NPY002
    assert seen == expected


# Accelerators


def test_an_accelerator_of_the_users_is_used() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    found, _, history = squared_fit(accelerator=accelerator)
    assert AcceleratorState().mixed_precision == "bf16"
    wanted, _, losses = squared_by_hand()
    whole = small.norm(wanted)
    # It did compute in bfloat16, and not much else.
    assert 1e-4 * whole < small.distance(found, wanted) < 0.05 * whole
    assert history.steps[0]["loss"] == pytest.approx(losses[0], rel=0.02)
    in_pieces, _, _ = squared_fit(accelerator=accelerator, micro_batch_size=5)
    assert small.distance(in_pieces, found) < 0.02 * whole


def test_two_fits_with_one_accelerator_are_as_with_two() -> None:
    weights = []
    for accelerators in ([Accelerator(cpu=True)] * 2, [None, None]):
        tower = small.new_tower()
        for accelerator in accelerators:
            squared = small.new_sampler("squared")
            small.fit(tower, SQUARED, squared, steps=2, accelerator=accelerator)
        weights.append(small.weights(tower))
    assert all(a.equal(b) for a, b in zip(*weights, strict=True))


def test_an_accelerator_does_not_keep_what_a_fit_leaves() -> None:
    accelerator = Accelerator(cpu=True)
    kept: list[Any] = []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=small.RATE)
        kept.append(weakref.ref(made))
        return made

    squared_fit(accelerator=accelerator, optimizer=optimizer)
    gc.collect()
    assert kept[0]() is None


def test_a_fit_leaves_other_accelerators_their_precision() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    squared_fit(precision="no")
    assert accelerator.mixed_precision == "bf16"


def test_a_fit_leaves_other_accelerators_their_accumulation() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    squared_fit()
    assert accelerator.gradient_accumulation_steps == 4


def test_an_accelerator_that_accumulates_later_is_refused_too() -> None:
    accelerator = Accelerator(cpu=True)
    finetuner = Finetuner(small.new_tower(), SQUARED, accelerator=accelerator)
    # Accelerators share this state, so that one made elsewhere changes it.
    Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="`accelerator` accumulates gradients over 4 steps"):
        finetuner.fit((small.pictures(), small.LABELS), batch_size=16, max_steps=1)


def test_an_accumulation_that_was_broken_off_elsewhere_does_not_skip_steps() -> None:
    wanted = squared_fit(steps=3)[1]
    theirs = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with theirs.accumulate(nn.Linear(1, 1)):
        pass
    assert not theirs.sync_gradients
    found = squared_fit(steps=3)[1]
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


# Memory


class LiveBytes:
    """Bytes that autograd keeps for a backward, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def measure(self, fit: Callable[[], object]) -> int:
        with saved_tensors_hooks(self.pack, lambda held: held.tensor):
            fit()
        assert self.now == 0
        return self.peak

    def pack(self, tensor: Tensor) -> "Held":
        # The weights are there anyway.
        size = 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        return Held(self, tensor, size)


class Held:
    def __init__(self, owner: LiveBytes, tensor: Tensor, size: int) -> None:
        self.tensor = tensor
        weakref.finalize(self, owner.free, size)


def free(self: LiveBytes, size: int) -> None:
    self.now -= size


LiveBytes.free = free  # type: ignore[attr-defined]


def test_activations_of_one_micro_batch_alone_are_kept() -> None:
    def peak(batch: int, micro: int | None) -> int:
        sampler = small.Batches(small.shuffled_batches(batch))
        loss = AllPairsCosineLoss()
        return LiveBytes().measure(
            lambda: small.fit(small.new_tower(), loss, sampler, micro_batch_size=micro)
        )

    one_piece = peak(4, None)
    batch = 64 * (3 * 8 * 8 + small.DIMENSION) * 4
    assert peak(64, 4) <= 1.2 * one_piece + batch
    assert peak(64, None) > 10 * one_piece > 5 * batch


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"micro_batch_size": 0}, ValueError, "`micro_batch_size` must be at least 1, got 0"),
        ({"micro_batch_size": -1}, ValueError, "`micro_batch_size` must be at least 1, got -1"),
        ({"micro_batch_size": 1.5}, TypeError, r"`micro_batch_size` must be .*got 1\.5"),
        ({"micro_batch_size": "8"}, TypeError, "`micro_batch_size` must be .*got '8'"),
        ({"callbacks": [object()]}, TypeError, "must have the methods of `pairclip.Callback`, got"),
        ({"callbacks": [Callback]}, TypeError, "must have the methods of `pairclip.Callback`, got"),
        ({"callbacks": [print]}, TypeError, "Inherit from it to have them"),
    ],
)
def test_wrong_settings_of_the_step_are_errors(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Finetuner(small.new_tower(), SQUARED, **arguments)


def test_a_callback_that_lacks_one_method_is_refused() -> None:
    class Incomplete:
        def on_fit_start(self, fit: Any) -> None: ...

        def on_step(self, fit: Any) -> None: ...

        def on_fit_end(self, fit: Any) -> None: ...

    with pytest.raises(TypeError, match=r"`callbacks` must have the methods .*Incomplete"):
        Finetuner(small.new_tower(), SQUARED, callbacks=[Incomplete()])


@pytest.mark.parametrize("accelerator", ["cuda", Accelerator])
def test_an_accelerator_must_be_one(accelerator: object) -> None:
    with pytest.raises(TypeError, match=r"`accelerator` must be an accelerate\.Accelerator, got"):
        Finetuner(small.new_tower(), SQUARED, accelerator=accelerator)


def test_gradient_accumulation_is_refused() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"accumulates gradients over 2 steps.*micro_batch_size"):
        Finetuner(small.new_tower(), SQUARED, accelerator=accelerator)


def test_gradient_accumulation_of_the_launcher_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(ValueError, match=r"accumulates gradients over 3 steps.*micro_batch_size"):
        squared_fit()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_divided_model_is_refused(monkeypatch, kind: str) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(
        accelerate.Accelerator, "distributed_type", property(lambda self: DistributedType[kind])
    )
    with pytest.raises(ValueError, match=f"`accelerator` divides the model by {kind}, and"):
        Finetuner(small.new_tower(), SQUARED, accelerator=accelerator)
    with pytest.raises(ValueError, match=f"`accelerator` divides the model by {kind}, and"):
        squared_fit()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precision_and_an_accelerator_do_not_go_together(precision: str) -> None:
    accelerator = Accelerator(cpu=True)
    message = f"`precision` '{precision}' would be ignored: `accelerator` decides, and has 'no'"
    with pytest.raises(ValueError, match=message):
        Finetuner(small.new_tower(), SQUARED, accelerator=accelerator, precision=precision)


def only_bias_trains() -> nn.Module:
    norm = nn.BatchNorm1d(small.DIMENSION)
    norm.weight.requires_grad_(False)
    return norm


class WithoutStatistics(nn.Module):
    """A frozen norm that keeps none, so that it takes the batch's in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, track_running_stats=False).requires_grad_(False)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.norm(embeddings.reshape(-1, 2, 2, 2)).flatten(1)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(small.DIMENSION),
        lambda: nn.Sequential(nn.Identity(), nn.SyncBatchNorm(small.DIMENSION)),
        only_bias_trains,
        lambda: nn.BatchNorm1d(small.DIMENSION, affine=False),
        WithoutStatistics,
    ],
)
def test_a_batch_norm_with_statistics_of_the_batch_takes_no_micro_batches(norm) -> None:
    with pytest.raises(ValueError, match=r"batch norm `model\.extra.*`micro_batch_size` 8 would"):
        squared_fit(norm(), micro_batch_size=8)


def test_whole_batches_of_one_process_train_a_batch_norm() -> None:
    wanted, _, _ = squared_by_hand(nn.BatchNorm1d(small.DIMENSION))
    norm = nn.BatchNorm1d(small.DIMENSION)
    found, _, _ = squared_fit(norm)
    small.assert_same_gradient(found, wanted)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("micro", [None, 8])
def test_a_frozen_batch_norm_keeps_its_statistics(micro: int | None) -> None:
    norm = small.frozen_norm()

    def as_in_evaluation(embeddings: Tensor) -> Tensor:
        return F.batch_norm(embeddings, norm.running_mean, norm.running_var)

    class Fixed(nn.Module):
        forward = staticmethod(as_in_evaluation)

    wanted, _, _ = squared_by_hand(Fixed())
    used = small.frozen_norm()
    found, _, _ = squared_fit(used, micro_batch_size=micro)
    small.assert_same_gradient(found, wanted)
    assert used.running_mean.equal(norm.running_mean)
    assert used.running_var.equal(norm.running_var)
    assert used.num_batches_tracked == 0


def test_a_pair_loss_without_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one number for the batch, got shape \[16\]"):
        small.fit(
            small.new_tower(),
            CosinePairLoss(reduction="none"),
            small.new_sampler("pairs"),
            micro_batch_size=8,
        )
