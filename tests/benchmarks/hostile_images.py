"""Damaged images of twenty formats through every way in: alike, or named in an error.

    python tests/benchmarks/hostile_images.py [--mutations 20000] [--seed 0]

Mutates small images, reads each through six kinds of dataset, and counts. A fault is a mutation
that one way in shows otherwise than another, an error that doesn't say which image it is about,
more than 5 s, or more than 1 GB. Exits with 1 if there is one, and keeps the file. Needs Linux,
``pip install "pairclip[datasets]"`` and a Pillow with AVIF and JPEG 2000.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from pairclip import LabelledImages

MOST_SECONDS, MOST_BYTES = 5.0, 1e9
AT_ONCE = 100


def samples() -> dict[str, tuple[str, bytes]]:
    """A small image of each format: its suffix and its bytes."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 4), dtype=np.uint8))
    rgba = coarse.resize((64, 48), Image.Resampling.BICUBIC)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    palette = rgb.quantize(32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[str, Image.Image, str, dict[str, Any]]] = {
        "JPEG": (".jpg", rgb, "JPEG", {}),
        "JPEG, progressive": (".jpg", rgb, "JPEG", {"progressive": True}),
        "JPEG, CMYK": (".jpg", rgb.convert("CMYK"), "JPEG", {}),
        "JPEG, turned": (".jpg", rgb, "JPEG", {"exif": exif}),
        "JPEG, grey": (".jpg", grey, "JPEG", {}),
        "PNG": (".png", rgb, "PNG", {}),
        "PNG, transparent": (".png", rgba, "PNG", {"exif": exif}),
        "PNG, palette": (".png", palette, "PNG", {"transparency": 3}),
        "PNG, 16 bits": (".png", deep, "PNG", {}),
        "PNG, animated": (".png", rgb, "PNG", {"save_all": True, "append_images": [rgb]}),
        "GIF": (".gif", palette, "GIF", {"transparency": 3}),
        "GIF, animated": (".gif", palette, "GIF", {"save_all": True, "append_images": [grey]}),
        "WebP": (".webp", rgb, "WEBP", {"exif": exif}),
        "WebP, lossless": (".webp", rgba, "WEBP", {"lossless": True}),
        "TIFF": (".tif", rgb, "TIFF", {"exif": exif}),
        "TIFF, deflated": (".tif", rgba, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "BMP": (".bmp", rgb, "BMP", {}),
        "TGA": (".tga", rgba, "TGA", {"compression": "tga_rle"}),
        "PPM": (".ppm", rgb, "PPM", {}),
        "AVIF": (".avif", rgba, "AVIF", {}),
        "JPEG 2000": (".jp2", rgb, "JPEG2000", {}),
        "ICO": (".ico", rgba, "ICO", {"sizes": [(32, 32)]}),
    }
    made = {}
    for name, (suffix, image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[name] = suffix, buffer.getvalue()
    return made


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content after one to three damages."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = min(int(draw.expovariate(4 / len(data))), len(data) - 1)  # headers rather
        if draw.random() < 0.3:
            place = draw.randrange(len(data))
        damage = draw.randrange(7)
        if damage == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif damage == 1:
            data[place] = draw.choice([0, 1, 127, 128, 255])
        elif damage == 2:
            value = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**16, 30_000, 11_000])
            data[place : place + 4] = struct.pack(draw.choice(["<I", ">I"]), value)
        elif damage == 3:
            del data[max(place, 4) :]
        elif damage == 4:
            del data[place : place + draw.randint(1, 16)]
        elif damage == 5:
            data[place:place] = draw.randbytes(draw.randint(1, 16))
        else:
            other = draw.randrange(len(data))
            length = draw.randint(1, 32)
            data[place : place + length] = data[other : other + length]
        if not data:
            return bytes(content[:4])
    return bytes(data)


def ways_in(folder: Path, paths: list[Path], suffix: str) -> dict[str, Callable[[int], Any]]:
    """Reads image i through each kind of dataset."""
    contents = [path.read_bytes() for path in paths]
    labels = [0] * len(paths)
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a"])})
    rows = [{"bytes": content, "path": None} for content in contents]
    in_rows = hf.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    opened: list[Any] = []
    for content in contents:
        try:
            opened.append(Image.open(io.BytesIO(content)))
        except Exception as error:  # whatever: the caller's own call failed
            opened.append(error)
    sources = {
        "path": (paths, labels),
        "bytes": (contents, labels),
        "PIL": (opened, labels),
        "folder": folder,
        "Hugging Face": in_rows,
    }
    if suffix in IMG_EXTENSIONS:
        sources["ImageFolder"] = ImageFolder(folder)
    data = {name: LabelledImages(source) for name, source in sources.items()}

    def reader(name: str) -> Callable[[int], Any]:
        return lambda index: data[name][index][0]

    return {name: reader(name) for name in sources}


def outcome(read: Callable[[int], Any], index: int) -> str:
    """What comes out: a digest of the pixels, an error that names the image, or another one."""
    try:
        image = read(index)
    except (ValueError, TypeError) as error:
        return "refused" if str(error).startswith(f"Image {index}") else f"unnamed: {error!r}"
    except Exception as error:
        return f"unnamed: {error!r}"
    return f"{image.size} " + hashlib.sha256(image.tobytes()).hexdigest()


def memory(field: str) -> int:
    """A line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def groups(count: int, seed: int) -> Iterator[tuple[str, str, list[bytes]]]:
    """Mutations, some of one format at a time."""
    made = samples()
    draw = random.Random(seed)
    done = 0
    while done < count:
        for name, (suffix, content) in made.items():
            some = min(AT_ONCE, count - done)
            if some:
                yield name, suffix, [mutated(content, draw) for _ in range(some)]
            done += some


def main(arguments: list[str] | None = None) -> int:
    """Mutate, read, count and print; 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("hostile"), help="where faults are kept")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    hf.disable_progress_bars()
    counts: Counter[tuple[str, str]] = Counter()
    slowest, largest, faults = 0.0, 0, 0
    for name, suffix, contents in groups(args.mutations, args.seed):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "a").mkdir()
            paths = [folder / "a" / f"{number:04}{suffix}" for number in range(len(contents))]
            for path, content in zip(paths, contents, strict=True):
                path.write_bytes(content)
            readers = ways_in(folder, paths, suffix)
            for index, path in enumerate(paths):
                faulthandler.dump_traceback_later(60, exit=True)
                Path("/proc/self/clear_refs").write_text("5")
                start, before = time.perf_counter(), memory("VmRSS")
                outcomes = {"path": outcome(readers["path"], index)}
                seconds, taken = time.perf_counter() - start, memory("VmHWM") - before
                slowest, largest = max(slowest, seconds), max(largest, taken)
                outcomes |= {way: outcome(read, index) for way, read in readers.items()}
                kinds = set(outcomes.values())
                fault = None
                if any(kind.startswith("unnamed") for kind in kinds):
                    fault = "unnamed"
                elif len(kinds) > 1:
                    fault = "differs"
                elif seconds > MOST_SECONDS:
                    fault = "slow"
                elif taken > MOST_BYTES:
                    fault = "large"
                counts[name, fault or ("refused" if kinds == {"refused"} else "alike")] += 1
                if fault is not None:
                    faults += 1
                    args.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, args.keep / f"{fault}-{faults}{suffix}")
                    print(f"{fault}: {name}: {outcomes} {seconds:.1f} s {taken / 1e6:.0f} MB")
                faulthandler.cancel_dump_traceback_later()
    columns = ("alike", "refused", "unnamed", "differs", "slow", "large")
    print(f"\n{'format':20}" + "".join(f"{column:>9}" for column in columns))
    for name in samples():
        print(f"{name:20}" + "".join(f"{counts[name, column]:9,}" for column in columns))
    totals = [sum(counts[name, column] for name in samples()) for column in columns]
    print(f"{'all':20}" + "".join(f"{total:9,}" for total in totals))
    print(f"slowest {slowest:.2f} s, largest {largest / 1e6:.0f} MB, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
