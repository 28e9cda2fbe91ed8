"""Run every benchmark at a tiny size, so that none rots: what is measured here says nothing.

    python tests/benchmarks/smoke.py            # all
    python tests/benchmarks/smoke.py losses     # one

A peer that isn't installed is a row that says so. Ends with 1 if a benchmark fails.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {"smoke"}
TINY = {
    "against": "HEAD --only tiny load --budget 0 --batch 8 --rows 2000 --width 16",
    "alignment": "--caption-steps 1 --steps 1 --fit 24 --held-out 48 --batch-size 12",
    "breaking": "--tiny",
    "embedding": "--images 1000 --width 16 --depth 1",
    "finetuner": "--only tiny --rounds 1 --batch 8 --contenders pairclip bare",
    "gpu": "--tiny",
    "hostile_images": "--mutations 44 --keep {folder}/hostile",
    "imprinting": "--losses ArcFaceLoss --steps 2 --held-out 2",
    "index": "--rows 2000 --width 16 --queries 2 --factories IVF16,Flat --folder {folder}",
    "ledger": "--queries 5 --per-class 40 --cells 4 --probes 2 --codes 4 --dims 4",
    "losses": "--batches 32 --classes 4 --width 8 --memory-from 32 --only 'pairclip squared' "
    "'pairclip targets' 'PML hinge' 'plain linear' F.normalize",
    "quality": "--steps 1 --rates 1e-4 --seeds 0 --blends 0.5 1 --methods squared 'PML NTXent' "
    "'PML ArcFace' --results {folder}/quality.jsonl --picture {folder}/quality.png",
    "resume": "--runs 1 --kills 1",
    "retrieval": "--sizes small --small 200 --width 8 --turns-seconds 0 --only 'pairclip metrics' "
    "'PML metrics'",
    "towers": "--check --only CLIP",
    "samplers": "--labels 4000 --many 8000 --pass-seconds 0.01",
    "suspects": "--per-class 12 --seeds 1 --share 0.2",
    "thresholds": "--splits 2 --classes 12 --rates 0.1",
}


def main(names: list[str]) -> int:
    scripts = {path.stem: path for path in sorted(HERE.glob("[!_]*.py"))}
    wanted = names or sorted(scripts.keys() - LEFT_OUT)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            start = time.monotonic()
            arguments = shlex.split(TINY[name].format(folder=folder))
            command = [sys.executable, str(scripts[name]), *arguments]
            if "_bench.parser_for" in scripts[name].read_text():
                command += ["--json", f"{folder}/{name}.json"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            print(f"{name}: exit {done.returncode}, {time.monotonic() - start:.0f} s", flush=True)
            if done.returncode:
                failed.append(name)
                print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
