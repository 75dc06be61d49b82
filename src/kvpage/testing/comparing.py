"""Holds tensors against expected ones; a failure names the property, the first wrong place and both values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage.testing.suite import ConformanceError

WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by bytes an element."""


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
        raise ConformanceError(property, _finding(is_, should, zero, wrong, axes, note))


def require_same_shape(property: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """``got`` is a tensor of the shape of ``expected``."""
    __tracebackhide__ = True
    require(isinstance(got, torch.Tensor), property, f"expected a tensor, got {type(got).__name__}")
    require(
        got.shape == expected.shape,
        property,
        f"shape is {list(got.shape)}, expected {list(expected.shape)}",
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same elements as integers, which compare bit by bit; any strides."""
    if tensor.dtype in (torch.bool, *WHOLE.values()):
        return tensor
    return tensor.view(WHOLE[tensor.dtype.itemsize])


def told_apart(got: torch.Tensor, expected: torch.Tensor) -> tuple[str, str]:
    """Two elements in words: as decimals, and with their bits where the decimals agree."""
    texts = [_decimal(got), _decimal(expected)]
    if texts[0] != texts[1]:
        return texts[0], texts[1]
    one, other = (
        f"{text} ({value.dtype}, bits {int(bits(value)) % (1 << 8 * value.dtype.itemsize):#x})".replace(
            "torch.", ""
        )
        for text, value in zip(texts, (got, expected), strict=True)
    )
    return one, other


def _decimal(value: torch.Tensor) -> str:
    whole = value.dtype in (torch.bool, *WHOLE.values())
    return str(int(value)) if whole else f"{float(value):.9g}"


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
    is_, should = told_apart(got[place], expected[place])
    text = (
        f"first wrong value at {where}: got {is_}, expected {should} ({within}); "
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong"
    )
    return f"{text}. {note}" if note else text
