"""Conformance of attention backends, numbers: scale, heads, block edges, masks and features, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpage.testing.attention_report import check_step
from kvpage.testing.attention_rig import Options, Rig, Row
from kvpage.testing.attention_subject import AttentionSubject

HEADS = ((4, 4), (2, 1), (4, 2), (8, 2), (14, 2), (16, 2), (32, 2), (8, 1))
"""(query heads, KV heads): ratios 1, 2, 2, 4, 7, 8, 16, and one KV head for all."""

WINDOWS = ("1", "2", "block-1", "block", "block+1", "several-blocks", "longer-than-all")
CHUNKS = ("1", "block-1", "block", "block+1", "2*block+3")


class AttentionValues(AttentionSubject):
    """Outputs against attention in float64. The cache is full of NaN where nobody wrote, in every test."""

    def axes(self) -> dict[str, Sequence[Any]]:
        return {
            **super().axes(),
            "heads": [f"{queries}x{keys}" for queries, keys in HEADS],
            "window": WINDOWS,
            "chunk": CHUNKS,
            "scale": (0.02, 0.4, 1.0),
        }

    def test_unwritten_slots_take_no_part(self) -> None:
        """The rest of a row's block holds NaN, as does the null block: no output is NaN. Only that is looked at here."""
        rig, rows = self._in_one_block()
        check_step("unused slots", rig, rig.step(rows, rig.layer()), (1e3, 0.0))

    def test_scale(self, scale: float) -> None:
        """The layer's scale is used as given; models set others than 1/sqrt(head dim). In rows of one block and with a
        KV head for each query head, so that nothing else is in question."""
        rig, rows = self._in_one_block(num_heads=4, num_kv_heads=4)
        self.check("scale", rig, rig.step(rows, rig.layer(scale=scale)))

    def test_grouped_heads(self, heads: str) -> None:
        """Query head h reads KV head h // (Hq / Hkv), at ratios 1 to 16, 7 among them, and with one KV head."""
        queries, keys = map(int, heads.split("x"))
        rig, rows = self._in_one_block(num_heads=queries, num_kv_heads=keys)
        self.check("grouped heads", rig, rig.step(rows, rig.layer()))

    def test_decode_rows_at_every_length(self) -> None:
        """One query a row, at every KV length from 1 to over three blocks: each block edge, from both sides."""
        size = self.shape().block_size
        lengths = (
            range(1, 3 * size + 3) if size <= 17 else [n * size + d for n in (0, 1, 2) for d in (1, 2, size)]
        )
        rig = self.rig(lengths)
        rows = [Row(row, length - 1, length) for row, length in enumerate(lengths)]
        self.check("block edge", rig, rig.step(rows, rig.layer()))

    def test_causal_mask(self) -> None:
        """Within one block, a prompt and the rest of a prompt: each query sees itself and what is before it."""
        size = max(3, self.shape().block_size)
        rig = self.rig([size, size])
        for rows in ([Row(0, 0, size)], [Row(1, 1, size)]):
            self.check("causal mask", rig, rig.step(rows, rig.layer()))

    def test_first_and_last_token_of_a_block(self) -> None:
        """Chunks that begin or end with exactly the first or the last token of a block, beside each other."""
        size = self.shape().block_size
        edges = [
            (size, size + 1),
            (size - 1, size),
            (size - 1, size + 1),
            (size, 2 * size),
            (0, size),
            (0, 1),
        ]
        edges += [(1, size), (size + 1, 2 * size + 1), (1, 2 * size - 1), (2 * size - 1, 2 * size + 1)]
        spans = [(first, last) for first, last in edges if last > first]
        rig = self.rig([last for _, last in spans])
        rows = [Row(row, first, last) for row, (first, last) in enumerate(spans)]
        self.check("block edge", rig, rig.step(rows, rig.layer(), Options(num_short=0)))

    def test_chunk_boundaries(self, chunk: str) -> None:
        """A prompt in chunks that end on and off block edges gives, token by token, what it gives whole."""
        size = self.shape().block_size
        count = {
            "1": 1, "block-1": max(1, size - 1), "block": size, "block+1": size + 1, "2*block+3": 2 * size + 3,
        }[chunk]  # fmt: skip
        length = min(4 * size + 3, 24 * count)
        rig = self.rig([length])
        for first in range(0, length, count):
            rows = [Row(0, first, min(first + count, length))]
            self.check(f"chunk boundary ({count} tokens a chunk)", rig, rig.step(rows, rig.layer()))

    def test_num_short_is_a_hint(self) -> None:
        """Calling decode rows chunks (num_short=0), or verify rows short, changes no number."""
        rig, rows = self.mixed()
        for hint in (0, 5, 8):
            self.check("num_short is a hint", rig, rig.step(rows, rig.layer(), Options(num_short=hint)))

    def test_large_scores(self, dtype: str) -> None:
        """Scores near +20000 and -20000, with ties: softmax subtracts the maximum, and masks with minus infinity."""
        shape = self.shape(dtype=dtype)
        size = shape.block_size
        rig = self.rig([2 * size + 3, 2 * size + 3, size + 2, size + 2], shape)
        for sequence, sign in enumerate((1.0, -1.0, 1.0, -1.0)):
            self._enlarge(rig, sequence, sign)
        length, short = 2 * size + 3, size + 2
        rows = [Row(0, length - 1, length), Row(1, length - 1, length), Row(2, 0, short), Row(3, 0, short)]
        layer = rig.layer(scale=2e4 / (shape.head_dim * 128.0))
        self.check("large scores", rig, rig.step(rows, layer))

    def test_window(self, window: str) -> None:
        """A query sees itself and window - 1 before it; blocks behind it were given back, refilled and read 0."""
        rig, rows = self.mixed(features={"window"})
        width = _window(window, rig)
        layer = rig.layer(window=width)
        self.check(f"window {width}", rig, rig.step(rows, layer, Options(behind_window=width)))

    def test_window_beside_full_history(self) -> None:
        """A window layer whose older blocks are still there (a full KV group) does not look at them either."""
        rig, rows = self.mixed(features={"window"})
        self.check("window", rig, rig.step(rows, rig.layer(window=rig.size + 2)))

    def test_softcap(self) -> None:
        """softcap * tanh(score / softcap), after scale and before the mask."""
        rig, rows = self.mixed(features={"softcap"})
        for softcap in (0.7, 5.0):
            self.check("softcap", rig, rig.step(rows, rig.layer(softcap=softcap)))

    def test_sinks(self) -> None:
        """A logit a head joins the softmax's sum and has no value: weights over keys sum to less than one."""
        rig, rows = self.mixed(features={"sinks"})
        self.check("sinks", rig, rig.step(rows, rig.layer(sinks=rig.sinks())))
        huge = torch.full((rig.shape.num_heads,), 300.0, device=rig.device)
        self.check("sinks", rig, rig.step(rows, rig.layer(sinks=huge)))

    def test_value_head_dim(self) -> None:
        """V narrower than K (feature ``v_head_dim``): strides and output size follow V."""
        claimed = self.claims.head_dims
        narrow, wide = sorted(claimed)[:2] if claimed is not None and len(claimed) > 1 else (16, 32)
        rig, rows = self.mixed(self.shape(head_dim=wide, v_head_dim=narrow), features={"v_head_dim"})
        self.check("V head dim", rig, rig.step(rows, rig.layer()))

    def _in_one_block(self, **heads: int) -> tuple[Rig, list[Row]]:
        """Decode rows of up to a block's length."""
        shape = self.shape(**heads)
        lengths = range(1, max(3, min(8, shape.block_size)) + 1)
        rig = self.rig(lengths, shape, spread=1.0)
        return rig, [Row(row, length - 1, length) for row, length in enumerate(lengths)]

    def _enlarge(self, rig: Rig, sequence: int, sign: float) -> None:
        """q . k / D becomes sign * 128, or sign * 127 for every other key: exact in every dtype."""
        length, width = rig.lengths[sequence], rig.shape.head_dim
        direction = torch.ones(width).where(torch.arange(width) % 3 > 0, -1.0)
        size = torch.full((length, 1, 1), 128.0)
        size[::2] = 127.0
        rig.q[0][sequence][:] = direction.to(rig.q[0][sequence].dtype)
        rig.k[0][sequence][:] = (sign * size * direction).to(rig.k[0][sequence].dtype)


def _window(name: str, rig: Rig) -> int:
    size = rig.size
    widths = {
        "1": 1, "2": 2, "block-1": size - 1, "block": size, "block+1": size + 1, "several-blocks": 2 * size + 3,
        "longer-than-all": 4 * size + 9,
    }  # fmt: skip
    return max(1, widths[name])
