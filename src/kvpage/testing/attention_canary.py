"""Finds every byte of a KV tensor that a call wrote, in any layout: the same call over two different fillings.

A byte that still is what it was filled with, both times, was not written. Which bytes belong to a slot is found
the same way: by writing that slot alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvpage.testing.attention_rig import Options, Rig, Row
from kvpage.testing.suite import ConformanceError

FILLINGS = (0xA5, 0x5A)
PADDING = 777.0
"""What padding tokens carry in K and V here, so that it is known where it ends up."""


@dataclass(slots=True)
class Written:
    """What a call did to one layer's room: bool [blocks, bytes], and the bytes before and after, uint8.

    Block 0 of the room is ``margin`` blocks before the pool's null block.
    """

    touched: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def written_by(rig: Rig, call: Callable[[], None]) -> Written:
    """Run ``call`` over each filling of the first layer's KV tensor and its margins."""
    results = []
    for filling in FILLINGS:
        rig.rooms[0].view(torch.uint8).fill_(filling)
        call()
        results.append(rig.rooms[0].view(torch.uint8).flatten(1).cpu().clone())
    touched = (results[0] != FILLINGS[0]) | (results[1] != FILLINGS[1])
    return Written(touched, torch.full_like(results[0], FILLINGS[0]), results[0])


def write_call(rig: Rig, rows: Sequence[Row], options: Options) -> Callable[[], None]:
    """plan() and write_kv() of a step over ``rows``."""
    batch = rig.batch(rows, options)
    _, k, v = rig.inputs(rows, 0, options.trailing, padding=PADDING)

    def call() -> None:
        rig.backend.plan(batch)
        rig.backend.write_kv(rig.kv[0], k, v, batch)

    return call


def check_writes(property: str, rig: Rig, rows: Sequence[Row], options: Options | None = None) -> None:
    """``write_kv`` of a step writes the slots it was given, all of them, and not a byte besides.

    Raises:
        ConformanceError: naming the block and slot, whose it is, the token found there, and both values.
    """
    __tracebackhide__ = True
    options = options or Options()
    written = written_by(rig, write_call(rig, rows, options))
    given = [slot for slot in rig.slots(rows) if slot >= 0]
    owned = {slot: _bytes_of_slot(rig, slot) for slot in given}
    stray = written.touched.clone()
    for block, mask in owned.values():
        stray[block] &= ~mask
    if bool(stray.any()):
        block, byte = (int(i) for i in stray.nonzero()[0])
        raise ConformanceError(property, _stray(rig, rows, options, written, block, byte, int(stray.sum())))
    for token, slot in enumerate(slot for slot in rig.slots(rows) if slot >= 0):
        block, mask = owned[slot]
        missing = mask & ~written.touched[block]
        if bool(missing.any()):
            raise ConformanceError(
                property,
                f"write_kv left a slot out: {_token(rig, rows, token, padding=False)} belongs to "
                f"{_place(rig, block)}, offset {slot % rig.size}; {int(missing.sum())} of its "
                f"{int(mask.sum())} bytes still are what they were ({FILLINGS[0]:#x})\n  case: {rig.shape}",
            )


def _bytes_of_slot(rig: Rig, slot: int) -> tuple[int, torch.Tensor]:
    """Block of the room, and bool [bytes] of that block: what writing this slot alone touches there."""
    sequence, position = next(
        (sequence, table.index(slot // rig.size) * rig.size + slot % rig.size)
        for sequence, table in enumerate(rig.tables)
        if slot // rig.size in table
    )
    alone = written_by(rig, write_call(rig, [Row(sequence, position, position + 1)], Options()))
    block = slot // rig.size + rig.margin
    return block, alone.touched[block]


def _stray(
    rig: Rig, rows: Sequence[Row], options: Options, written: Written, block: int, byte: int, count: int
) -> str:
    kind = rig.rooms[0].dtype
    at = byte - byte % kind.itemsize
    before, after = (
        float(values[block, at : at + kind.itemsize].clone().view(kind)[0])
        for values in (written.before, written.after)
    )
    return (
        f"write_kv wrote a slot that it was not given: {_place(rig, block)}{_owner(rig, block, byte)}, byte {byte}: "
        f"got {after:.7g}, expected {before:.7g} as before; {_source(rig, rows, options, after)}\n"
        f"  wrong: {count} bytes; case: {rig.shape}; slot_mapping holds "
        f"{rig.slots(rows).count(-1) + options.trailing} tokens of -1"
    )


def _place(rig: Rig, block: int) -> str:
    inside = block - rig.margin
    if not 0 <= inside < rig.num_blocks:
        return f"memory {'before' if inside < 0 else 'after'} the KV tensor ({inside - rig.num_blocks * (inside > 0)} blocks)"
    return f"pool block {inside}" + (" (the null block)" if inside == 0 else "")


def _owner(rig: Rig, block: int, byte: int) -> str:
    """Row, logical block and offset that the byte belongs to."""
    inside = block - rig.margin
    for sequence, table in enumerate(rig.tables):
        if inside not in table:
            continue
        logical = table.index(inside)
        for offset in range(rig.size):
            if logical * rig.size + offset >= rig.lengths[sequence]:
                break
            if bool(_bytes_of_slot(rig, inside * rig.size + offset)[1][byte]):
                return f", offset {offset} (block {logical} of sequence {sequence})"
        return f" (block {logical} of sequence {sequence})"
    return " (nobody's)" if inside in rig.unowned else ""


def _source(rig: Rig, rows: Sequence[Row], options: Options, value: float) -> str:
    """Which token, head and element of K or V this value came from."""
    if value == float(torch.tensor(PADDING).to(rig.k[0][0].dtype)):
        token = rig.slots([*rows, Row(None, 0, options.trailing)]).index(-1)
        return f"that is what padding tokens carry, the first is {_token(rig, rows, token, padding=True)}, head 0"
    _, k, v = rig.inputs(rows, 0, options.trailing, padding=PADDING)
    for name, tensor in (("K", k), ("V", v)):
        found = (tensor.double().cpu() == value).nonzero()
        if len(found):
            token, head, element = (int(i) for i in found[0])
            return (
                f"that is {name} of {_token(rig, rows, token, padding=True)}, head {head}, element {element}"
            )
    return "which no token of the step carries"


def _token(rig: Rig, rows: Sequence[Row], token: int, *, padding: bool) -> str:
    """A token of the step by its number, counted with or without padding."""
    left = token
    for index, row in enumerate(rows):
        if row.sequence is None and not padding:
            continue
        if left < row.count:
            where = "padding" if row.sequence is None else f"position {row.first + left}"
            return f"token {token} (row {index}, {where})"
        left -= row.count
    return f"token {token} (padding after the last row)"
