"""Arguments that several subcommands take, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
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
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that counts something.

    Args:
        least: The lowest number allowed.
    """

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
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
        if not (low <= value <= high if ends else low < value < high):
            kind = f"between {low:g} and {high:g}" if high < float("inf") else f"above {low:g}"
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
        "--image-column", default="image", metavar="NAME", help="of a table: paths of the images"
    )
    parser.add_argument(
        "--label-column", default="label", metavar="NAME", help="of a table: the classes"
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="of a table: where its paths start (default: beside it)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Let the parser take how images are loaded and embedded."""
    parser.add_argument(
        "--num-workers",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="processes that load images beside the main one",
    )
    parser.add_argument(
        "--embed-batch-size",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="images embedded at once",
    )


def add_page(parser: argparse.ArgumentParser, what: str) -> None:
    """Let the parser take where a page goes, and whether it replaces the `what` that is there."""
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write a page there (default: print alone)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace the {what} that is in OUTPUT"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let the parser take `--json`."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as JSON, and everything else to standard error",
    )
