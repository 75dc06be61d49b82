"""Holds tensors against expected ones; a failure names the property, the first wrong place and both values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage.testing.suite import ConformanceError


def require(condition: bool, property: str, finding: str) -> None:
    """Raises ConformanceError unless ``condition``."""
    __tracebackhide__ = True
    if not condition:
        raise ConformanceError(property, finding)


def require_close(
    property: str,
    got: torch.Tensor,
    expected: torch.Tensor,
    allowed: torch.Tensor | float,
    axes: Sequence[str],
    note: str = "",
) -> None:
    """Each element of ``got`` is within ``allowed`` of ``expected``, and finite.

    Args:
        allowed: absolute difference, broadcast over ``expected``. axes: what each dimension counts ("row", "output").
        note: a sentence for the end of the finding.
    """
    __tracebackhide__ = True
    require_same_shape(property, got, expected)
    is_, should = got.to(device="cpu", dtype=torch.float64), expected.to(device="cpu", dtype=torch.float64)
    limit = torch.as_tensor(allowed, dtype=torch.float64, device="cpu").expand(should.shape)
    wrong = ~((is_ - should).abs() <= limit)
    if bool(wrong.any()):
        raise ConformanceError(property, _finding(is_, should, limit, wrong, axes, note))


def require_equal(
    property: str, got: torch.Tensor, expected: torch.Tensor, axes: Sequence[str], note: str = ""
) -> None:
    """Shape, dtype and every bit of ``got`` are those of ``expected``; NaN equals NaN."""
    __tracebackhide__ = True
    require_same_shape(property, got, expected)
    require(got.dtype == expected.dtype, property, f"dtype is {got.dtype}, expected {expected.dtype}")
    is_, should = got.detach().cpu(), expected.detach().cpu()
    wrong = ~((is_ == should) | ((is_ != is_) & (should != should)))
    if bool(wrong.any()):
        zero = torch.zeros(should.shape, dtype=torch.float64, device="cpu")
        raise ConformanceError(property, _finding(is_.double(), should.double(), zero, wrong, axes, note))


def require_same_shape(property: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """``got`` is a tensor of the shape of ``expected``."""
    __tracebackhide__ = True
    require(isinstance(got, torch.Tensor), property, f"expected a tensor, got {type(got).__name__}")
    require(
        got.shape == expected.shape,
        property,
        f"shape is {list(got.shape)}, expected {list(expected.shape)}",
    )


def _finding(
    got: torch.Tensor,
    expected: torch.Tensor,
    allowed: torch.Tensor,
    wrong: torch.Tensor,
    axes: Sequence[str],
    note: str,
) -> str:
    place = tuple(int(index) for index in wrong.nonzero()[0])
    where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, place, strict=True)) or "the value"
    tolerance = float(allowed[place])
    within = "every bit must agree" if tolerance == 0.0 else f"may differ by {tolerance:.2g}"
    text = (
        f"first wrong value at {where}: got {float(got[place]):.9g}, expected {float(expected[place]):.9g} ({within}); "
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong"
    )
    return f"{text}. {note}" if note else text
