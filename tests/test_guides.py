"""The guide's script, run as it is written, alone and under `accelerate launch`."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from pairclip import load_tower, newest_checkpoint

GUIDE = Path(__file__).parents[1] / "docs" / "scaling.md"


# With --cpu, Accelerate starts one process alone unless it has an MPI.
LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port {port}"
)
COUNT = "print(PartialState().num_processes, flush=True)\n"


def run(folder: Path, launch: str) -> list[str]:
    (code,) = re.findall(r"```python\n(# train\.py\n.*?)```", GUIDE.read_text(), re.DOTALL)
    folder.mkdir()
    (folder / "train.py").write_text(code + COUNT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = launch.format(port=free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, *launch.split(), "train.py"],
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_the_script_of_the_scaling_guide_does_the_same_in_one_and_two_processes(
    tmp_path: Path,
) -> None:
    printed = [run(tmp_path / "one", ""), run(tmp_path / "two", LAUNCH)]
    assert [lines[:-1] for lines in printed] == [["1"], ["2", "2"]]
    assert re.fullmatch(r"4 steps, loss 0\.\d{4}", printed[0][-1])
    assert printed[1][-1] == printed[0][-1]
    for folder in (tmp_path / "one", tmp_path / "two"):
        tower, checkpoint = load_tower(folder / "tuned"), newest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == 4
        for name, weight in checkpoint.weights().items():
            assert weight.equal(tower.state_dict()[name])
