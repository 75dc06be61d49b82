"""Finds every byte of a KV tensor that a call wrote, in any layout: the same call over two different fillings.

A byte that still is what it was filled with, both times, was not written. Which bytes belong to a slot is found
the same way: by writing that slot alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvpage.testing.attention_rig import Options, Rig, Row
from kvpage.testing.comparing import told_apart
from kvpage.testing.suite import ConformanceError

FILLINGS = (0xA5, 0x5A)
PADDING = 768.0
"""What padding tokens carry in K and V here, so that it is known where it ends up."""


@dataclass(slots=True)
class Written:
    """What a call did to one layer's room: bool [blocks, bytes], and the bytes after it, uint8, for each filling.

    Block 0 of the room is ``margin`` blocks before the pool's null block.
    """

    touched: torch.Tensor
    results: tuple[torch.Tensor, ...]

    @property
    def after(self) -> torch.Tensor:
        """The bytes that the call left over the first filling."""
        return self.results[0]

    def seen_at(self, block: int, byte: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The room before and after, over a filling that shows that this byte was written."""
        for filling, after in zip(FILLINGS, self.results, strict=True):
            if int(after[block, byte]) != filling:
                return torch.full_like(after, filling), after
        return torch.full_like(self.after, FILLINGS[0]), self.after


def written_by(rig: Rig, call: Callable[[], None]) -> Written:
    """Run ``call`` over each filling of the first layer's KV tensor and its margins."""
    results = []
    for filling in FILLINGS:
        rig.rooms[0].view(torch.uint8).fill_(filling)
        call()
        results.append(rig.rooms[0].view(torch.uint8).flatten(1).cpu().clone())
    touched = (results[0] != FILLINGS[0]) | (results[1] != FILLINGS[1])
    return Written(touched, tuple(results))


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
    alone = {slot: _write_alone(rig, slot) for slot in sorted(_neighbours(rig, given))}
    _check_apart(property, rig, rows, alone)
    stray = written.touched.clone()
    for slot in given:
        block = slot // rig.size + rig.margin
        stray[block] &= ~alone[slot].touched[block]
    if bool(stray.any()):
        block, byte = (int(i) for i in stray.nonzero()[0])
        owner = _owner(rig, alone, block, byte)
        raise ConformanceError(
            property, _stray(rig, rows, options, written, owner, block, byte, int(stray.sum()))
        )
    for token, slot in enumerate(rig.slots(rows)):
        if slot < 0:
            continue
        block = slot // rig.size + rig.margin
        missing = alone[slot].touched[block] & ~written.touched[block]
        if bool(missing.any()) or not bool(alone[slot].touched[block].any()):
            raise ConformanceError(
                property,
                f"write_kv left a slot out: token {token} ({rig.place(rows, token)}): {int(missing.sum())} of its "
                f"{int(alone[slot].touched[block].sum())} bytes still are what they were ({FILLINGS[0]:#x})\n"
                f"  case: {rig.shape}",
            )


def _neighbours(rig: Rig, slots: Sequence[int]) -> set[int]:
    """Every slot of the blocks that these slots lie in, where a sequence has a position for it."""
    blocks = {slot // rig.size for slot in slots}
    return {
        rig.slot(sequence, position)
        for sequence, table in enumerate(rig.tables)
        for position in range(rig.lengths[sequence])
        if table[position // rig.size] in blocks
    }


def _position(rig: Rig, slot: int) -> tuple[int, int]:
    """The sequence that owns a slot, and the position it keeps there."""
    block = slot // rig.size
    return next(
        (sequence, table.index(block) * rig.size + slot % rig.size)
        for sequence, table in enumerate(rig.tables)
        if block in table
    )


def _write_alone(rig: Rig, slot: int) -> Written:
    """What a step does that writes this slot and no other."""
    sequence, position = _position(rig, slot)
    return written_by(rig, write_call(rig, [Row(sequence, position, position + 1)], Options()))


def _check_apart(property: str, rig: Rig, rows: Sequence[Row], alone: dict[int, Written]) -> None:
    """No byte belongs to two slots."""
    __tracebackhide__ = True
    for block in sorted({slot // rig.size for slot in alone}):
        known: list[int] = []
        for slot in sorted(slot for slot in alone if slot // rig.size == block):
            for other in known:
                both = alone[slot].touched[block + rig.margin] & alone[other].touched[block + rig.margin]
                if bool(both.any()):
                    byte = int(both.nonzero()[0])
                    raise ConformanceError(property, _collision(rig, rows, alone, other, slot, byte))
            known.append(slot)


def _collision(
    rig: Rig, rows: Sequence[Row], alone: dict[int, Written], first: int, second: int, byte: int
) -> str:
    sequence, position = _position(rig, second)
    block, row = second // rig.size, [row.sequence for row in rows].index(sequence)
    kept, now = (_value(rig, alone[slot].after, block + rig.margin, byte) for slot in (first, second))
    carried = _carrier(rig, [Row(sequence, position, position + 1)], Options(), float(now))
    got, expected = told_apart(now, kept)
    what = "" if carried is None else f" ({carried[0]}, head {carried[2]}, element {carried[3]})"
    return (
        f"write_kv wrote a slot that it was not given: the token at position {position} of row {row} (block "
        f"{position // rig.size}, pool block {block}, offset {second % rig.size}) goes over offset "
        f"{first % rig.size}, byte {byte} of the block: got {got}{what}, expected {expected}, which the token "
        f"at position {_position(rig, first)[1]} left there\n  case: {rig.shape}"
    )


def _value(rig: Rig, room: torch.Tensor, block: int, byte: int) -> torch.Tensor:
    """The element of the KV tensor that this byte belongs to."""
    kind = rig.rooms[0].dtype
    at = byte - byte % kind.itemsize
    return room[block, at : at + kind.itemsize].clone().view(kind)[0]


def _stray(
    rig: Rig,
    rows: Sequence[Row],
    options: Options,
    written: Written,
    owner: str,
    block: int,
    byte: int,
    count: int,
) -> str:
    before, after = (_value(rig, room, block, byte) for room in written.seen_at(block, byte))
    got, expected = told_apart(after, before)
    return (
        f"write_kv wrote a slot that it was not given: {_place(rig, block)}{owner}, byte {byte}: "
        f"got {got}, expected {expected} as before; {_source(rig, rows, options, float(after))}\n"
        f"  wrong: {count} bytes; case: {rig.shape}; slot_mapping holds "
        f"{rig.slots(rows).count(-1) + options.trailing} tokens of -1"
    )


def _place(rig: Rig, block: int) -> str:
    inside = block - rig.margin
    if not 0 <= inside < rig.num_blocks:
        return f"memory {'before' if inside < 0 else 'after'} the KV tensor ({inside - rig.num_blocks * (inside > 0)} blocks)"
    return f"pool block {inside}" + (" (the null block)" if inside == 0 else "")


def _owner(rig: Rig, alone: dict[int, Written], block: int, byte: int) -> str:
    """Row, logical block and offset that the byte belongs to."""
    inside = block - rig.margin
    for slot, written in alone.items():
        if slot // rig.size == inside and bool(written.touched[block, byte]):
            sequence, position = _position(rig, slot)
            return f", offset {slot % rig.size} (block {position // rig.size} of sequence {sequence})"
    # Every block is laid out alike: the byte's offset is that of the same byte in a block that was tried.
    tried = [
        s % rig.size for s, written in alone.items() if written.touched[s // rig.size + rig.margin, byte]
    ]
    offset = f", offset {tried[0]}" if tried else ""
    return offset + (" (nobody's)" if inside in rig.unowned else "")


def _carrier(
    rig: Rig, rows: Sequence[Row], options: Options, value: float
) -> tuple[str, int, int, int] | None:
    """Where a stored value came from: "K" or "V", token of the step, head, element."""
    _, k, v = rig.inputs(rows, 0, options.trailing, padding=PADDING)
    for name, tensor in (("K", k), ("V", v)):
        found = (tensor.double().cpu() == value).nonzero()
        if len(found):
            token, head, element = (int(i) for i in found[0])
            return name, token, head, element
    return None


def _source(rig: Rig, rows: Sequence[Row], options: Options, value: float) -> str:
    """The same in words."""
    carried = _carrier(rig, rows, options, value)
    if carried is None:
        return "which no token of the step carries"
    name, token, head, element = carried
    padding = (
        "; padding carries this value" if value == float(torch.tensor(PADDING).to(rig.k[0][0].dtype)) else ""
    )
    return (
        f"that is {name} of token {token} ({rig.place(rows, token)}), head {head}, element {element}{padding}"
    )
