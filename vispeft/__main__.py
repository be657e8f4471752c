"""``python -m vispeft``: the console command, for an installation whose scripts are not on the path."""

from __future__ import annotations

import sys

from vispeft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
