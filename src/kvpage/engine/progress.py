"""The progress bar of offline generation."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Requests done of all, and tokens a second, on stderr; gone when it is left."""

    def __init__(self, total: int) -> None:
        columns = (
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
        )
        self._bar = RichProgress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )  # sys.stdout and sys.stderr are the host's
        self._task = self._bar.add_task("generate", total=total, speed=0.0)
        self._began = time.perf_counter()

    def update(self, done: int, tokens: int) -> None:
        """``done`` requests have ended; ``tokens`` were generated in all."""
        self._bar.update(
            self._task, completed=done, speed=tokens / max(1e-9, time.perf_counter() - self._began)
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
