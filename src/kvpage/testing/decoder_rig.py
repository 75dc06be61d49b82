"""Paged KV around one decoder: sequences of random tokens in scrambled blocks, steps over them, and the context.

The cache starts full of NaN (every byte 0xFF), the pool has blocks that nobody owns, and padding has slot -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvpage.api.attention import AttentionBackend, AttentionBatch, AttentionEnv, AttentionLayer, Rope
from kvpage.api.decoder import KVGroupStep
from kvpage.api.model import AttentionSpec, CausalLM, DecoderSpec
from kvpage.testing.decoder_models import CONTEXT, VOCAB
from kvpage.testing.decoder_oracle import rope_angles

MAX_ROWS, MAX_TOKENS = 16, 256
ROPE_ROWS_BEFORE = 5
"""Rows of the rotary tables before those of this step's positions, as of short sequences beside long ones (longrope)."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens first .. last-1 of a sequence in a step; ``sequence=None``: padding, of last - first tokens."""

    sequence: int | None
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


class Group:
    """One KV group: a backend object, a KV tensor, layer record and rope a layer, and each sequence's blocks."""

    def __init__(self, rig: DecoderRig, index: int) -> None:
        spec, group = rig.spec, rig.spec.kv_groups[index]
        mixers = sorted((m for m in spec.attention if m.kv_group == index), key=lambda m: m.kv_index)
        needed = [-(-length // rig.block_size) for length in rig.lengths]
        generator = torch.Generator(device="cpu").manual_seed(index)
        order = (torch.randperm(sum(needed) + 3, generator=generator, device="cpu") + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        self.num_blocks = sum(needed) + 5
        self.unowned = [0, *sorted(order), self.num_blocks - 1]
        self.backend = rig.attention(
            AttentionEnv(
                device=rig.device,
                dtype=rig.dtype,
                kv_dtype=rig.dtype,
                num_heads=mixers[0].num_heads,
                num_kv_heads=group.num_kv_heads,
                head_dim=group.head_dim,
                v_head_dim=group.v_head_dim,
                block_size=rig.block_size,
                num_blocks=self.num_blocks,
                max_num_seqs=MAX_ROWS,
                max_num_batched_tokens=MAX_TOKENS,
                max_model_len=CONTEXT,
            )
        )
        layout = self.backend.kv_layout()
        kind: torch.dtype = getattr(torch, layout.dtype)
        self.tensors = [torch.empty(layout.shape, dtype=kind, device=rig.device) for _ in mixers]
        for tensor in self.tensors:
            tensor.view(torch.uint8).fill_(0xFF)
        self.layers = [
            AttentionLayer(index=m.kv_index, scale=m.scale, window=m.window, softcap=m.softcap)
            for m in mixers
        ]
        self.ropes = [rig.rope(mixer) for mixer in mixers]


class DecoderRig:
    """KV of every group of ``spec`` over an attention backend, and sequences of the given lengths."""

    def __init__(
        self,
        spec: DecoderSpec,
        attention: type[AttentionBackend],
        *,
        device: str,
        dtype: str,
        block_size: int,
        lengths: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.spec, self.attention, self.device, self.dtype = spec, attention, device, dtype
        self.block_size, self.lengths = block_size, list(lengths)
        generator = torch.Generator(device="cpu").manual_seed(100 + seed)
        self.token_ids = [
            torch.randint(0, VOCAB, (n,), generator=generator, device="cpu").tolist() for n in lengths
        ]
        self._ropes: list[tuple[object, Rope]] = []
        self.groups = [Group(self, index) for index in range(len(spec.kv_groups))]

    def rope(self, mixer: AttentionSpec) -> Rope | None:
        """Tables for every position, one a RopeSpec; that of position p is row ``ROPE_ROWS_BEFORE`` + p."""
        if mixer.rope is None:
            return None
        for known, table in self._ropes:
            if known == mixer.rope:
                return table
        angles = rope_angles(mixer.rope, torch.arange(CONTEXT, device="cpu"))
        others = torch.full((ROPE_ROWS_BEFORE, angles.shape[1]), torch.nan, device="cpu")
        table = Rope(
            cos=torch.cat((others, angles.cos().float())).to(self.device),
            sin=torch.cat((others, angles.sin().float())).to(self.device),
            rotary_dim=mixer.rope.rotary_dim,
            interleaved=mixer.rope.interleaved,
        )
        self._ropes.append((mixer.rope, table))
        return table

    def share(self, owner: int, borrower: int, blocks: int) -> None:
        """The first ``blocks`` blocks of ``borrower`` are those of ``owner``, as are its tokens."""
        for group in self.groups:
            group.tables[borrower][:blocks] = group.tables[owner][:blocks]
        count = blocks * self.block_size
        self.token_ids[borrower][:count] = self.token_ids[owner][:count]

    def step(
        self, model: CausalLM, rows: Sequence[Row], trailing: int = 0, wanted: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Hidden states [tokens, H] of each row, one forward for all; ``trailing`` padding tokens come last.

        ``wanted``: rows whose last state will be read; ``None`` = all states.
        """
        everyone = [*rows, Row(None, 0, trailing)] if trailing else list(rows)
        tokens = [t for row in everyone for t in self._tokens(row)]
        positions = [p for row in everyone for p in self._positions(row)]
        where = torch.tensor(positions, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            batches = [self._batch(group, everyone) for group in self.groups]
            context = StepOfSuite(self, where, batches)
            if wanted is not None:
                ends = torch.tensor([row.count for row in everyone], device="cpu").cumsum(0) - 1
                context.wanted = ends[list(wanted)].int()
            ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
            hidden = model.forward(ids, where, context)
        return list(hidden.split([row.count for row in everyone]))[: len(rows)]

    def unowned_bytes(self) -> list[torch.Tensor]:
        """A copy of all blocks that no sequence owns, of every layer."""
        return [
            tensor[group.unowned].contiguous().view(torch.uint8).clone()
            for group in self.groups
            for tensor in group.tensors
        ]

    def _tokens(self, row: Row) -> list[int]:
        return [0] * row.count if row.sequence is None else self.token_ids[row.sequence][row.first : row.last]

    def _positions(self, row: Row) -> list[int]:
        return [0] * row.count if row.sequence is None else list(range(row.first, row.last))

    def _batch(self, group: Group, rows: Sequence[Row]) -> AttentionBatch:
        size = self.block_size
        counts = [row.count for row in rows]
        lengths = [0 if row.sequence is None else row.last for row in rows]
        tables = [
            [] if row.sequence is None else group.tables[row.sequence][: -(-row.last // size)] for row in rows
        ]
        table = torch.zeros(len(rows), max(1, *map(len, tables)), dtype=torch.int32, device="cpu")
        for index, blocks in enumerate(tables):
            table[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device="cpu")
        slots = [
            -1 if row.sequence is None else group.tables[row.sequence][p // size] * size + p % size
            for row in rows
            for p in range(row.first, row.last)
        ]
        ends = torch.tensor([0, *counts], dtype=torch.int64, device="cpu").cumsum(0)
        return AttentionBatch(
            num_tokens=len(slots),
            num_rows=len(rows),
            num_short=next((i for i, count in enumerate(counts) if count > 1), len(counts)),
            cu_seqlens_q=ends.to(device=self.device, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            block_tables=table.to(self.device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.device),
            q_lens_host=counts,
            seq_lens_host=lengths,
            max_query_len=max(counts),
            max_seq_len=max(lengths),
        )


class StepOfSuite:
    """``kvpage.api.model.StepContext`` of one step."""

    wanted: torch.Tensor | None = None

    def __init__(self, rig: DecoderRig, positions: torch.Tensor, batches: Sequence[AttentionBatch]) -> None:
        self._groups, self._batches = rig.groups, batches
        self._rope_positions = positions + ROPE_ROWS_BEFORE
        self._plans = [g.backend.plan(batch) for g, batch in zip(rig.groups, batches, strict=True)]

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the engine's own context does it."""
        group, batch = self._groups[spec.kv_group], self._batches[spec.kv_group]
        layer, kv = group.layers[spec.kv_index], group.tensors[spec.kv_index]
        if sinks is not None:
            layer = replace(layer, sinks=sinks)
        q, _ = group.backend.rope_write(q, k, v, self._rope_positions, group.ropes[spec.kv_index], kv, batch)
        out = torch.full(
            (q.shape[0], spec.num_heads, spec.v_head_dim), torch.nan, dtype=q.dtype, device=q.device
        )
        group.backend.attend(q, kv, layer, batch, self._plans[spec.kv_group], out)
        # What attend leaves as it is for padding must not look like a finding: such rows are nobody's.
        return torch.where((batch.slot_mapping < 0).view(-1, 1, 1), torch.zeros_like(out), out)

    def group(self, index: int) -> KVGroupStep:
        """For decoders that reach the cache themselves."""
        group = self._groups[index]
        return KVGroupStep(
            group.backend,
            self._batches[index],
            self._plans[index],
            group.tensors,
            group.ropes,
            self._rope_positions,
        )
