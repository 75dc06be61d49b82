"""Where a parameter lies in a stored tensor: the arithmetic of ``WeightRef``."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import torch

from kvpage.api.model import WeightRef


def present(ref: WeightRef, names: Container[str]) -> WeightRef:
    """``ref``, or its ``otherwise``, by the name that is there: its own, or the bare model's.

    The bare model's names lack the first part ("model.", "transformer."). What is nowhere keeps its own name.
    """
    place: WeightRef | None = ref
    while place is not None:
        for name in (place.name, place.name.partition(".")[2]):
            if name in names:
                return replace(place, name=name)
        place = place.otherwise
    return ref


def entry_shape(stored: tuple[int, ...], ref: WeightRef) -> tuple[int, ...]:
    """Shape of what ``ref`` takes its outputs from: the tensor, or one entry of it."""
    return stored if ref.index is None else stored[1:]


def fits(stored: tuple[int, ...], ref: WeightRef, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of ``shape`` lies at ``ref`` in a tensor of shape ``stored``."""
    if ref.index is not None and (not stored or ref.index >= stored[0]):
        return False
    entry = entry_shape(stored, ref)
    outputs_first = entry[::-1] if ref.transpose else entry
    if ref.rows is None:
        return outputs_first == shape
    if outputs_first[1:] != shape[1:] or not outputs_first:
        return False
    return sum(stop - start for start, stop in ranges(ref, outputs_first[0])) == shape[0]


def ranges(ref: WeightRef, outputs: int) -> list[tuple[int, int]]:
    """The outputs of ``ref`` within a tensor that has ``outputs``; those beyond it are left out."""
    if ref.rows is None:
        return [(0, outputs)]
    start, stop = ref.rows
    if ref.every is None:
        return [(start, stop)] if stop <= outputs else []
    return [(base + start, base + stop) for base in range(0, outputs - ref.every + 1, ref.every)]


def columns(ref: WeightRef, outputs: int) -> torch.Tensor | slice:
    """The outputs of ``ref`` as an index into the columns of a transposed tensor that has ``outputs``."""
    found = ranges(ref, outputs)
    if len(found) == 1:
        return slice(*found[0])
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in found])
