"""Runs cases of `cases.py` in several processes each: imports once, then forks for every case.

One JSON object per line comes in, one goes out. It is started by `test_processes.py`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import cases
from torch import distributed
from torch.multiprocessing import start_processes

TIMEOUT = 150  # seconds for a case, on a machine that others use too


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            run(request)
            error = None
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"error": error}), file=answers, flush=True)


def run(request: dict[str, Any]) -> None:
    context = start_processes(
        child, args=(request,), nprocs=request["world"], join=False, start_method="fork"
    )
    assert context is not None
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"A case hangs for {TIMEOUT} s: {request}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def child(rank: int, request: dict[str, Any]) -> None:
    world, folder = request["world"], Path(request["folder"])
    if world > 1:
        # As a launcher sets them; a file instead of a port, which somebody else may take.
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(world)
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=request["patience"]),
        )
    warnings.simplefilter("error")
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    result = getattr(cases, request["case"])(**request["arguments"])
    torch.save(result, folder / f"{rank}.pt")
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
