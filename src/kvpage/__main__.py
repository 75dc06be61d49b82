"""``python -m kvpage``."""

from __future__ import annotations

import sys

from kvpage.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
