"""Conformance of attention backends, first of all: the class can be made, claims what exists, and is a good guest."""

from __future__ import annotations

import torch

from kvpage.testing.attention_class import LAYOUT, MADE
from kvpage.testing.attention_report import check_tensor
from kvpage.testing.attention_rig import Options, Rig, Row, Step
from kvpage.testing.attention_rope import rope_tables
from kvpage.testing.attention_subject import FEATURES, AttentionSubject
from kvpage.testing.suite import ConformanceError


class AttentionMaking(AttentionSubject):
    """What must be so before any number is worth a look. Where it is not, the other tests are skipped."""

    def test_backend_can_be_made(self) -> None:
        """``backend`` is a concrete subclass of AttentionBackend with AttentionCaps, and takes an AttentionEnv."""
        mistake = self.mistake()
        if mistake is not None and mistake.test == MADE:
            raise ConformanceError("making", mistake.finding)

    def test_caps_are_known_terms(self) -> None:
        """Claims can be met: dtypes and devices exist, features are known, the preferred block size is claimed."""
        caps = self.claims
        unknown = [name for name in caps.dtypes if not isinstance(getattr(torch, name, None), torch.dtype)]
        if unknown or not caps.dtypes or not caps.devices:
            raise ConformanceError(
                "caps", f"dtypes {sorted(caps.dtypes)}, devices {sorted(caps.devices)}: {unknown} unknown"
            )
        if caps.features - FEATURES:
            raise ConformanceError(
                "caps", f"features {sorted(caps.features - FEATURES)}; known are {sorted(FEATURES)}"
            )
        if caps.block_sizes is not None and caps.preferred_block_size not in caps.block_sizes:
            raise ConformanceError(
                "caps",
                f"preferred_block_size {caps.preferred_block_size} is not in {sorted(caps.block_sizes)}",
            )

    def test_guest_manners(self) -> None:
        """No method changes what belongs to the process: default dtype and device, grad mode, threads, generators
        of random numbers, environment."""
        _every_method(*self._busy(manners=True))

    def test_layout_has_one_entry_a_block(self) -> None:
        """Dimension 0 is the block, so that copies, freeing and transfers can speak of blocks in any layout; there is
        room for K and V of every slot, in a dtype that is claimed."""
        mistake = self.mistake()
        if mistake is not None and mistake.test == LAYOUT:
            raise ConformanceError("layout", mistake.finding)
        rigs = [self.rig([length]) for length in (1, 20 * self.shape().block_size)]
        first, second = (rig.layout.shape[1:] for rig in rigs)
        if first != second:
            raise ConformanceError(
                "layout", f"one block is {first} or {second}, by how many blocks there are"
            )

    def test_inputs_are_only_read(self) -> None:
        """Every method leaves the tensors that it is given, the batch's too, as they were to the bit."""
        _every_method(*self._busy())

    def test_attend_only_reads(self) -> None:
        """attend leaves the cache, q and the batch's tensors as they were."""
        rig, rows = self._busy()
        rig.fill(rows)
        batch = rig.batch(rows)
        plan = rig.backend.plan(batch)
        rig.write(rows, batch)
        q, k, v = rig.inputs(rows)
        before = rig.kv[0].clone(), q.clone(), k.clone(), v.clone()
        rig.attend(Step(rows, batch, [rig.layer()]), q, rig.kv[0], rig.layer(), plan)
        for name, was, now in zip(("the cache", "q", "k", "v"), before, (rig.kv[0], q, k, v), strict=True):
            check_tensor("attend only reads", name, now, was)

    def _busy(self, *, manners: bool = False) -> tuple[Rig, list[Row]]:
        """Decode rows, a chunk, padding and a row that waits; every claimed feature of a layer may be asked for."""
        size = self.shape().block_size
        rig = self.rig([size + 1, 2 * size, size + 3, size + 2], manners=manners)
        rows = [Row(0, size, size + 1), Row(1, 2 * size - 1, 2 * size), Row(None, 0, 1), Row(2, 1, size + 3)]
        return rig, [*rows, Row(3, size + 1, size + 1)]


def _every_method(rig: Rig, rows: list[Row]) -> None:
    """Two steps, each method in the engine's order; WatchedBackend looks after each."""
    for trailing in (0, 2):
        rig.fill(rows)
        pair = [torch.tensor([block], device=rig.device) for block in (rig.tables[0][0], rig.unowned[-1])]
        rig.backend.copy_blocks(rig.kv[0], *pair)
        batch = rig.batch(rows, Options(extra_columns=2, trailing=trailing))
        plan = rig.backend.plan(batch)
        q, k, v = rig.inputs(rows, 0, trailing, padding=0.0)
        positions = torch.zeros(batch.num_tokens, dtype=torch.int64, device=rig.device)
        turned, _ = rig.backend.rope_write(
            q.clone(), k.clone(), v.clone(), positions, rope_tables("halves", rig), rig.kv[0], batch
        )
        rig.attend(Step(rows, batch, [rig.layer()]), turned, rig.kv[0], rig.layer(), plan)
        rig.backend.write_kv(rig.kv[0], k, v, batch)
        rig.attend(Step(rows, batch, [rig.layer()]), q, rig.kv[0], rig.layer(), plan)
        rig.note_written(rows)
