"""Conformance of attention backends, last of all: everything at once, in every shape that is claimed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage.api.attention import AttentionLayer
from kvpage.testing.attention_rig import Options, Rig, Row
from kvpage.testing.attention_subject import AttentionSubject
from kvpage.testing.comparing import told_apart
from kvpage.testing.suite import ConformanceError, not_claimed


class AttentionSweeps(AttentionSubject):
    """Steps of all kinds of rows; what fails here and nowhere before fails because of the shape."""

    def test_grouped_heads_in_a_mixed_step(self, heads: str) -> None:
        """Each ratio of query to KV heads, and a scale of its own, in decode, verify and chunk rows."""
        queries, keys = map(int, heads.split("x"))
        rig, rows = self.mixed(self.shape(num_heads=queries, num_kv_heads=keys), spread=1.0)
        self.check("grouped heads", rig, rig.step(rows, rig.layer(scale=0.4)))

    def test_output_equals_the_float64_oracle(self, dtype: str) -> None:
        """Decode, verify and chunk rows in one step, in each claimed dtype: the plain truth of the backend."""
        rig, rows = self.mixed(self.shape(dtype=dtype))
        self.check(f"dtype {dtype}", rig, rig.step(rows, rig.layer()))

    def test_kv_dtype(self, kv_dtype: str) -> None:
        """A cache narrower than the model, as claimed in ``caps.kv_dtypes``, costs no more than its tolerance."""
        rig, rows = self.mixed(self.shape(kv_dtype=kv_dtype))
        self.check(f"KV dtype {kv_dtype}", rig, rig.step(rows, rig.layer()))

    def test_head_dim(self, head_dim: int, dtype: str) -> None:
        """Each claimed head size in each dtype, powers of two or not: tails of vector loops and tile shapes."""
        rig, rows = self.mixed(self.shape(head_dim=head_dim, dtype=dtype))
        self.check(f"head dim {head_dim}", rig, rig.step(rows, rig.layer()))

    def test_block_size(self, block_size: int) -> None:
        """Each claimed block size, with rows that end before, on and after block edges."""
        rig, rows = self.mixed(self.shape(block_size=block_size))
        self.check(f"block size {block_size}", rig, rig.step(rows, rig.layer()))

    def test_all_features_together(self, dtype: str) -> None:
        """Every claimed feature of a layer at once: their order is scale, softcap, mask, sinks."""
        claimed = self.claims.features & {"window", "softcap", "sinks"}
        rig, rows = self.mixed(self.shape(dtype=dtype), features=claimed)
        width = rig.size + 3 if "window" in claimed else None
        layer = rig.layer(
            scale=0.31,
            window=width,
            softcap=3.0 if "softcap" in claimed else None,
            sinks=rig.sinks() if "sinks" in claimed else None,
        )
        self.check("all features together", rig, rig.step(rows, layer, Options(behind_window=width)))

    def test_long_row(self) -> None:
        """3001 tokens of context: split-KV and long accumulations, for a decode row and for a chunk."""
        rig = self.rig([3001, 3001, 5], self.shape(num_heads=2, num_kv_heads=1), spread=1.0)
        rows = [Row(2, 4, 5), Row(0, 3000, 3001), Row(1, 2960, 3001)]
        self.check("long row", rig, rig.step(rows, rig.layer()))

    def test_long_chunk(self) -> None:
        """Prompt chunks of several hundred tokens, from the start and from the middle: tiles of queries, seamless."""
        claimed = self.claims.features & {"window"}
        rig = self.rig([531, 401], self.shape(num_heads=2, num_kv_heads=1), features=claimed)
        rows = [Row(0, 0, 531), Row(1, 100, 401)]
        for window in (None, 150) if claimed else (None,):
            self.check("long chunk", rig, rig.step(rows, rig.layer(window=window)))

    def test_row_has_the_same_bits_in_any_batch(self, dtype: str) -> None:
        """Each row alone, and all of them in another order: bit for bit what the mixed step gave.

        Not asked where the subclass sets ``batch_invariant = False``.
        """
        if not self.batch_invariant:
            not_claimed("batch_invariant = False: outputs may depend on batch mates")
        rig, rows = self.mixed(self.shape(dtype=dtype))
        together = _by_row(rig, rows, rig.layer())
        turned = [*reversed(rows[:5]), *reversed(rows[5:8]), *reversed(rows[8:])]
        reordered = _by_row(rig, turned, rig.layer())
        for index, row in enumerate(rows):
            alone = _by_row(rig, [row], rig.layer())[row]
            for got, how in ((alone, "alone"), (reordered[row], "in another order")):
                _same_bits(together[row], got, index, row, f"the row {how} differs", rig)


def _by_row(rig: Rig, rows: Sequence[Row], layer: AttentionLayer) -> dict[Row, torch.Tensor]:
    output = rig.step(rows, layer).outputs[0]
    return dict(zip(rows, output.split([row.count for row in rows]), strict=True))


def _same_bits(wanted: torch.Tensor, got: torch.Tensor, index: int, row: Row, why: str, rig: Rig) -> None:
    __tracebackhide__ = True
    differs = (got != wanted).nonzero()
    if not len(differs):
        return
    token, head, element = (int(i) for i in differs[0])
    position = row.first + token
    is_, should = told_apart(got[token, head, element], wanted[token, head, element])
    slot = rig.slot(index, position)
    raise ConformanceError(
        "batch invariance",
        f"{why}: first at row {index}, head {head}, token {token} of the row (position {position}), block "
        f"{position // rig.size} (pool block {slot // rig.size}, offset {slot % rig.size}), element {element}: got "
        f"{is_}, expected {should} to the bit\n"
        f"  case: {rig.shape}; a backend that does not promise this sets batch_invariant = False",
    )
