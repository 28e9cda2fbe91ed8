"""``python -m pairclip`` is the `pairclip` command."""

import sys

from pairclip.command import main

if __name__ == "__main__":
    sys.exit(main())
