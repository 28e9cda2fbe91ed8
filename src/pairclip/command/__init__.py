"""The `pairclip` command: each subcommand reads its arguments and calls the library."""

from pairclip.command.running import main

__all__ = ["main"]
