"""``python -m kvpage.entrypoints.api_server FLAGS`` is ``kvpage serve FLAGS``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvpage.cli.main import main as run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; ``arguments`` are those of the process unless given. Returns the exit status."""
    return run_command(["serve", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
