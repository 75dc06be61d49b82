"""Conformance of attention backends, what is written: bytes of the slots that were given, and not one besides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage.testing.attention_canary import PADDING, check_writes, written_by
from kvpage.testing.attention_rig import Options, Rig, Row
from kvpage.testing.attention_subject import AttentionSubject
from kvpage.testing.suite import ConformanceError


class AttentionWrites(AttentionSubject):
    """write_kv, rope_write and copy_blocks over a cache whose every byte is known."""

    def test_write_touches_only_its_slots(self, dtype: str) -> None:
        """Over a canary-filled cache, write_kv changes the bytes of the slots it was given: all, and no other."""
        size = self.shape(dtype=dtype).block_size
        rig = self.rig([3 * size, 2 * size, 2 * size, size], self.shape(dtype=dtype))
        rows = [
            Row(0, size, size + 1),
            Row(1, 2 * size - 1, 2 * size),
            Row(2, size - 1, size + 1),
            Row(3, 0, size),
        ]
        check_writes("write (slots)", rig, rows)

    def test_padding_tokens_write_nothing(self) -> None:
        """Slot -1 is no slot: not the last of the pool, not the null block's, not memory before the cache."""
        size = self.shape().block_size
        rig = self.rig([3 * size, 2 * size])
        rows = [
            Row(0, size, size + 1),
            Row(None, 0, 1),
            Row(1, 0, size + 1),
            Row(None, 0, 0),
            Row(None, 0, 3),
        ]
        check_writes("padding", rig, rows, Options(trailing=2))
        check_writes("padding", rig, [Row(None, 0, 2)], Options(trailing=1))

    def test_rope_write_touches_only_its_slots(self) -> None:
        """A fused rope_write writes what write_kv writes, byte for byte, and nothing for padding tokens."""
        size = self.shape().block_size
        rig = self.rig([2 * size, size])
        rows = [Row(0, size, size + 1), Row(None, 0, 2), Row(1, 0, size)]
        batch = rig.batch(rows, Options(trailing=1))
        q, k, v = rig.inputs(rows, 0, 1, padding=PADDING)
        positions = torch.arange(batch.num_tokens, device=rig.device)

        def fused() -> None:
            rig.backend.plan(batch)
            rig.backend.rope_write(q.clone(), k.clone(), v.clone(), positions, None, rig.kv[0], batch)

        def plain() -> None:
            rig.backend.plan(batch)
            rig.backend.write_kv(rig.kv[0], k, v, batch)

        wanted, got = written_by(rig, plain), written_by(rig, fused)
        rig.rooms[0].view(torch.uint8).flatten(1).copy_(got.after)
        _check_blocks(rig, wanted.after, [], property="rope_write (slots)")

    def test_copy_blocks(self, dtype: str) -> None:
        """Copied blocks are the source's bytes, K and V; one source may have several targets; no other block changes."""
        rig = self.rig([6 * self.shape().block_size], self.shape(dtype=dtype))
        generator = torch.Generator(device="cpu").manual_seed(5)
        shape = rig.rooms[0].view(torch.uint8).shape
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cpu")
        rig.rooms[0].view(torch.uint8).copy_(noise)
        wanted = noise.flatten(1).clone()
        a, b, c, d, e, f = rig.tables[0]
        # The third call copies what the first one brought: copies are done in the order of the calls.
        for pairs in ([(a, b), (c, d), (a, e)], [(f, rig.unowned[-1])], [(b, c)], []):
            source, target = ([pair[side] for pair in pairs] for side in (0, 1))
            rig.backend.copy_blocks(
                rig.kv[0],
                torch.tensor(source, dtype=torch.int64, device=rig.device),
                torch.tensor(target, dtype=torch.int64, device=rig.device),
            )
            for start, stop in pairs:
                wanted[stop + rig.margin] = wanted[start + rig.margin]
            _check_blocks(rig, wanted, pairs)


def _check_blocks(
    rig: Rig, wanted: torch.Tensor, pairs: Sequence[tuple[int, int]], property: str = "copy_blocks"
) -> None:
    """Every byte of the room is as wanted [blocks, bytes]."""
    __tracebackhide__ = True
    got = rig.rooms[0].view(torch.uint8).flatten(1).cpu()
    wrong = (got != wanted).nonzero()
    if not len(wrong):
        return
    block, byte = (int(i) for i in wrong[0])
    inside = block - rig.margin
    sources = {target: source for source, target in pairs}
    told = f"a copy of block {sources[inside]}" if inside in sources else "not to change"
    raise ConformanceError(
        property,
        f"first wrong byte in pool block {inside}, which was {told}: byte {byte} of {got.shape[1]}: got "
        f"{int(got[block, byte]):#04x}, expected {int(wanted[block, byte]):#04x}; {len(wrong)} bytes are wrong\n"
        f"  case: {rig.shape}; source -> target {[*pairs]}",
    )
