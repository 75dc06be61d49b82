"""Conformance of attention backends, steps: plans, several layers, buffers that are used again, other objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from kvpage.api.attention import AttentionBatch, AttentionLayer
from kvpage.testing.attention_rig import Options, Rig, Row, Step
from kvpage.testing.attention_rope import rope_step, rope_tables
from kvpage.testing.attention_subject import AttentionSubject
from kvpage.testing.suite import ConformanceError, not_claimed


class AttentionSteps(AttentionSubject):
    """What a backend keeps between calls must be the step's, the layer's and the object's own."""

    def test_steps_follow_one_another(self) -> None:
        """Rows grow token by token over block edges, in buffers that the next step overwrites, as an engine's are."""
        size = self.shape().block_size
        steps = min(2 * size + 2, 24)
        starts = (1, size, 2 * size - 2 if size > 1 else 2)
        rig = self.rig([start + steps for start in starts])
        kept: dict[str, torch.Tensor] = {}
        for step in range(steps):
            rows = [Row(index, start + step, start + step + 1) for index, start in enumerate(starts)]
            rig.fill(rows)
            batch = _in_buffers(rig.batch(rows, Options(extra_columns=4)), kept)
            self.check("steps follow one another", rig, _run(rig, rows, batch, rig.layer()))

    def test_batches_of_one_shape_differ(self) -> None:
        """Steps of equal T and B over other rows: a plan is made of the values, not of the shape."""
        size = self.shape().block_size
        rig = self.rig([size + 3, 3 * size + 1, 2 * size, 2 * size + 5, 7])
        spans = [
            (size + 2, size + 3),
            (3 * size, 3 * size + 1),
            (2 * size - 1, 2 * size),
            (2 * size, 2 * size + 5),
        ]
        rows = [*(Row(index, *span) for index, span in enumerate(spans)), Row(4, 2, 7)]
        kept: dict[str, torch.Tensor] = {}
        for first, second, chunk in ((0, 1, 3), (1, 2, 4), (2, 0, 3), (0, 1, 4)):
            chosen = [rows[first], rows[second], rows[chunk]]
            rig.fill(chosen)
            batch = _in_buffers(rig.batch(chosen, Options(extra_columns=4)), kept)
            self.check("a plan for each step", rig, _run(rig, chosen, batch, rig.layer()))

    def test_plan_follows_the_block_tables(self) -> None:
        """Steps of identical lengths over other blocks: in new tensors, in the same memory, in the very same tensors."""
        size = self.shape().block_size
        spans = [(size + 1, size + 2), (2 * size - 1, 2 * size), (1, size + 3)]
        for reuse in ("new tensors", "the same memory", "the same tensors"):
            rig = self.rig([last for _, last in spans for _ in range(2)])
            kept: dict[str, torch.Tensor] = {}
            first: AttentionBatch | None = None
            for turn in (0, 1, 0):
                rows = [Row(2 * index + turn, *span) for index, span in enumerate(spans)]
                rig.fill(rows)
                batch = rig.batch(rows)
                if reuse == "the same memory":
                    batch = _in_buffers(batch, kept)
                elif reuse == "the same tensors":
                    first = batch = _refilled(first, batch)
                self.check(f"a plan for each step ({reuse})", rig, _run(rig, rows, batch, rig.layer()))

    def test_plan_follows_the_slots(self) -> None:
        """Steps that are identical in everything but slot_mapping: what is written goes where this step says."""
        size = self.shape().block_size
        length = size + 2
        for reuse in ("new tensors", "the same tensors"):
            rig = self.rig([length, length, length])
            mine = Row(0, length - 1, length)
            rig.fill([mine, Row(1, length - 1, length), Row(2, length - 1, length)])
            batch: AttentionBatch | None = None
            for sequence in (0, 1, 2):
                # The step is one of sequence 0 whose token goes to the block of another, which then reads it.
                other = Row(sequence, length - 1, length)
                told = replace(rig.batch([mine]), slot_mapping=rig.batch([other]).slot_mapping)
                batch = told if reuse == "new tensors" else _refilled(batch, told)
                rig.backend.plan(batch)
                rig.write([other], batch)
            rows = [Row(sequence, length - 1, length) for sequence in (0, 1, 2)]
            step = rig.batch(rows)
            done = Step(rows, step, [rig.layer()])
            rig.attend(done, rig.inputs(rows)[0], rig.kv[0], rig.layer(), rig.backend.plan(step))
            self.check(f"a plan for each step ({reuse}, other slots)", rig, done)

    def test_objects_do_not_disturb_one_another(self) -> None:
        """Two backend objects, of one shape and of two, take turns call by call: one serves one KV group only."""
        twin, rows = self.mixed(seed=1)
        shapes = [self.shape(), self.shape(num_heads=6, num_kv_heads=3)]
        for shape in shapes:
            first = self.mixed(shape)[0]
            for rig in (first, twin):
                rig.fill(rows)
            pair = [(first, rows), (twin, rows[::-1])]
            batches = [rig.batch(chosen, Options(num_short=0)) for rig, chosen in pair]
            plans = [rig.backend.plan(batch) for (rig, _), batch in zip(pair, batches, strict=True)]
            for (rig, chosen), batch in zip(pair, batches, strict=True):
                rig.write(chosen, batch)
            for (rig, chosen), batch, plan in zip(pair, batches, plans, strict=True):
                step = Step(chosen, batch, [rig.layer()])
                rig.attend(step, rig.inputs(chosen)[0], rig.kv[0], rig.layer(), plan)
                self.check("two objects side by side", rig, step)

    def test_ropes_of_one_step_differ(self) -> None:
        """Layers of one step with two rotary tables and with none, as of local and global layers; then a next step."""
        for strides in ("contiguous", "fused-qkv"):
            rig, rows = self.mixed(layers=3)
            ropes = [rope_tables("halves", rig, seed=1), rope_tables("halves", rig, seed=2), None]
            step = rope_step(rig, rows, ropes, strides, "a rope a layer")
            self.check("rope_write (a rope a layer)", rig, step)

    def test_one_plan_serves_every_layer(self) -> None:
        """plan() once, then layers that differ in window, softcap, scale and sinks, each with a KV tensor of its own."""
        rig, rows = self.mixed(layers=4)
        claimed = self.claims.features
        window = rig.size + 1 if "window" in claimed else None
        layers = [
            rig.layer(index=0),
            rig.layer(index=1, window=window),
            rig.layer(index=2, scale=0.3, softcap=2.0 if "softcap" in claimed else None),
            rig.layer(
                index=3,
                window=None if window is None else 2,
                sinks=rig.sinks() if "sinks" in claimed else None,
            ),
        ]
        self.check("one plan for every layer", rig, rig.step(rows, layers))

    def test_static_batches(self) -> None:
        """Decode steps with static=True (``caps.graph == "decode"``): one plan object a bucket, refilled in place.

        Rows beyond the live ones are padding, lengths differ between steps, tensors keep their addresses.
        """
        self._need_graph()
        rig, plans = self._static_rig(), []
        kept: dict[str, torch.Tensor] = {}
        for rows in _static_rows(rig):
            rig.fill(rows)
            batch = _in_buffers(rig.batch(rows, _static_options(rig)), kept)
            step = Step(rows, batch, [rig.layer()])
            plan = rig.backend.plan(batch)
            rig.write(rows, batch)
            rig.attend(step, rig.inputs(rows)[0], rig.kv[0], rig.layer(), plan)
            self.check("static batches", rig, step)
            plans.append(plan)
        if any(plan is not plans[0] for plan in plans):
            raise ConformanceError(
                "static batches",
                f"plan() returned {len({*map(id, plans)})} objects for one bucket of {len(rows)} rows",
            )

    def test_captured_decode_step(self) -> None:
        """A graph of write_kv and attend, captured in one step, computes later steps after plan() alone (CUDA, HIP)."""
        self._need_graph()
        rig = self._static_rig()
        kept: dict[str, torch.Tensor] = {}
        if not rig.device.startswith("cuda"):
            not_claimed(f"device {rig.device} has no graphs")
        # The history of every step first: a graph replays what it captured, and nothing else.
        every = _static_rows(rig)
        for rows in every:
            rig.fill(rows)
        graph: torch.cuda.CUDAGraph | None = None
        for rows in every:
            batch = _in_buffers(rig.batch(rows, _static_options(rig)), kept)
            q, k, v = (
                _kept(kept, name, x) for name, x in zip("qkv", rig.inputs(rows, 0, 0, 0.0), strict=True)
            )
            plan = rig.backend.plan(batch)
            out = _kept(kept, "out", q.new_zeros(*q.shape[:2], rig.shape.value_dim))
            if graph is None:
                graph = self._capture(rig, batch, plan, (q, k, v, out))
            graph.replay()
            torch.cuda.synchronize()
            rig.note_written(rows)
            guard = q.new_full((2, *out.shape[1:]), 1234.5)
            self.check("captured decode step", rig, Step(rows, batch, [rig.layer()], [out], [guard]))

    def _capture(
        self, rig: Rig, batch: AttentionBatch, plan: object, tensors: Sequence[torch.Tensor]
    ) -> torch.cuda.CUDAGraph:
        q, k, v, out = tensors

        def compute() -> None:
            # Not watched: a look at the inputs would be captured too.
            rig.backend.subject.write_kv(rig.kv[0], k, v, batch)
            rig.backend.subject.attend(q, rig.kv[0], rig.layer(), batch, plan, out)

        with _side_stream():
            compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compute()
        return graph

    def _need_graph(self) -> None:
        if self.claims.graph != "decode":
            not_claimed(f"{self.backend.__name__} does not claim graph 'decode' (has {self.claims.graph!r})")

    def _static_rig(self) -> Rig:
        size = self.shape().block_size
        return self.rig([size + 4, 3 * size + 4, 2 * size + 4])


def _static_rows(rig: Rig) -> list[list[Row]]:
    """Buckets of four rows: three live, then two, then three again, longer each time; the rest is padding."""
    steps = []
    for step, live in enumerate((3, 2, 3)):
        ends = [length - 3 + step for length in rig.lengths[:live]]
        rows = [Row(index, end - 1, end) for index, end in enumerate(ends)]
        steps.append([*rows, *[Row(None, 0, 1)] * (4 - live)])
    return steps


def _static_options(rig: Rig) -> Options:
    """The table as wide as the engine's limit allows, whatever the rows need."""
    needed = -(-max(rig.lengths) // rig.size)
    return Options(static=True, num_short=4, table_columns=needed)


def _run(rig: Rig, rows: Sequence[Row], batch: AttentionBatch, layer: AttentionLayer) -> Step:
    """plan, write and attend of one layer, with a batch that is already made."""
    step = Step(rows, batch, [layer])
    plan = rig.backend.plan(batch)
    rig.write(rows, batch)
    rig.attend(step, rig.inputs(rows)[0], rig.kv[0], layer, plan)
    return step


def _in_buffers(batch: AttentionBatch, kept: dict[str, torch.Tensor]) -> AttentionBatch:
    """The same batch in the memory of the last one."""
    return replace(
        batch,
        cu_seqlens_q=_kept(kept, "cu_seqlens_q", batch.cu_seqlens_q),
        seq_lens=_kept(kept, "seq_lens", batch.seq_lens),
        block_tables=_kept(kept, "block_tables", batch.block_tables),
        slot_mapping=_kept(kept, "slot_mapping", batch.slot_mapping),
    )


def _refilled(first: AttentionBatch | None, batch: AttentionBatch) -> AttentionBatch:
    """``batch`` in the tensors of the first one, and in that very object, as an engine may keep one."""
    if first is None:
        return batch
    for name in ("cu_seqlens_q", "seq_lens", "block_tables", "slot_mapping"):
        getattr(first, name).copy_(getattr(batch, name))
    return first


def _kept(kept: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> torch.Tensor:
    """``value`` in a buffer that keeps its address while steps come and go; a table's has room to widen."""
    if name not in kept:
        room = 8 if name == "block_tables" else 0
        kept[name] = value.new_zeros((*value.shape[:-1], value.shape[-1] + room))
    view = kept[name][..., : value.shape[-1]]
    view.copy_(value)
    return view


@contextmanager
def _side_stream() -> Iterator[None]:
    """Warm-up before a capture runs on a stream of its own, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
