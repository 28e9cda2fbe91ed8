"""What two processes gain in embedding, and what memory it takes beside its result.

    python tests/benchmarks/embedding.py            # both
    python tests/benchmarks/embedding.py --check    # and exit with 1 if a criterion fails

processes: one process, and two that share the images over gloo, each with one thread. Beside the
seconds on the wall are those of the processor, of the busier of the two: what the wall would show
on a machine that nobody else uses. One image can't be divided, so two processes show with it what
it costs to go together, and seven divide into 4 and 3 at best. For these two the tower is a
ViT-B/16 and the least of several turns counts, for the others it is a small one. memory: the
highest resident memory less that before, of many tiny images by a tower of one layer, as a multiple
of the result.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench
from _bench import Criterion, Row

LENGTHS = (1, 7, 1000, 1001)
SMALL = {"image_size": 64, "patch_size": 8, "width": 128, "depth": 6}
LARGE = {"image_size": 224, "patch_size": 16, "width": 768, "heads": 12}
_FEW, _TURNS = 8, 5  # lengths below it take so many turns


def measure(job: Row) -> Row:
    return measure_memory(job) if job["measure"] == "memory" else measure_processes(job)


def measure_memory(job: Row) -> Row:
    import numpy as np
    import torch
    from torch import nn
    from torchvision import transforms

    from pairclip import embed_images, load_tower

    torch.set_num_threads(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, job["width"]))
    preprocess = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
    tower = load_tower(encoder, image_processor=preprocess)
    images = np.random.default_rng(0).integers(0, 256, (job["images"], 4, 4, 3), dtype=np.uint8)
    embed_images(tower, images[:100])
    before = _bench.resident_bytes()
    _bench.reset_peak()
    result = embed_images(tower, images, batch_size=256)
    return {"peak_bytes": _bench.peak_bytes() - before, "result_bytes": int(result.nbytes)}


def measure_processes(job: Row) -> Row:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            context = multiprocessing.get_context("fork")
            all_of_them = [
                context.Process(target=embed, args=(rank, processes, folder, job["depth"]))
                for rank in range(processes)
            ]
            for each in all_of_them:
                each.start()
            for each in all_of_them:
                each.join()
                if each.exitcode:
                    raise OSError(f"A process ended with {each.exitcode}.")
        alone, *both = (
            torch.load(Path(folder, name), weights_only=False) for name in ("1-0", "2-0", "2-1")
        )
    found: Row = {}
    for length in LENGTHS:
        off = max(float((alone[length][0] - other[length][0]).abs().max()) for other in both)
        cpu, wall = (max(other[length][place] for other in both) for place in (1, 2))
        found |= {
            f"difference_{length}": off,
            f"cpu_{length}": cpu / alone[length][1],
            f"wall_{length}": wall / alone[length][2],
        }
    return found


def embed(rank: int, processes: int, folder: str, depth: int) -> None:
    """Embed sets of each length; their embeddings and times go into a file."""
    import numpy as np
    import torch
    from torch import distributed

    from pairclip import embed_images
    from pairclip.towers import random_tower

    if processes > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
        )
    found: dict[int, Any] = {}
    generator = np.random.default_rng(0)
    for length in LENGTHS:
        shape, turns = ({**LARGE, "depth": depth}, _TURNS) if length < _FEW else (SMALL, 1)
        tower, size = random_tower(**shape), shape["image_size"]
        images = generator.integers(0, 256, (length, size, size, 3), dtype=np.uint8)
        embed_images(tower, images[:128])
        cpu, wall = [], []
        for _ in range(turns):
            started = time.process_time(), time.perf_counter()
            rows = embed_images(tower, images)
            cpu.append(time.process_time() - started[0])
            wall.append(time.perf_counter() - started[1])
        rows = torch.nn.functional.normalize(rows)  # as searches compare them
        found[length] = rows, min(cpu), min(wall)
    torch.save(found, Path(folder, f"{processes}-{rank}"))


def main() -> int:
    parser = _bench.parser_for(__file__, __doc__)
    parser.add_argument("--images", type=int, default=200_000, help="of the row memory")
    parser.add_argument("--width", type=int, default=512, help="D of the row memory")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the tower of few images")
    arguments = parser.parse_args()
    if arguments.worker:
        _bench.serve(arguments.worker, measure)
        return 0
    limits = _bench.Limits(arguments.memory_gib, arguments.seconds)
    size = {"images": arguments.images, "width": arguments.width}
    jobs: list[Row] = [{"measure": "memory"} | size]
    jobs.append({"measure": "processes", "depth": arguments.depth})
    one_thread = {"OMP_NUM_THREADS": "1"}
    rows = [_bench.run_worker(__file__, job, limits, one_thread) for job in jobs]
    memory, processes = rows
    headers = ["images", "of one process's time", "on the wall", "largest difference"]
    lines = [
        [
            f"{n:,}",
            *(_bench.number(processes.get(f"{w}_{n}")) for w in ("cpu", "wall", "difference")),
        ]
        for n in LENGTHS
    ]
    print(_bench.table(headers, lines))
    criteria = [
        Criterion(
            f"two processes, {n:,} images: of one process's time", 0.6, processes.get(f"cpu_{n}")
        )
        for n in LENGTHS[1:]
    ]
    criteria += [
        Criterion(
            f"two processes, {n:,} images: difference", 1e-6, processes.get(f"difference_{n}")
        )
        for n in LENGTHS
    ]
    used = _bench.ratio(memory.get("peak_bytes"), memory.get("result_bytes"))
    criteria.append(Criterion("memory, x result, the result included", 1.2, used))
    return _bench.finish(arguments, rows, criteria)


if __name__ == "__main__":
    sys.exit(main())
