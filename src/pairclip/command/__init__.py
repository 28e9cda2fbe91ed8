"""The `pairclip` command: each subcommand reads its arguments and calls the library."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; None takes the program's own.

    Returns:
        The exit code: 0, 1 if it failed, or 130 after Ctrl-C. Wrong usage exits with 2.

    Example:
        >>> from pairclip.command import main
        >>> main(["index", "no-such-folder", "photos", "--output", "index"])
        1
    """
    try:
        # Here, so that Ctrl-C while it is loaded is one line, too.
        from pairclip.command.running import obey, parser

        args = parser().parse_args(arguments)
        return obey(args.run, args)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
