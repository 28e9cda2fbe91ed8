"""Arguments that several subcommands take, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

CLIP = "openai/clip-vit-base-patch32"
DATA_HELP = (
    "images by class: a folder with a subfolder for each class, or with train/ and test/ (or val/) "
    "that have those; or a table (.csv, .tsv, .parquet, .jsonl) of paths and labels"
)


class HelpFormatter(argparse.HelpFormatter):
    """Writes the default of each option behind its help, unless that tells it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        none = action.default is None or action.default is False  # 0 is a default to tell
        if none or action.default is argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that counts something.

    Args:
        least: The lowest number allowed.
        most: The highest.
    """

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if not least <= number <= most:
            bound = f"at least {least}" if number < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return number

    return whole


def number(low: float, high: float = float("inf"), *, ends: bool = False) -> Callable[[str], float]:
    """The type of an option that measures something.

    Args:
        low: The lowest value.
        high: The highest.
        ends: Whether these two are allowed themselves.
    """

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        within = low <= value <= high if ends else low < value < high
        if not within or math.isinf(value):
            kind = f"between {low:g} and {high:g}"
            if math.isinf(high):
                kind = f"a finite number {'of at least' if ends else 'above'} {low:g}"
            kind += "" if ends or math.isinf(high) else ", without these"
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text}")
        return value

    return real


def add_model(parser: argparse.ArgumentParser, flag: str, meaning: str, **options: object) -> None:
    """Let the parser take a tower."""
    parser.add_argument(
        flag,
        help=f"{meaning}: a folder of transformers, open_clip or timm, or a Hugging Face id",
        **options,  # type: ignore[arg-type]
    )


def add_table_columns(parser: argparse.ArgumentParser) -> None:
    """Let the parser take the columns of a table."""
    parser.add_argument(
        "--image-column",
        default="image",
        metavar="NAME",
        help="column of a table that has the paths of the images",
    )
    parser.add_argument(
        "--label-column",
        default="label",
        metavar="NAME",
        help="column of a table that has the classes",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="folder where the relative paths of a table start (default: the folder of the table)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Let the parser take how images are loaded and embedded."""
    parser.add_argument(
        "--num-workers",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="processes that load images beside the main one; 0 loads them in the main one",
    )
    parser.add_argument(
        "--embed-batch-size",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="number of images embedded at once",
    )


def add_skip(parser: argparse.ArgumentParser) -> None:
    """Let the parser take what to do about images that can't be read."""
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="read every image once before anything else, and leave out those that can't be read "
        "(default: the first one of them ends the run)",
    )


def add_page(parser: argparse.ArgumentParser, what: str) -> None:
    """Let the parser take where a page goes, and whether it replaces the `what` that is there."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write a page there, too (default: results are only printed)",
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let the parser take `--json`."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as JSON, and everything else to standard error",
    )
