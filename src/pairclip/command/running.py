"""What all subcommands share: the parser, exit codes, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pairclip
from pairclip._progress import plain_lines
from pairclip.command import check, evaluate, export, index, search, tune
from pairclip.command.arguments import HelpFormatter

_SUBCOMMANDS = (check, tune, evaluate, index, search, export)
_FAILED, _INTERRUPTED = 1, 130
_UNREADABLE = re.compile(r"Image \d+.* can't be read")
# Flags that have another name than the library's argument.
_FLAGS = {"all_but_last": "train_blocks", "labels": "label_column"}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    whole = argparse.ArgumentParser(
        prog="pairclip",
        description="Fine-tune the image tower of a CLIP model on your labelled images, and search "
        "with it.",
        epilog="pairclip SUBCOMMAND --help says what each takes.",
    )
    whole.add_argument("--version", action="version", version=f"pairclip {pairclip.__version__}")
    parts = whole.add_subparsers(metavar="SUBCOMMAND", required=True)
    for module in _SUBCOMMANDS:
        name = module.__name__.rpartition(".")[2]
        description = " ".join((module.__doc__ or "").split())
        part = parts.add_parser(
            name, help=description, description=description, formatter_class=HelpFormatter
        )
        module.add_arguments(part)
        part.set_defaults(run=module.run, subcommand=f"pairclip {name}")
    return whole


def obey(run: Callable[[Any], Any], args: argparse.Namespace) -> int:
    """Run with these arguments, in words that fit a command line.

    Args:
        run: What to do; what it returns is printed with `--json`.
        args: Handed to it.

    Returns:
        The exit code.
    """
    as_json = getattr(args, "json", False)
    try:
        with warnings.catch_warnings(), plain_lines():
            warnings.showwarning = _show_warning
            with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
                result = run(args)
            if as_json and result is not None:
                print(json.dumps(result))
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"\nInterrupted. {error}".rstrip(" "), file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader had enough; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        print(f"error: {_in_words(error, args)}", file=sys.stderr)
        return _FAILED
    return 0


def _in_words(error: Exception, args: argparse.Namespace) -> str:
    """One line, with flags in place of the names that the library has for them."""

    def flag(match: re.Match[str]) -> str:
        name = _FLAGS.get(match[1], match[1])
        if not hasattr(args, name) and hasattr(args, f"embed_{name}"):
            name = f"embed_{name}"
        return f"--{name.replace('_', '-')}" if hasattr(args, name) else match[0]

    words = re.sub(r"`(\w+)=?`", flag, " ".join(str(error).split())) or type(error).__name__
    if getattr(args, "skip_unreadable", None) is False and _UNREADABLE.search(words):
        words = (
            f"{words.removesuffix('.')}. Leave out such images with --skip-unreadable, or list "
            f"all of them: pairclip check {args.data} --write-clean clean.csv"
        )
    return words


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
