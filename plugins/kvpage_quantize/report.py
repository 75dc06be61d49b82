"""How far each layer is from what it was: collected while quantizing, printed as a table, written as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """Of one linear layer; each a Euclidean norm of the difference as a share of that of the original.

    Attributes:
        weight: of its weight; of AWQ after its inputs were rescaled.
        output: of its output on the calibration text. nearest: the same, had its weight been rounded to nearest in
            the same format. ``None`` of methods that see no text.
    """

    name: str
    weight: float
    output: float | None = None
    nearest: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was done. ``settings`` are the method's; sizes are bytes of the tensors before and after."""

    model: str
    method: str
    settings: dict[str, Any]
    bytes_before: int
    bytes_after: int
    layers: list[LayerError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """The table, and a line of means."""
        kept = [key for key in ("weight", "output", "nearest") if getattr(self.layers[0], key) is not None]
        titles = {"weight": "weight error", "output": "output error", "nearest": "if rounded to nearest"}
        width = max(len(row.name) for row in self.layers)
        lines = ["  ".join([f"{'linear layer':<{width}}", *(titles[key] for key in kept)])]
        rows = [(row.name, [getattr(row, key) for key in kept]) for row in self.layers]
        rows.append(
            ("mean", [sum(column) / len(column) for column in zip(*(r for _, r in rows), strict=True)])
        )
        for name, values in rows:
            cells = [
                f"{_percent(value):>{len(titles[key])}}" for key, value in zip(kept, values, strict=True)
            ]
            lines.append("  ".join([f"{name:<{width}}", *cells]))
        return "\n".join(lines)


class SquaredError:
    """A relative error of numbers that come in parts."""

    def __init__(self) -> None:
        self.difference = 0.0
        self.original = 0.0

    def add(self, difference: float, original: float) -> None:
        """Sums of squares of one part."""
        self.difference += difference
        self.original += original

    @property
    def relative(self) -> float:
        """0 where nothing differs, were it of zeros."""
        return math.sqrt(self.difference / self.original) if self.original else float(self.difference > 0)


class StepBar:
    """Steps done of all on stderr while quantizing; gone afterwards. Not shown where stderr is no terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bar = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.stop()

    def track(self, items: Sequence[T], what: str) -> Iterator[T]:
        """``items`` one by one; a step is done when the next is asked for."""
        task = self.begin(what, len(items))
        for item in items:
            yield item
            self.advance(task)

    def begin(self, what: str, total: int) -> TaskID:
        """A line of its own for ``total`` steps."""
        return self._bar.add_task(what, total=total)

    def advance(self, task: TaskID) -> None:
        """One step of ``task`` is done."""
        self._bar.advance(task)


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"
