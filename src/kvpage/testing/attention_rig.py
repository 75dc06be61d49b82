"""A paged KV cache around one backend object: sequences of random tokens, steps over them, and the truth.

The cache starts full of NaN (every byte 0xFF), blocks are handed out in scrambled order, and the pool has blocks that
nobody owns: what a backend reads or writes beside its rows shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvpage.api.attention import AttentionBackend, AttentionBatch, AttentionLayer
from kvpage.testing.attention_layout import Shape, environment, require_layout
from kvpage.testing.attention_oracle import RowData
from kvpage.testing.attention_watch import WatchedBackend

Tensors = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens first .. last-1 of a sequence in a step; ``sequence=None``: padding, of last - first tokens."""

    sequence: int | None
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


@dataclass(kw_only=True, slots=True)
class Options:
    """How a step is described to the backend, where the contract leaves a choice.

    Attributes:
        num_short: ``None`` = the leading rows with one token.
        extra_columns: zeros at the end of each row of the block table. table_columns: its width before them, at least.
        strided_table: the table is a slice of a wider buffer.
        slack: how much larger than the truth the host's lengths are.
        trailing: padding tokens after the last row's.
        static: as in AttentionBatch.
        behind_window: the window of a group whose blocks behind it were given back; their entries are 0.
    """

    num_short: int | None = None
    extra_columns: int = 0
    table_columns: int = 1
    strided_table: bool = False
    slack: int = 0
    trailing: int = 0
    static: bool = False
    behind_window: int | None = None


@dataclass(slots=True)
class Step:
    """One step that ran: its rows, and each layer's record, output [T, Hq, Dv] and guard tokens around it."""

    rows: Sequence[Row]
    batch: AttentionBatch
    layers: Sequence[AttentionLayer]
    outputs: Tensors = field(default_factory=list)
    guards: Tensors = field(default_factory=list)


GUARD = 1234.5
"""Stands before the first and after the last token of every output; no attention result is as large."""


class Rig:
    """One backend object, its KV tensors, and sequences of the given lengths.

    Args:
        backend: the class under test. shape: of the case. device: torch device string.
        lengths: most tokens of each sequence. layers: how many KV tensors.
        spread: standard deviation of q; the scores' is about this where scale is 1/sqrt(head dim).
        manners: look after each call whether the process is as it was.

    Raises:
        ConformanceError: its KV layout cannot hold the blocks of the case.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        shape: Shape,
        device: str,
        lengths: Sequence[int],
        *,
        layers: int = 1,
        seed: int = 0,
        spread: float = 2.0,
        manners: bool = False,
    ) -> None:
        __tracebackhide__ = True
        self.shape, self.device, self.lengths = shape, device, list(lengths)
        self.size = shape.block_size
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        needed = [-(-length // self.size) for length in lengths]
        spare = 4
        order = (torch.randperm(sum(needed) + spare - 1, generator=self._generator) + 1).tolist()
        # The last block of the pool has no owner: a slot of -1, taken as an index, would be its last.
        self.num_blocks = sum(needed) + spare + 1
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        self.unowned = sorted([*order, self.num_blocks - 1])
        self.written = [0] * len(lengths)
        env = environment(
            shape,
            device,
            num_blocks=self.num_blocks,
            max_num_seqs=len(self.lengths) + 8,
            max_num_batched_tokens=sum(self.lengths) + 64,
            max_model_len=max(self.lengths) + 2 * self.size,
        )
        self.backend = WatchedBackend(backend, env, manners=manners)
        self.layout = require_layout(self.backend.kv_layout(), env, backend.caps)
        self.rooms = [self._allocate() for _ in range(layers)]
        self.kv = [room[self.margin : -self.margin] for room in self.rooms]
        draw = self._draw
        self.q = [[draw(n, shape.num_heads, shape.head_dim, spread) for n in lengths] for _ in range(layers)]
        self.k = [[draw(n, shape.num_kv_heads, shape.head_dim) for n in lengths] for _ in range(layers)]
        self.v = [[draw(n, shape.num_kv_heads, shape.value_dim) for n in lengths] for _ in range(layers)]
        nowhere = torch.full(
            (self.num_blocks * self.size, shape.num_kv_heads, 1), torch.nan, dtype=torch.float64
        )
        self._pool_k = [nowhere.repeat(1, 1, shape.head_dim) for _ in range(layers)]
        self._pool_v = [nowhere.repeat(1, 1, shape.value_dim) for _ in range(layers)]

    def share(self, owner: int, borrower: int, blocks: int) -> None:
        """The first ``blocks`` blocks of ``borrower`` are those of ``owner``, as are their K and V."""
        self.tables[borrower][:blocks] = self.tables[owner][:blocks]
        tokens = blocks * self.size
        for tensors in (*self.k, *self.v):
            tensors[borrower][:tokens] = tensors[owner][:tokens]

    def layer(self, **changes: object) -> AttentionLayer:
        """A layer record with scale 1/sqrt(head dim) unless told otherwise."""
        return replace(AttentionLayer(index=0, scale=self.shape.head_dim**-0.5), **changes)  # type: ignore[arg-type]

    def sinks(self) -> torch.Tensor:
        """float32 [Hq], of the size of the scores."""
        values = torch.randn(
            self.shape.num_heads, generator=self._generator, dtype=torch.float32, device="cpu"
        )
        return (values * 2.0).to(self.device)

    def slot(self, sequence: int, position: int) -> int:
        """Slot of the pool that holds a position of a sequence."""
        block: int = self.tables[sequence][position // self.size]
        return block * self.size + position % self.size

    def place(self, rows: Sequence[Row], token: int) -> str:
        """Where a token of a step is: row, position, block."""
        left = token
        for index, row in enumerate(rows):
            if left < row.count:
                if row.sequence is None:
                    return f"row {index}, padding"
                position = row.first + left
                slot = self.slot(row.sequence, position)
                return (
                    f"row {index}, position {position}, block {position // self.size}, pool block "
                    f"{slot // self.size}, offset {slot % self.size}"
                )
            left -= row.count
        return "padding after the last row"

    def slots(self, rows: Sequence[Row]) -> list[int]:
        """Of each token of the rows, -1 for padding."""
        return [
            -1 if row.sequence is None else self.slot(row.sequence, position)
            for row in rows
            for position in range(row.first, row.last)
        ]

    def batch(self, rows: Sequence[Row], options: Options | None = None) -> AttentionBatch:
        """What a backend learns of a step over ``rows``."""
        options = options or Options()
        counts = [row.count for row in rows]
        lengths = [0 if row.sequence is None else row.last for row in rows]
        tables = [self._table(row, options) for row in rows]
        width = max(options.table_columns, *map(len, tables)) + options.extra_columns
        table = torch.zeros(len(rows), width + 3 * options.strided_table, dtype=torch.int32, device="cpu")
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device="cpu")
        # What lies between the rows of a strided table is another table's, and names blocks that exist.
        table[:, width:] = 1
        slots = self.slots(rows) + [-1] * options.trailing
        leading = next((at for at, count in enumerate(counts) if count > 1), len(counts))
        ends = torch.tensor([0, *counts], dtype=torch.int64, device="cpu").cumsum(0)
        return AttentionBatch(
            num_tokens=len(slots),
            num_rows=len(rows),
            num_short=leading if options.num_short is None else options.num_short,
            cu_seqlens_q=ends.to(device=self.device, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            block_tables=table.to(self.device)[:, :width],
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.device),
            q_lens_host=[count + options.slack for count in counts],
            seq_lens_host=[length + options.slack for length in lengths],
            max_query_len=max(counts) + options.slack,
            max_seq_len=max(lengths) + options.slack,
            static=options.static,
        )

    def inputs(
        self, rows: Sequence[Row], layer: int = 0, trailing: int = 0, padding: float = math.nan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] of a step, on the device; padding tokens hold ``padding``."""

        def gather(tensors: Tensors) -> torch.Tensor:
            parts = [
                torch.full((row.count, *tensors[0].shape[1:]), padding, dtype=tensors[0].dtype, device="cpu")
                if row.sequence is None
                else tensors[row.sequence][row.first : row.last]
                for row in (*rows, Row(None, 0, trailing))
            ]
            return torch.cat(parts).to(self.device)

        return gather(self.q[layer]), gather(self.k[layer]), gather(self.v[layer])

    def fill(self, rows: Sequence[Row]) -> None:
        """Write the tokens before each row that are not in the cache yet, as a step of their own."""
        past = {
            r.sequence: Row(r.sequence, self.written[r.sequence], r.first)
            for r in rows
            if r.sequence is not None
        }
        missing = [row for row in past.values() if row.count > 0]
        if missing:
            batch = self.batch(missing)
            self.backend.plan(batch)
            self.write(missing, batch)

    def write(self, rows: Sequence[Row], batch: AttentionBatch) -> None:
        """``write_kv`` of every layer; call plan() first."""
        for index, kv in enumerate(self.kv):
            _, k, v = self.inputs(rows, index, batch.num_tokens - sum(row.count for row in rows))
            self.backend.write_kv(kv, k, v, batch)
        self.note_written(rows)

    def note_written(self, rows: Sequence[Row]) -> None:
        """Keep the mirror of the pool in step with what the backend was told to write."""
        for row in rows:
            if row.sequence is None or not row.count:
                continue
            slots = torch.tensor(self.slots([row]), dtype=torch.int64, device="cpu")
            for index in range(len(self.kv)):
                self._pool_k[index][slots] = self.k[index][row.sequence][row.first : row.last].double()
                self._pool_v[index][slots] = self.v[index][row.sequence][row.first : row.last].double()
            self.written[row.sequence] = max(self.written[row.sequence], row.last)

    def step(
        self,
        rows: Sequence[Row],
        layers: AttentionLayer | Sequence[AttentionLayer],
        options: Options | None = None,
    ) -> Step:
        """What came before, then plan once, and write and attend in every layer."""
        options = options or Options()
        self.fill(rows)
        if options.behind_window is not None:
            self._give_back(rows, options.behind_window)
        batch = self.batch(rows, options)
        plan = self.backend.plan(batch)
        step = Step(rows, batch, [layers] if isinstance(layers, AttentionLayer) else layers)
        for index, (kv, layer) in enumerate(zip(self.kv, step.layers, strict=True)):
            q, k, v = self.inputs(rows, index, options.trailing)
            self.backend.write_kv(kv, k, v, batch)
            self.attend(step, q, kv, layer, plan)
        self.note_written(rows)
        return step

    def attend(
        self, step: Step, q: torch.Tensor, kv: torch.Tensor, layer: AttentionLayer, plan: object
    ) -> None:
        """One layer's ``attend`` into a fresh output with a guard token before and after it."""
        room = torch.full(
            (q.shape[0] + 2, self.shape.num_heads, self.shape.value_dim),
            GUARD,
            dtype=q.dtype,
            device=self.device,
        )
        self.backend.attend(q, kv, layer, step.batch, plan, room[1:-1])
        step.outputs.append(room[1:-1])
        step.guards.append(room[[0, -1]])

    def row_data(self, row: Row, layer: int = 0) -> RowData:
        """One row for the oracle."""
        assert row.sequence is not None, "padding has no oracle"
        return RowData(
            q=self.q[layer][row.sequence][row.first : row.last].double(),
            k=self.k[layer][row.sequence][: row.last].double(),
            v=self.v[layer][row.sequence][: row.last].double(),
            blocks=self.tables[row.sequence][: -(-row.last // self.size)],
            block_size=self.size,
            pool_k=self._pool_k[layer],
            pool_v=self._pool_v[layer],
        )

    def bytes_of(self, block: int, layer: int = 0) -> torch.Tensor:
        """uint8, a copy of one block's bytes, on the CPU."""
        return self.kv[layer][block].contiguous().view(torch.uint8).flatten().cpu().clone()

    def _table(self, row: Row, options: Options) -> list[int]:
        if row.sequence is None:
            return []
        blocks = self.tables[row.sequence][: -(-row.last // self.size)]
        gone = self._behind(row, options.behind_window)
        return [0] * gone + blocks[gone:]

    def _behind(self, row: Row, window: int | None) -> int:
        """How many leading blocks no query of the row sees."""
        return 0 if window is None else max(0, row.first - window + 1) // self.size

    def _give_back(self, rows: Sequence[Row], window: int) -> None:
        """Blocks behind the window are somebody else's now, and hold whatever."""
        for row in rows:
            for block in (
                [] if row.sequence is None else self.tables[row.sequence][: self._behind(row, window)]
            ):
                for kv in self.kv:
                    kv[block].view(torch.uint8).fill_(0xFF)

    def _allocate(self) -> torch.Tensor:
        """One layer's KV tensor, full of NaN, between ``margin`` blocks that are not the backend's."""
        kind: torch.dtype = getattr(torch, self.layout.dtype)
        room = torch.empty(
            (self.layout.shape[0] + 2 * self.margin, *self.layout.shape[1:]), dtype=kind, device=self.device
        )
        room.view(torch.uint8).fill_(0xFF)
        return room

    @property
    def margin(self) -> int:
        """Blocks before and after the KV tensor in its room; keeps the tensor's start aligned to 256 bytes."""
        kind: torch.dtype = getattr(torch, self.layout.dtype)
        block_bytes = math.prod(self.layout.shape[1:]) * int(kind.itemsize)
        return 256 // math.gcd(256, block_bytes)

    def _draw(self, tokens: int, heads: int, width: int, spread: float = 1.0) -> torch.Tensor:
        values = torch.randn(
            tokens, heads, width, generator=self._generator, dtype=torch.float32, device="cpu"
        )
        return (values * spread).to(getattr(torch, self.shape.dtype))
