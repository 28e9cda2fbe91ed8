"""Attempts to break what is written to the disk, counted by kind.

    python tests/benchmarks/breaking.py              # all of it: some ten minutes
    python tests/benchmarks/breaking.py --tiny       # a few of each kind

For each kind of file: a kill and an error before every file operation of its writer, which must
leave the old content or the new; random damages and every single bit of small files, which must
read as before or end in an error that names the file; threads and processes that write and read
one name, which must never see half of it. And for each way in which two processes of a fit, or of
an embedding, can fail or differ: all must end within 30 s, with words that say so. Ends with 1 if
anything was torn, used silently, not named or left hanging.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import _ranks
from kills import EVENTS, killed_at

import pairclip
from pairclip.checkpoints import write_checkpoint
from pairclip.features import CachedFeatures, cache_features
from pairclip.index import FaissIndex
from pairclip.towers import random_tower

SMALL = 5000  # bytes of a file whose every bit is flipped
BAD = ("torn", "silent", "unnamed", "raised", "lost", "hung")


@dataclass
class Kind:
    """A kind of file: how version 0 or 1 of it is written into a folder, and read."""

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]  # gives 0 or 1, None where there is none
    shared: bool = True  # whether several may write it at once
    sealed: bool = True  # whether its reader can tell a damage


def digest(value: Any) -> str:
    """What tells one content from another."""
    return json.dumps(value, sort_keys=True, default=lambda other: other.tolist())


def checkpoints() -> Kind:
    def write(folder: Path, version: int) -> None:
        weights = {"w": torch.full((7,), float(version))}
        state = {"version": version, "moments": {0: torch.arange(5.0) + version}}
        write_checkpoint(
            folder / "saved", 1 + version, weights=weights, state=state, figure=0.5, keep=1
        )

    def read(folder: Path) -> int | None:
        newest = pairclip.newest_checkpoint(folder / "saved")
        if newest is None:
            return None
        version = newest.step - 1
        assert newest.weights()["w"].tolist() == [version] * 7
        assert newest.state()["version"] == version
        return version

    return Kind("checkpoint", write, read, shared=False)


def indices() -> Kind:
    def make(version: int) -> pairclip.ImageIndex:
        return pairclip.ImageIndex(
            torch.eye(5 + version).half(),
            labels=torch.full((5 + version,), version),
            class_names=["ant", "bee"],
            paths=[f"{version}/{i}" for i in range(5 + version)],
            fingerprint="none",
        )

    def read(folder: Path) -> int | None:
        if not (folder / "saved").exists():
            return None
        while True:
            index = pairclip.ImageIndex.load(folder / "saved")
            try:
                index.verify()
                break
            except ValueError as error:
                if "is another one by now" not in str(error):
                    raise
        version = len(index) - 5
        expected = make(version)
        assert torch.equal(index.embeddings, expected.embeddings)
        assert index.paths == expected.paths
        assert index.labels is not None
        assert index.labels.tolist() == [version] * len(index)
        assert index.class_names == ["ant", "bee"]
        return version

    return Kind("index", lambda folder, version: make(version).save(folder / "saved"), read)


def features() -> Kind:
    trunk, _ = random_tower(image_size=8, patch_size=4).split(0)
    images = [(np.full((3, 8, 8, 3), 60 * v, np.uint8), [0, 1, 0]) for v in range(2)]
    paths: list[Path] = []
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for version in range(2):
            made = cache_features(trunk, images[version], folder)
            paths.append(Path(made.path.name))
            expected.append(digest([row.tolist() for row, _ in made]))

    def write(folder: Path, version: int) -> None:
        # The names differ with what is in them, so version 1 takes the name of version 0.
        made = cache_features(trunk, images[version], folder / "making")
        with pairclip._files.whole_file(folder / "saved") as file:
            file.write(made.path.read_bytes())

    def read(folder: Path) -> int | None:
        if not (folder / "saved").exists():
            return None
        return expected.index(digest([row.tolist() for row, _ in CachedFeatures(folder / "saved")]))

    return Kind("features", write, read)


def towers() -> Kind:
    made = [random_tower(image_size=8, patch_size=4, seed=version) for version in range(2)]
    fingerprints = [tower.fingerprint() for tower in made]

    def read(folder: Path) -> int | None:
        if not (folder / "saved").exists():
            return None
        return fingerprints.index(pairclip.load_tower(folder / "saved").fingerprint())

    return Kind(
        "tower", lambda folder, version: made[version].save_pretrained(folder / "saved"), read
    )


def histories() -> Kind:
    made = [pairclip.History([{"step": 1 + v, "loss": 0.5 * v}]) for v in range(2)]

    def read(folder: Path) -> int | None:
        path = folder / "saved"
        return made.index(pairclip.History.from_json(path)) if path.exists() else None

    return Kind("history", lambda folder, version: made[version].to_json(folder / "saved"), read)


def evaluations() -> Kind:
    labels = torch.tensor([0, 0, 1, 1])
    made = [pairclip.evaluate_embeddings(torch.eye(4) + v, labels) for v in range(2)]
    known = [digest(evaluation.to_dict()) for evaluation in made]

    def read(folder: Path) -> int | None:
        path = folder / "saved"
        if not path.exists():
            return None
        return known.index(digest(pairclip.Evaluation.from_json(path).to_dict()))

    return Kind("evaluation", lambda folder, version: made[version].to_json(folder / "saved"), read)


def alignments() -> Kind:
    rows = [torch.randn(20, 4, generator=torch.Generator().manual_seed(v)) for v in range(2)]
    made = [pairclip.align(each, each.flip(1)) for each in rows]

    def read(folder: Path) -> int | None:
        path = folder / "saved"
        if not path.exists():
            return None
        weight = pairclip.Alignment.load(path).weight
        return [each.weight.tolist() for each in made].index(weight.tolist())

    return Kind("alignment", lambda folder, version: made[version].save(folder / "saved"), read)


def approximate() -> Kind:
    made = [
        pairclip.ImageIndex(
            torch.eye(5 + version),
            labels=None,
            class_names=None,
            paths=[f"{version}/{i}" for i in range(5 + version)],
            fingerprint="none",
        ).to_faiss("Flat")
        for version in range(2)
    ]

    def read(folder: Path) -> int | None:
        if not (folder / "saved" / "faiss_index.json").exists():
            return None
        index = FaissIndex.load(folder / "saved")
        version = len(index) - 5
        assert index.paths == made[version].paths
        assert index.search(torch.eye(5 + version)[3], k=1)[0].index == 3
        return version

    return Kind("faiss", lambda folder, version: made[version].save(folder / "saved"), read)


def bytes_of(name: str, file: str, write: Callable[[Path, int], object]) -> Kind:
    """A kind of file that others open, whose reader can't tell a damage: whole or not there."""
    known = []
    for version in range(2):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), version)
            known.append((Path(folder) / file).read_bytes())

    def read(folder: Path) -> int | None:
        path = folder / file
        return known.index(path.read_bytes()) if path.exists() else None

    return Kind(name, write, read, sealed=False)


def pages() -> Kind:
    labels = torch.tensor([0, 0, 1, 1])
    made = [pairclip.evaluate_embeddings(torch.eye(4) + v, labels) for v in range(2)]
    write = lambda folder, version: pairclip.write_report(folder, None, made[version])  # noqa: E731
    return bytes_of("page", "report.html", write)


def pictures() -> Kind:
    labels = torch.tensor([0, 0, 1, 1])
    made = [pairclip.evaluate_embeddings(torch.eye(4) + v, labels) for v in range(2)]

    def write(folder: Path, version: int) -> None:
        pairclip.plot_class_similarity(made[version], path=folder / "saved.png")

    return bytes_of("picture", "saved.png", write)


def tables() -> Kind:
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    made = [pairclip.check_collection({"all": (images, [0, 1])}) for _ in range(2)]
    for version, check in enumerate(made):
        for item in check.items:
            item.path = (__file__, _ranks.__file__)[version]  # any file
    write = lambda folder, version: made[version].write_clean(folder / "saved.csv")  # noqa: E731
    return bytes_of("table", "saved.csv", write)


KINDS = (
    *(checkpoints, indices, features, towers, histories, evaluations, alignments, approximate),
    *(pages, pictures, tables),
)


def outcome(kind: Kind, folder: Path) -> str:
    """What reading gives: ``old`` or ``new``, or what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {None: "none", 0: "old", 1: "new"}[kind.read(folder)]
    except AssertionError:
        return "torn"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:100]}"


def interrupted(kind: Kind, work: Path, how: str, stride: int) -> Counter[str]:
    """A kill, or an error of a full disk, before every `stride`-th file operation of the writer."""
    counts: Counter[str] = Counter()
    start = work / "start"
    start.mkdir(parents=True)
    kind.write(start, 0)
    number = 0
    while True:
        folder = work / str(number)
        shutil.copytree(start, folder)
        if how == "kill":
            happened = killed_at(number, lambda where=folder: kind.write(where, 1))
        else:
            happened = failed_at(number, lambda where=folder: kind.write(where, 1))
        found = outcome(kind, folder)
        counts["whole" if found in ("old", "new") else "torn"] += 1
        if found not in ("old", "new"):
            print(f"  {kind.name}: {how} before operation {number} left {found}")
        kind.write(folder, 1)
        counts["lost"] += outcome(kind, folder) != "new"
        shutil.rmtree(folder)
        if not happened:
            return counts
        number += stride


_fail_before = [-1]


def _fail(event: str, _: Any) -> None:
    if _fail_before[0] >= 0 and event in EVENTS - {"ctypes.dlsym"}:
        _fail_before[0] -= 1
        if _fail_before[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


def failed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work with an error before one of its file operations; whether there was one."""
    _fail_before[0] = number
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except OSError:
        pass
    finally:
        happened, _fail_before[0] = _fail_before[0] < 0, -1
    return happened


def damaged(kind: Kind, work: Path, count: int, bits: int) -> Counter[str]:
    """Random damages of each file, and single bits of small ones."""
    if not kind.sealed:
        return Counter()
    chance = random.Random(0)
    counts: Counter[str] = Counter()
    work.mkdir(parents=True)
    kind.write(work, 0)
    files = [p for p in sorted(work.rglob("*")) if p.is_file() and p.name != ".lock"]
    files = [path for path in files if "making" not in path.parts]
    for path in files:
        content = path.read_bytes()
        places = range(8 * len(content) if len(content) <= SMALL else 0)
        chosen = places if len(places) <= bits else chance.sample(places, bits)
        attempts = [flipped(content, place) for place in chosen]
        attempts += [wrecked(content, chance) for _ in range(count)]
        for attempt in attempts:
            path.write_bytes(attempt)
            counts[judged(kind, work, path)] += 1
        path.write_bytes(content)
    assert outcome(kind, work) == "old"
    return counts


def judged(kind: Kind, folder: Path, path: Path) -> str:
    """What came of a damage: the old content, an error that names the file, or worse."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            version = kind.read(folder)
    except AssertionError:
        return "silent"
    except (ValueError, OSError) as error:
        if "is not in list" in str(error):  # another content, without a word
            return "silent"
        named = any(str(part) in str(error) for part in (path, path.parent))
        return "refused" if named else "unnamed"
    except Exception as error:
        print(f"  {kind.name}: {type(error).__name__}: {str(error)[:100]}")
        return "unnamed"
    if version == 0:
        return "as before"
    return "refused" if version is None and said else "silent"


def flipped(content: bytes, place: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def wrecked(content: bytes, chance: random.Random) -> bytes:
    """The content cut, longer, partly zero, partly noise or partly twice."""
    start, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return chance.choice(
        [
            lambda: content[:start],
            lambda: content + chance.randbytes(1 + start % 99),
            lambda: content[:start] + bytes(end - start) + content[end:],
            lambda: content[:start] + chance.randbytes(end - start) + content[end:],
            lambda: content[:start] + content[end:],
            lambda: content[:end] + content[start:],
        ]
    )()


def contended(kind: Kind, work: Path, seconds: float) -> Counter[str]:
    """Two processes of four threads each: two write, two read, one name."""
    if not kind.shared:
        return Counter()
    work.mkdir(parents=True)
    kind.write(work, 0)
    queue: Any = multiprocessing.Queue()
    processes = [
        multiprocessing.Process(target=contend, args=(kind, work, seconds, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    counts: Counter[str] = sum((Counter(queue.get()) for _ in processes), Counter())
    for process in processes:
        process.join()
    hidden = [path for path in work.rglob(".*") if path.name != ".lock"]
    counts["lost"] += len(hidden)
    return counts


def contend(kind: Kind, work: Path, seconds: float, queue: Any) -> None:
    """Write and read for some time, in four threads."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def writing() -> None:
        version = 0
        while time.monotonic() < end:
            version = 1 - version
            try:
                kind.write(work, version)
                counts["written"] += 1
            except Exception as error:
                counts["raised"] += 1
                print(f"  {kind.name}: a writer raised {type(error).__name__}: {str(error)[:200]}")

    def reading() -> None:
        while time.monotonic() < end:
            found = outcome(kind, work)
            counts["read" if found in ("old", "new") else "torn"] += 1
            if found not in ("old", "new"):
                print(f"  {kind.name}: a reader found {found}")

    threads = [threading.Thread(target=target) for target in (writing, reading) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(dict(counts))


def main(arguments: list[str] | None = None) -> int:
    """Attempt all, print counts, and say with the exit code whether anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few attempts of each kind")
    parser.add_argument("--only", help="one kind, such as index")
    args = parser.parse_args(arguments)
    stride, count, bits, seconds = (5, 4, 20, 0.5) if args.tiny else (1, 200, 8 * SMALL, 30)
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
    torch.set_num_threads(1)
    sys.addaudithook(_fail)
    multiprocessing.set_start_method("fork", force=True)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="pairclip-breaking-") as folder:
        for make in KINDS:
            kind = make()
            if args.only not in (None, kind.name):
                continue
            work = Path(folder, kind.name)
            for what, counts in (
                ("killed", interrupted(kind, work / "killed", "kill", stride)),
                ("failed", interrupted(kind, work / "failed", "error", stride)),
                ("damaged", damaged(kind, work / "damaged", count, bits)),
                ("contended", contended(kind, work / "contended", seconds)),
            ):
                total += counts
                said = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
                print(f"{kind.name:12} {what:10} {said}", flush=True)
        if args.only in (None, "ranks"):
            names = _ranks.NAMES[:: 6 if args.tiny else 1]
            attempts = [_ranks.attempt(name, Path(folder, "ranks", name)) for name in names]
            counts = sum(attempts, Counter())
            total += counts
            print(f"{'ranks':12} {'':10} {', '.join(f'{n} {name}' for name, n in counts.items())}")
    broken = {name: total[name] for name in BAD if total[name]}
    print(f"broken: {broken or 'nothing'}, of {sum(total.values()):,} attempts")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
