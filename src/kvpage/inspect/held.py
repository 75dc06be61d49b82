"""How the quantized weights of a checkpoint will be held: packed, or as plain numbers where nothing computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldWeight:
    """One parameter that a checkpoint stores quantized.

    Attributes:
        form: what it is in memory ("4-bit integers, groups of 128, zero points").
        nbytes: of that, or of the plain numbers where ``kernel`` is ``None``.
        kernel: the linear kernel that computes the form on this device.
        cut: tensor-parallel ranks take slices of the form; else each dequantizes the matrix and keeps its share,
            ``plain_bytes`` in all.
    """

    form: str
    nbytes: int
    plain_bytes: int
    kernel: str | None
    cut: bool = True


Held: TypeAlias = Mapping[str, HeldWeight]
"""kvpage's name of a parameter -> how it is held."""
Holding: TypeAlias = Callable[[str, str, int], Held]
"""(device type, dtype name, ranks) -> what an engine there would hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldLine:
    """All matrices of a model that are held alike. ``nbytes``: of all of them, on all devices."""

    form: str
    kernel: str | None
    cut: bool
    matrices: int
    nbytes: int


def held_lines(held: Held, ranks: int) -> tuple[HeldLine, ...]:
    """``held`` by form, the largest first."""
    sums: dict[tuple[str, str | None, bool], tuple[int, int]] = {}
    for weight in held.values():
        key = (weight.form, weight.kernel, weight.cut or ranks == 1)
        count, size = sums.get(key, (0, 0))
        sums[key] = (count + 1, size + held_bytes(weight, ranks))
    lines = [
        HeldLine(form=form, kernel=kernel, cut=cut, matrices=count, nbytes=size)
        for (form, kernel, cut), (count, size) in sums.items()
    ]
    return tuple(sorted(lines, key=lambda line: -line.nbytes))


def held_bytes(weight: HeldWeight, ranks: int) -> int:
    """Bytes on all ranks together."""
    return weight.nbytes if ranks == 1 or weight.cut else weight.plain_bytes


def held_text(lines: tuple[HeldLine, ...], dtype: str, size: Callable[[int], str]) -> Iterator[str]:
    """A line for each kind of weight; ``size`` writes bytes for people."""
    for line in lines:
        noun = "matrix" if line.matrices == 1 else "matrices"
        if line.kernel is None:
            how = f"dequantized to {dtype} at load: no kernel here computes them packed"
        elif not line.cut:
            how = f"dequantized to {dtype} and then cut: a rank's share does not end where its groups do"
        else:
            how = f"stay packed, kernel {line.kernel}"
        yield f"  {line.matrices} {noun} of {line.form}: {size(line.nbytes)}, {how}"
