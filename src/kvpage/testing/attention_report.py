"""Compares what a backend did with the truth; what it finds names the property, the place and both values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvpage.api.attention import AttentionLayer
from kvpage.testing.attention_oracle import RowData, diagnose, exact_row
from kvpage.testing.attention_patterns import Wrong, pattern
from kvpage.testing.attention_rig import GUARD, Rig, Row, Step
from kvpage.testing.comparing import told_apart
from kvpage.testing.suite import ConformanceError

NOT_FINITE = (
    "unused slots: not all values are finite. NaN stands in every slot that nobody wrote (beyond a row's length, "
    "behind its window, in blocks that it does not own), in padding tokens and between strided inputs; one of "
    "them took part (0 * NaN is NaN), unless the arithmetic overflowed"
)


def describe(layer: AttentionLayer) -> str:
    """The layer record in one line."""
    parts = [f"scale {layer.scale:.6g}"]
    parts += [f"window {layer.window}"] if layer.window is not None else []
    parts += [f"softcap {layer.softcap:g}"] if layer.softcap is not None else []
    return ", ".join([*parts, *(["sinks"] if layer.sinks is not None else [])])


def check_step(property: str, rig: Rig, step: Step, tolerance: tuple[float, float]) -> float:
    """Hold every layer's output of a step against the oracle; the largest difference found.

    Raises:
        ConformanceError: one element is further off than absolute + relative * |expected|, or not finite, or a
            token outside the step was written.
    """
    __tracebackhide__ = True
    worst = 0.0
    for index, (layer, output) in enumerate(zip(step.layers, step.outputs, strict=True)):
        expected = [
            None if row.sequence is None else exact_row(rig.row_data(row, index), layer) for row in step.rows
        ]
        got = output.to(device="cpu", dtype=torch.float64)
        token, wrong = 0, []
        for row, wanted in zip(step.rows, expected, strict=True):
            mine = got[token : token + row.count]
            token += row.count
            if wanted is None or not row.count:
                continue
            difference = (mine - wanted).abs()
            allowed = tolerance[0] + tolerance[1] * wanted.abs()
            wrong.append((token - row.count, row, mine, wanted, ~(difference <= allowed)))
            worst = max(worst, float(difference.nan_to_num(torch.inf).max()))
        if any(bool(item[-1].any()) for item in wrong):
            raise ConformanceError(property, _wrong_output(rig, step, index, wrong, tolerance))
        _check_guards(property, rig, step, index)
    return worst


Compared = Sequence[tuple[int, Row, torch.Tensor, torch.Tensor, torch.Tensor]]
"""A row with queries: its first token in the step, the row, output, expected, and bool [Q, Hq, Dv], what is wrong."""


def _wrong_output(
    rig: Rig, step: Step, index: int, compared: Compared, tolerance: tuple[float, float]
) -> str:
    first, row, got, wanted, wrong = next(item for item in compared if bool(item[-1].any()))
    query, head, element = (int(i) for i in wrong.nonzero()[0])
    position = row.first + query
    assert row.sequence is not None, "padding is never compared"
    slot = rig.slot(row.sequence, position)
    is_, should = float(got[query, head, element]), float(wanted[query, head, element])
    bad = [step.rows.index(item[1]) for item in compared if bool(item[-1].any())]
    rows = [(rig.row_data(item[1], index), item[2]) for item in compared]
    likely = diagnose(rows, step.layers[index], tolerance)
    if not likely and len(bad) < len(compared):
        likely = diagnose(_those_wrong(rig, compared, index), step.layers[index], tolerance)
        likely += " (in the wrong rows)" if likely else ""
    if not likely and any(bool((~item[2].isfinite()).any()) for item in compared):
        likely = NOT_FINITE
    if not likely or likely == NOT_FINITE:
        shared = pattern([Wrong(row.first, row.count, wrong) for _, row, _, _, wrong in compared], rig.size)
        likely = "; ".join(part for part in (likely, shared) if part)
    lines = [
        f"first wrong value at row {step.rows.index(row)}, head {head}, token {first + query} (position {position} "
        f"of {row.last}), block {position // rig.size} (pool block {slot // rig.size}, offset {slot % rig.size}), "
        f"element {element}: got {is_:.7g}, expected {should:.7g} "
        f"(may differ by {tolerance[0] + tolerance[1] * abs(should):.2g})",
        f"case: {rig.shape}; {describe(step.layers[index])}" + (f"; layer {index}" if index else ""),
        f"row: {row.count} queries after {row.first} cached tokens, blocks {_shortened(rig.row_data(row, index).blocks)}",
        f"wrong: {sum(int(item[-1].sum()) for item in compared)} of {sum(item[2].numel() for item in compared)} "
        f"elements, in rows {', '.join(map(str, bad))} of {len(step.rows)}",
    ]
    return "\n  ".join([*lines, *([f"looks like: {likely}"] if likely else [])])


def _shortened(blocks: Sequence[int]) -> str:
    shown = ", ".join(map(str, blocks[:12]))
    return f"[{shown}]" if len(blocks) <= 12 else f"[{shown}, ... {len(blocks)} of them]"


def _those_wrong(rig: Rig, compared: Compared, index: int) -> list[tuple[RowData, torch.Tensor]]:
    return [(rig.row_data(item[1], index), item[2]) for item in compared if bool(item[-1].any())]


def _check_guards(property: str, rig: Rig, step: Step, index: int) -> None:
    __tracebackhide__ = True
    guard = step.guards[index].double().cpu()
    touched = (guard != float(torch.tensor(GUARD).to(step.guards[index].dtype))).nonzero()
    if len(touched):
        side, head, element = (int(i) for i in touched[0])
        token = -1 if side == 0 else step.batch.num_tokens
        raise ConformanceError(
            property,
            f"padding tokens: attend wrote outside of out: token {token} of {step.batch.num_tokens}, head {head}, element "
            f"{element} became {float(guard[side, head, element]):.7g}, was {GUARD}\n  case: {rig.shape}",
        )


def check_tensor(
    property: str,
    name: str,
    got: torch.Tensor,
    wanted: torch.Tensor,
    tolerance: tuple[float, float] | None = None,
    where: Callable[[int], str] | None = None,
) -> None:
    """got equals wanted: to the bit, NaN and all, or within (absolute, relative) where a tolerance is given.

    ``where`` tells of a token's number which row it is in.

    Raises:
        ConformanceError: with the first place that differs; of q, k and v that is (token, head, element).
    """
    __tracebackhide__ = True
    if got.shape != wanted.shape:
        raise ConformanceError(
            property, f"{name} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
        )
    if tolerance is None:
        differs = (got != wanted) & ~(got.isnan() & wanted.isnan())
    else:
        got, wanted = got.double(), wanted.double()
        near = (got - wanted).abs() <= tolerance[0] + tolerance[1] * wanted.abs()
        differs = ~near & ~(got.isnan() & wanted.isnan())
    places = differs.nonzero()
    if not len(places):
        return
    place = tuple(int(i) for i in places[0])
    named = zip(("token", "head", "element"), place, strict=False) if len(place) == 3 else [("index", place)]
    is_, should = told_apart(got[place], wanted[place])
    beside = f" ({where(place[0])})" if where is not None and len(place) == 3 else ""
    raise ConformanceError(
        property,
        f"{name} is wrong first at {', '.join(f'{axis} {at}' for axis, at in named)}{beside}: got {is_}, "
        f"expected {should}{' to the bit' if tolerance is None else ''}; "
        f"{len(places)} of {got.numel()} elements differ",
    )
