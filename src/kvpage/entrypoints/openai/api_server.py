"""``python -m kvpage.entrypoints.openai.api_server FLAGS`` is ``kvpage serve FLAGS``."""

from __future__ import annotations

import sys

from kvpage.entrypoints.api_server import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
