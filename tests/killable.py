"""Fits in processes of their own, to be killed: one process imports torch and forks for each.

`Fits` starts that process and asks it for fits; this file is also what it runs. With a job as its
argument it does that alone, as a program of its own. A job is a dict:

    run       which of `RUNS`
    folder    its checkpoints are in `folder/saved`; `folder/steps` lists the steps that were taken
    steps     steps of the whole run
    workers   data-loading workers
    out       where the weights, the state and the history go when the run has ended; None for not
    kill      {"operation": n}: SIGKILL before file operation n; {"torn": n}: in the middle of the
              n-th tensor file; {"signals": [[step, signal, whole group], ...]}: after that step;
              {"stalled": step}: from then on workers wait for images, and Ctrl-C comes twice
    seconds   after which a fit counts as hanging
"""

from __future__ import annotations

import importlib
import json
import multiprocessing.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY = 3  # steps between checkpoints


class Fits:
    """Starts fits in forks of a process that has imported everything; one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.started = 0.0

    def start(self, **job: Any) -> int:
        """Begin a fit; returns its process once it takes steps (or has ended)."""
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pid = int(self._read("pid"))
        self._said = self._read("going", "ended")
        self.started = time.monotonic()
        return self.pid

    def wait(self) -> int:
        """The status of the fit: 0, an exit code, or minus the number of a signal."""
        ended = self._said if self._said.startswith("ended") else self._read("ended")
        # A worker of torch that has only just begun does not notice that its parent was killed.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return int(ended.split()[1])

    def run(self, **job: Any) -> int:
        self.start(**job)
        return self.wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()

    def _read(self, *expected: str) -> str:
        line = self.server.stdout.readline()
        if not line.startswith(expected):
            raise RuntimeError(f"The process that starts fits said {line!r} instead of {expected}.")
        return line.removeprefix("pid ") if expected == ("pid",) else line


@dataclass
class Uninterrupted:
    """What a run does that nobody kills."""

    out: Path
    seconds: float
    operations: int
    steps: int


def uninterrupted(fits: Fits, folder: Path, **job: Any) -> Uninterrupted:
    """Do the run once, and measure where it may be killed."""
    folder.mkdir()
    out, most = folder / "out", 10**9
    fits.start(**job, folder=str(folder), out=str(out), kill={"operation": most})
    assert fits.wait() == 0
    seconds = time.monotonic() - fits.started
    operations = most - int((out / "operations").read_text())
    steps = len(json.loads((out / "history.json").read_text())["steps"])
    return Uninterrupted(out, seconds, operations, steps)


def killed_and_resumed(
    fits: Fits,
    whole: Uninterrupted,
    folder: Path,
    chance: random.Random,
    kills: int,
    *,
    said: list[str],
    **job: Any,
) -> None:
    """Kill a run at random moments, noted in `said`, then let it end.

    Every second kill, and the first of all, comes while a checkpoint is written.

    Raises:
        AssertionError: If more was lost than the steps since the last checkpoint.
    """
    folder.mkdir()
    for number in range(kills):
        before = last_whole_step(folder)
        # So that something is left for the next kills.
        share = min(0.9, 1.5 * (1 - before / whole.steps) / (kills - number))
        kill: dict[str, Any] = {}
        wait = chance.uniform(0, share * whole.seconds)
        if number % 2 == 0 and chance.random() < 0.3:
            kill = {"torn": chance.randrange(2)}
        elif number % 2 == 0:
            kill = {"operation": chance.randrange(max(1, int(whole.operations * share)))}
        pid = fits.start(**job, folder=str(folder), out=None, kill=kill)
        if not kill:
            time.sleep(max(0.0, fits.started + wait - time.monotonic()))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = fits.wait()
        assert status in (0, -signal.SIGKILL), status
        how = " ".join(map(str, *kill.items())) if kill else f"{wait:.2f} s"
        said.append(f"from {before} {how}{'' if status else ' (had ended)'}")
        check_steps(folder, before)
    before = last_whole_step(folder)
    assert fits.run(**job, folder=str(folder), out=str(folder / "out"), kill={}) == 0
    check_steps(folder, before)


def different_files(one: Path, other: Path) -> list[str]:
    """Names of the results of two runs that are not the same to the bit."""
    names = {path.name for out in (one, other) for path in out.iterdir()} - {"operations"}
    return [n for n in sorted(names) if (one / n).read_bytes() != (other / n).read_bytes()]


def last_whole_step(folder: Path) -> int:
    """Where a fit would resume, which first puts in order what a killed writer left."""
    from pairclip.checkpoints import newest_checkpoint, remove_leftovers

    remove_leftovers(folder / "saved")
    newest = newest_checkpoint(folder / "saved")
    return 0 if newest is None else newest.step


def check_steps(folder: Path, before: int) -> None:
    """The steps of a life began after the last checkpoint, and few came after the next one."""
    path = folder / "steps"
    taken = [int(line) for line in path.read_text().split()] if path.exists() else []
    path.unlink(missing_ok=True)
    assert taken == list(range(before + 1, before + 1 + len(taken))), (before, taken)
    if taken:
        # Whatever was due before the last step that was taken had been written.
        due = (taken[-1] - 1) // EVERY * EVERY
        assert last_whole_step(folder) >= max(before, due), (before, taken)


def _images() -> tuple[Any, list[int]]:
    import numpy as np

    generator = np.random.default_rng(0)
    labels = [0, 1, 2] * 16
    pixels = generator.integers(0, 256, (48, 16, 16, 3))
    pixels[range(48), :, :, labels] //= 2
    return pixels.astype(np.uint8), labels


def _photos() -> Any:
    """A dataset like an `ImageFolder`, with transforms that draw from all generators."""
    import numpy as np
    from PIL import Image
    from torchvision import transforms

    class Photos:
        classes = ("red", "green", "blue")

        def __init__(self) -> None:
            self.pixels, self.targets = _images()
            self.transform = transforms.Compose(
                [
                    transforms.RandomCrop(12),
                    transforms.RandomHorizontalFlip(),
                    transforms.ColorJitter(0.3, 0.3),
                    transforms.Lambda(lambda image: image.rotate(random.randrange(-9, 9))),
                    transforms.Lambda(
                        lambda image: image.rotate(90 * int(np.random.randint(4)))  # noqa: NPY002
                    ),
                ]
            )

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]

    return Photos()


def _plain_tower() -> Any:
    import torch
    from torch import nn
    from torchvision import transforms

    from pairclip import load_tower

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(432, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 8)
    )
    preprocess = transforms.Compose([transforms.Resize((12, 12)), transforms.ToTensor()])
    return load_tower(module, image_processor=preprocess)


def _clip_tower() -> Any:
    from pairclip.towers import random_tower

    return random_tower(width=16, embedding_dim=8, attention_dropout=0.2)


def _everything() -> tuple[Any, Any, dict[str, Any]]:
    """Callbacks with state, a loss with parameters, random transforms, dropout, batch norm."""
    import torch
    from pytorch_metric_learning.losses import ArcFaceLoss

    from pairclip import EarlyStopping, WeightAverage

    tower = _plain_tower()
    torch.manual_seed(1)
    loss = ArcFaceLoss(num_classes=3, embedding_size=8)
    callbacks = [WeightAverage(0.9), EarlyStopping("gap", patience=50)]
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "callbacks": callbacks, "seed": 4}
    return tower, loss, {**settings, "dataset": _photos(), "batch_size": 12, "eval_every": 4}


def _random_sampler() -> tuple[Any, Any, dict[str, Any]]:
    """A sampler of torch, which knows no epochs; a tower partly frozen; momentum."""
    import torch
    from torch.utils.data import BatchSampler, RandomSampler

    from pairclip import AllPairsCosineLoss, WeightAverage

    tower = _clip_tower()
    tower.model.vision_model.embeddings.requires_grad_(False)
    loss = AllPairsCosineLoss(negatives="hinge", margin=0.1, positive_fraction=0.5)
    return (
        tower,
        loss,
        {
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
            "callbacks": [WeightAverage(0.8)],
            "dataset": _photos(),
            "sampler": BatchSampler(RandomSampler(range(48)), 10, drop_last=False),
            "micro_batch_size": 4,
            "eval_every": 7,
        },
    )


def _pairs() -> tuple[Any, Any, dict[str, Any]]:
    """The pairs of a sampler, and an early stop that ends the run."""
    from pairclip import CosinePairLoss, EarlyStopping, PairSampler

    return (
        _clip_tower(),
        CosinePairLoss(negatives="squared"),
        {
            "learning_rate": 3e-3,
            "schedule": "linear",
            "callbacks": [EarlyStopping("different_mean", mode="max", patience=5)],
            "dataset": _images(),
            "sampler": PairSampler(_images()[1], 6, class_balanced=True, seed=2),
            "eval_every": 2,
        },
    )


RUNS = {"everything": _everything, "random sampler": _random_sampler, "pairs": _pairs}


def _fit(job: dict[str, Any], say: Callable[[str], None]) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from pairclip import Callback, Finetuner, newest_checkpoint

    torch.set_num_threads(1)
    tower, loss, settings = RUNS[job["run"]]()
    folder = Path(job["folder"])
    operations = _Operations()
    signals = {step: rest for step, *rest in job["kill"].get("signals", ())}

    class Watch(Callback):
        def on_fit_start(self, fit: Any) -> None:
            if "operation" in job["kill"]:
                operations.begin(job["kill"]["operation"])
            if "torn" in job["kill"]:
                _tear_file(job["kill"]["torn"])
            say("going")

        def on_step(self, fit: Any) -> None:
            with open(folder / "steps", "a") as file:
                file.write(f"{fit.step}\n")
            if fit.step == job["kill"].get("stalled"):
                (folder / "stalled").touch()
                threading.Thread(target=_interrupt_twice, args=[folder], daemon=True).start()
            if fit.step in signals:
                number, group = signals[fit.step]
                # From another process: workers of torch look at who sends it.
                target = f"-{os.getpgrp()}" if group else str(os.getpid())
                command = ["kill", f"-{number}", "--", target]
                subprocess.run(command, check=True, start_new_session=True)

    dataset, eval_every = settings.pop("dataset"), settings.pop("eval_every")
    if "stalled" in job["kill"]:
        dataset = _Stalling(dataset, folder)
    settings["callbacks"] = [*settings.get("callbacks", ()), Watch()]
    arguments = {name: settings.pop(name) for name in ("sampler", "batch_size") if name in settings}
    # Nothing of a run may follow from what the program drew before it.
    chance = time.time_ns() % 2**32
    random.seed(chance)
    np.random.seed(chance)  # noqa: NPY002
    torch.manual_seed(chance)
    history = Finetuner(tower, loss, **settings).fit(
        dataset,
        **arguments,
        max_steps=job["steps"],
        eval_dataset=_images(),
        eval_every=eval_every,
        checkpoint_dir=folder / "saved",
        checkpoint_every=EVERY,
        resume=True,
        num_workers=job["workers"],
    )
    if job["out"] is None:
        return
    out, left = Path(job["out"]), operations.left
    out.mkdir()
    (out / "operations").write_text(str(left))
    save_file(tower.state_dict(), out / "tower.safetensors")
    if isinstance(loss, torch.nn.Module):
        save_file(loss.state_dict(), out / "loss.safetensors")
    history.to_json(out / "history.json")
    last = newest_checkpoint(folder / "saved")
    for name in ("weights.safetensors", "training.safetensors", "state.json"):
        (out / name).write_bytes((last.folder / name).read_bytes())


class _Stalling:
    """A dataset that a worker waits for once a file is there, as for a disk in the network."""

    def __init__(self, dataset: Any, folder: Path) -> None:
        self.dataset, self.folder, self.process = dataset, folder, os.getpid()
        self.targets, self.classes = dataset.targets, dataset.classes
        self.given = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if os.getpid() != self.process:
            if (self.folder / "stalled").exists():
                (self.folder / "batches").write_text("batch\n" * (self.given // 12))
                time.sleep(100)
            self.given += 1
        return self.dataset[index]


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _interrupt_twice(folder: Path) -> None:
    """Ctrl-C, and again, once the main thread has taken all batches and waits for the next."""
    main, steps, batches = threading.main_thread().ident, folder / "steps", folder / "batches"
    waits = False
    while not (waits and batches.exists() and count_lines(batches) == count_lines(steps)):
        time.sleep(0.05)
        frame, waits = sys._current_frames()[main], False
        while frame is not None:
            waits, frame = waits or frame.f_code.co_name == "_try_get_data", frame.f_back
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)


class _Operations:
    """Counts down the file operations on checkpoints, to a SIGKILL."""

    def __init__(self) -> None:
        self.left = -1

    def begin(self, number: int) -> None:
        self.left, self.process = number, os.getpid()
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: Any) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        # Names are relative within `rmtree`; of files that are opened, checkpoints alone matter.
        if event == "open" and "step-" not in str(arguments[0]):
            return
        if os.getpid() == self.process:
            if not self.left:
                os.kill(self.process, signal.SIGKILL)
            self.left -= 1


def _tear_file(number: int) -> None:
    """SIGKILL this process in the middle of a tensor file."""
    from pairclip.checkpoints import writing

    write_tensors = writing.write_tensors

    def torn(file: Any, tensors: Any) -> None:
        nonlocal number
        write_tensors(file, tensors)
        number -= 1
        if number < 0:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    writing.write_tensors = torn


def _serve() -> None:
    for module in (
        "pytorch_metric_learning.losses",
        "transformers.models.clip.image_processing_clip",
        "transformers.models.clip.modeling_clip",
        "pairclip.finetuner",
    ):
        importlib.import_module(module)

    def say(what: str) -> None:
        os.write(1, (what + "\n").encode())

    for line in iter(sys.stdin.readline, ""):
        ready, go = os.pipe()
        child = os.fork()
        if not child:
            os.read(ready, 1)
            _child(json.loads(line), say)
        say(f"pid {child}")
        os.write(go, b" ")
        os.close(ready)
        os.close(go)
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


def _child(job: dict[str, Any], say: Callable[[str], None]) -> None:
    """Do the fit and end as a program would that does nothing else."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    signal.alarm(job.get("seconds", 120))
    status, ended_by = 0, None
    try:
        _fit(job, say)
    except BaseException as error:
        ended_by = error  # a program's last traceback holds the frames of the fit to its end
        if isinstance(error, Exception):
            traceback.print_exception(error)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, SystemExit):
            status = int(error.code or 0)
    finally:
        multiprocessing.util._exit_function()  # as any program does at its end
        assert ended_by is None or status
        os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _fit(json.loads(sys.argv[1]), lambda what: None)
    else:
        _serve()
