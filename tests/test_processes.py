"""Several processes against one: the same batches, gradients, weights, histories and refusals."""

import functools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import small
from torch import Tensor, nn

from pairclip import embed_images

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cases are forked")

TESTS = Path(__file__).parent
TIMEOUT = 200  # seconds; the server gives up on a case after 150

Run = Callable[..., list[Any]]


def environment() -> dict[str, str]:
    """That of the tests, without what a launcher may have left, on the CPU and one thread each."""
    launched = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def kill_group(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Server:
    """`processes/server.py`, which forks the processes of a case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "processes.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(),
            text=True,
            start_new_session=True,
        )
        self.cases = 0

    def run(self, case: str, world: int, *, patience: int = 100, **arguments: Any) -> list[Any]:
        """What each of the processes returned; an AssertionError with a traceback if one failed."""
        self.cases += 1
        folder = self.folder / str(self.cases)
        folder.mkdir()
        request = {
            "case": case,
            "world": world,
            "folder": str(folder),
            "patience": patience,
            "arguments": arguments,
        }
        error = self._answer(json.dumps(request))
        if error is not None:
            self.errors.seek(0)
            pytest.fail(
                f"{case} on {world} processes: {error}\nstderr:\n{self.errors.read()[-4000:]}"
            )
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    def _answer(self, request: str) -> str | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return f"the server ended with {self.process.wait()}"
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            kill_group(self.process)
            return "the server ended" if ready else f"no answer in {TIMEOUT} s"
        return json.loads(line)["error"]

    def close(self) -> None:
        kill_group(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):
                stream.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    server = Server(tmp_path_factory.mktemp("processes"))
    try:
        # A case that several tests look at runs once.
        yield functools.lru_cache(None)(server.run)
    finally:
        server.close()


@functools.lru_cache(None)
def expected(name: str) -> tuple[list[Tensor], list[Tensor], list[float], list[Tensor]]:
    """First gradients, weights after some steps, losses and the weights before, by hand."""
    tower, loss = small.new_tower(), small.naive_loss(name)
    start = small.weights(tower, loss)
    sampler = small.new_sampler(name)
    batches = [batch for _ in range(small.STEPS) for batch in sampler][: small.STEPS]
    return *small.by_hand(tower, loss, batches, steps=small.STEPS), start


GRADIENTS = {
    2: {"micro": (None, 8, 5), "steps_with": 5},
    4: {"micro": (None, 3), "steps_with": None},
}


@pytest.mark.parametrize("name", small.LOSSES)
@pytest.mark.parametrize("world", [2, 4])
def test_processes_and_micro_batches_give_the_gradient_of_the_whole_batch(
    run: Run, world: int, name: str
) -> None:
    for result in run("gradients", world, **GRADIENTS[world]):
        for size in GRADIENTS[world]["micro"]:
            small.assert_same_gradient(result[f"{name}, {size}"], expected(name)[0])


@pytest.mark.parametrize("name", small.LOSSES)
@pytest.mark.parametrize("world", [2, 4])
def test_plain_steps_of_several_processes_end_where_one_ends(
    run: Run, world: int, name: str
) -> None:
    _, weights, losses, start = expected(name)
    results = run("gradients", world, **GRADIENTS[world])
    for result in results:
        found, history = result[name]
        small.assert_same_training(found, weights, start)
        assert [record["loss"] for record in history.steps] == pytest.approx(losses, rel=1e-3)
        assert history == results[0][name][1]


@pytest.mark.parametrize("micro", [None, 5])
def test_targets_go_with_their_images_over_processes_and_micro_batches(
    run: Run, micro: int | None
) -> None:
    batches = small.shuffled_batches()
    of_images = {"targets": small.targets()}
    wanted = small.by_hand(small.new_tower(), small.naive_targets_loss, batches, **of_images)[0]
    ((_, alone),) = run("targeted", 1, micro=None)
    for found, steps in run("targeted", 2, micro=micro):
        small.assert_same_gradient(found, wanted)
        for step, expected_step in zip(steps, alone, strict=True):
            assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-4)


DISAGREEMENTS = {
    "images": "dataset.some images, preprocessed is",
    "fewer images": "dataset.images is 48 there and 64 here",
    "labels": "dataset.labels is",
    "evaluation": "eval_dataset.labels is",
    "steps": "fit.max_steps is 3 there and 2 here",
    "micro-batches": "settings.micro_batch_size is 4 there and None here",
    "seed": "settings.seed is 1 there and 0 here",
    "learning_rate": "settings.learning_rate is 0.01 there and 0.001 here",
    "batches": "At step 1, process 1 has drawn another batch than process 0",
    "optimizer": "parameter groups.0.learning rate is 0.1 there and 0.2 here",
    "loss": "of the same embeddings. Give all processes the same loss",
    "averages": "`callbacks` average the weights on 1 of 2 processes",
}


def test_processes_that_are_about_to_do_different_things_are_named_on_all(run: Run) -> None:
    for said in run("disagreements", 2, names=tuple(DISAGREEMENTS)):
        assert set(said) == set(DISAGREEMENTS)
        for name, message in DISAGREEMENTS.items():
            assert message in said[name], name
            begins = said[name].startswith("Process 1 is not about to do")
            assert begins or name in ("batches", "loss", "averages")


def test_a_process_that_fails_is_what_the_others_say(run: Run) -> None:
    first, last = run("failing", 2)
    assert last == "KeyError: 'of its own'"
    assert first.startswith("RuntimeError: Process 0 can't go on: process 1 has failed, was")


def test_gradients_are_added_up_over_processes_once_per_step(run: Run) -> None:
    assert run("reductions", 2, micro=None) == [2, 2]
    assert run("reductions", 2, micro=4) == [2, 2]


@pytest.mark.parametrize("sampler", ["torch", "pytorch-metric-learning"])
def test_a_sampler_that_draws_from_global_generators_gives_all_processes_the_same(
    run: Run, sampler: str
) -> None:
    (alone,) = run("noisy_batches", 1, sampler=sampler)
    assert run("noisy_batches", 2, sampler=sampler) == [alone, alone]
    assert len({tuple(batch) for batch in alone}) == len(alone) == 7


def test_processes_share_the_batches_of_a_stream(run: Run) -> None:
    ((alone, _),) = run("streamed", 1, differing=False)
    for losses, _ in run("streamed", 2, differing=False):
        assert losses == pytest.approx(alone, rel=1e-5)
    assert len(alone) == 5
    for _, message in run("streamed", 2, differing=True):
        assert "process 1 has drawn another batch than process 0" in message
        assert "a stream must give the same items in the same order to each" in message


def test_a_loss_that_draws_gives_all_processes_the_same_value(run: Run) -> None:
    (alone,) = run("noisy_losses", 1, micro=None)
    one, other = run("noisy_losses", 2, micro=3)
    assert one == other == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == 3


def test_items_draw_the_same_on_any_number_of_processes_and_workers(run: Run) -> None:
    (alone,) = run("jittered", 1, workers=0)
    for result in run("jittered", 2, workers=1):
        for found, wanted in zip(result, alone, strict=True):
            torch.testing.assert_close(found, wanted)


def test_dropout_is_the_same_in_both_passes_and_another_one_in_every_piece(run: Run) -> None:
    for micro in (5, None):
        results = run("noisy_tower", 2, micro=micro)
        pieces = []
        for first, without_gradient, with_gradient in results:
            pieces += with_gradient
            # Without micro-batches there is one pass alone.
            again = with_gradient if micro else []
            assert len(without_gradient) == len(again)
            assert all(a.equal(b) for a, b in zip(without_gradient, again, strict=True))
            small.assert_same_gradient(first, results[0][0])
        assert len(pieces) == (8 if micro else 2)
        assert len({piece[0, 0].item() for piece in pieces}) == len(pieces)
        # The whole batch in one piece, with that noise.
        tower = small.new_tower(small.Noise("torch", torch.cat(pieces)))
        wanted, _, _ = small.by_hand(tower, small.naive_loss("squared"), small.shuffled_batches())
        small.assert_same_gradient(results[0][0], wanted)


def test_what_processes_cannot_divide_is_refused_on_each(run: Run) -> None:
    for messages in run("refusals", 2):
        assert messages["batch"].startswith(
            "A batch of 7 images can't be divided among 2 processes"
        )
        assert "batch norm `model.extra`" in messages["batch norm"]
        assert "2 processes would divide it" in messages["batch norm"]


def test_processes_embed_together_and_all_get_the_whole(run: Run) -> None:
    counts = (1, 2, 7, 50)
    results = run("embeddings", 3, counts=counts)
    tower, generator = small.new_tower(), np.random.default_rng(0)
    pictures = generator.integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    for result in results:
        for count in counts:
            expected = embed_images(tower, pictures[:count])
            torch.testing.assert_close(result[str(count)], expected, atol=1e-6, rtol=0)
        assert torch.equal(result["index"], results[0]["index"])
        assert len(result["index"]) == 50
        assert "`images` must be the same on all processes, got " in result["other"]
        assert "got 6 numbers on process 0 and 5 numbers on process 2" in result["size"]
    assert results[1]["match"] == 2
    assert re.match(r"ValueError: Image 5 \(missing.png\) can't be read", results[2]["missing"])
    assert results[2]["place"].startswith("TypeError: `out` must be a tensor or an array")
    for result in results[:2]:
        assert re.match(r"RuntimeError: Process 2 failed: Image 5", result["missing"])
        assert result["place"].startswith("RuntimeError: Process 2 failed: `out` must be")


def test_processes_cache_features_together(run: Run, tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    (one,) = run("cached_features", 1, folder=str(alone))
    results = run("cached_features", 2, folder=str(both))
    (file,) = both.iterdir()
    assert file.read_bytes() == Path(one["path"]).read_bytes()
    for result in results:
        assert result["path"] == str(file)
        assert result["again"]
        assert "must be the same on all processes, and process 1 has others" in result["labels"]
    assert results[0]["image"].startswith("RuntimeError: Process 1 failed: Image 2")
    assert results[1]["image"].startswith("ValueError: Image 2")
    assert "Not a directory" in results[0]["place"]
    assert results[1]["place"].startswith("RuntimeError: Process 0 failed: [Errno 20]")


def test_a_frozen_batch_norm_keeps_its_statistics(run: Run) -> None:
    norm = small.frozen_norm()
    tower = small.new_tower(small.frozen_norm()).train()
    tower.model.extra.eval()
    tower.train = lambda: tower
    wanted, _, _ = small.by_hand(tower, small.naive_loss("squared"), small.shuffled_batches())
    for first, (mean, variance) in run("frozen_batch_norm", 2):
        small.assert_same_gradient(first, wanted)
        assert mean.equal(norm.running_mean)
        assert variance.equal(norm.running_var)


def test_all_is_equal_on_all_processes_though_they_started_different(run: Run) -> None:
    one, other = run("agreement", 2)
    (alone,) = run("agreement", 1)
    for part in ("tower", "loss"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert value.equal(other[part][name]), name
    for a, b in zip(one["averages"], other["averages"], strict=True):
        assert a.equal(b)
    assert len(one["seen"]) == 5
    for a, b, c in zip(one["seen"], other["seen"], alone["seen"], strict=True):
        # Embeddings, labels and the gradient with respect to the embeddings.
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))
        torch.testing.assert_close(a[0], c[0], rtol=1e-3, atol=1e-4)
        assert a[1].equal(c[1])
    torch.testing.assert_close(one["seen"][0][2], alone["seen"][0][2])
    assert one["history"] == other["history"]
    assert [record["step"] for record in one["history"]["evaluations"]] == [2, 4, 5]
    # Process 0 decides where they start.
    losses = [[r["loss"] for r in result["history"]["steps"]] for result in (one, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_callback_that_stops_one_process_stops_all(run: Run) -> None:
    one, other = run("stopped", 2, where="on_step")
    assert one["steps"] == other["steps"] == 2
    assert other["reason"] == "enough"
    assert one["reason"] is not None
    assert one["more"] == other["more"] == 2
    assert all(a.equal(b) for a, b in zip(one["weights"], other["weights"], strict=True))


def test_all_histories_have_the_reason_of_the_process_that_stopped(run: Run) -> None:
    reasons = [result["reason"] for result in run("stopped", 2, where="on_step")]
    assert reasons == ["enough", "enough"]


@pytest.mark.parametrize(("where", "steps"), [("on_fit_start", 0), ("on_evaluation", 3)])
def test_a_callback_may_stop_one_process_anywhere(run: Run, where: str, steps: int) -> None:
    one, other = run("stopped", 2, where=where)
    assert one["steps"] == other["steps"] == steps
    assert one["more"] == other["more"] == 2
    assert all(a.equal(b) for a, b in zip(one["weights"], other["weights"], strict=True))


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-4), ("bf16", 0.05)])
def test_two_fits_with_the_same_accelerator(run: Run, precision: str, tolerance: float) -> None:
    (alone,) = run("two_fits", 1, precision=precision)
    one, other = run("two_fits", 2, precision=precision)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    start = small.weights(small.new_tower(), small.new_loss("arcface"))
    assert small.distance(one, alone) <= tolerance * small.distance(alone, start)


def test_a_parameter_without_use_trains_beside_if_ddp_is_told(run: Run) -> None:
    wanted = small.by_hand(
        small.new_tower(), small.naive_loss("squared"), small.shuffled_batches(), steps=3
    )[1]
    one, other = run("unused_parameter", 2)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    small.assert_same_training(
        [tensor for tensor in one if tensor.shape != (3,)], wanted, small.weights(small.new_tower())
    )


class ShiftOfFour(nn.Module):
    """Adds a parameter to the first four embeddings of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(small.DIMENSION))

    def forward(self, embeddings: Tensor) -> Tensor:
        return torch.cat([embeddings[:4] + self.shift, embeddings[4:]])


def test_a_parameter_of_one_piece_on_one_process_gets_its_gradient_on_all(run: Run) -> None:
    wanted, _, _ = small.by_hand(
        small.new_tower(ShiftOfFour()), small.naive_loss("squared"), small.shuffled_batches()
    )
    for found in run("sometimes", 2):
        small.assert_same_gradient(found, wanted)


@pytest.mark.parametrize("micro", [5, None])
def test_a_loss_may_look_at_the_weights_of_the_tower(run: Run, micro: int | None) -> None:
    tower = small.new_tower()
    loss = small.with_decay(small.naive_loss("squared"), tower)
    wanted, _, _ = small.by_hand(tower, loss, small.shuffled_batches())
    for found in run("regularised", 2, micro=micro):
        small.assert_same_gradient(found, wanted)


def test_a_communication_hook_is_used(run: Run) -> None:
    wanted, _, _ = small.by_hand(
        small.new_tower(), small.naive_loss("squared"), small.shuffled_batches()
    )
    for found in run("compressed", 2):
        difference = small.distance(found, wanted) / small.norm(wanted)
        assert 1e-4 < difference < 0.02  # bfloat16 between the processes


def test_a_signal_to_one_process_checkpoints_and_stops_all_and_any_number_resumes(
    run: Run, tmp_path: Path
) -> None:
    whole = run("checkpointed", 2, folder=str(tmp_path / "whole"))
    for world, micro in ((2, None), (1, 5)):
        folder = str(tmp_path / f"{world}")
        killed = run("checkpointed", 2, folder=folder, kill_at=3)
        assert [result["code"] for result in killed] == [128 + signal.SIGTERM] * 2
        resumed = run("checkpointed", world, folder=folder, resume=True, micro=micro)
        for result in resumed:
            assert (result["code"], result["steps"]) == (None, 6)
            for one, other in zip(result["weights"], whole[0]["weights"], strict=True):
                if world == 2:
                    assert one.equal(other)
                else:
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_accelerate_launch_trains_in_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        # With --cpu, Accelerate starts one process alone unless it has an MPI.
        *("--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)),
        *("-m", "processes.launched", str(tmp_path)),
    ]
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(), "HF_HOME": str(tmp_path)},
            start_new_session=True,
            text=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(TIMEOUT)
        finally:
            kill_group(process)
        said = (tmp_path / "output").read_text()
    assert process.returncode == 0, said
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [result["world"] for result in results] == [2, 2]
    assert results[0]["history"] == results[1]["history"]
    for one, other in zip(results[0]["weights"], results[1]["weights"], strict=True):
        assert one.equal(other)
