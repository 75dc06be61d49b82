"""The reference backend with one mistake planted in each copy, and the case of the suite that has to find it."""

from __future__ import annotations

import inspect
import os
import random
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvpage.api.attention import AttentionBackend, AttentionBatch
from kvpage.builtin import reference_attention
from kvpage.builtin.reference_attention import ReferenceAttention

Backend = type[AttentionBackend]


@dataclass(frozen=True)
class Mutant:
    """``make`` builds the wrong backend; ``case`` finds it; the finding says all of ``says``."""

    name: str
    make: Callable[[], Backend]
    case: str
    says: tuple[str, ...] = ()


def edited(*edits: tuple[str, str]) -> Callable[[], Backend]:
    """The reference's source with each old text replaced by the new one, wherever it stands."""

    def make() -> Backend:
        source = inspect.getsource(reference_attention)
        for old, new in edits:
            assert old in source, f"the reference does not say {old!r} any more"
            source = source.replace(old, new)
        module = types.ModuleType(reference_attention.__name__)
        exec(compile(source, "a mutant of reference_attention.py", "exec"), vars(module))
        backend: Backend = module.ReferenceAttention
        return backend

    return make


def overriding(**methods: Callable[..., Any]) -> Callable[[], Backend]:
    """A subclass of the reference; each method gets the original as its first argument."""

    def make() -> Backend:
        def bind(name: str, wrong: Callable[..., Any]) -> Callable[..., Any]:
            original = getattr(ReferenceAttention, name)
            return lambda self, *args: wrong(lambda *given: original(self, *given), self, *args)

        return type(
            "Mutant", (ReferenceAttention,), {name: bind(name, wrong) for name, wrong in methods.items()}
        )

    return make


def as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    """What a kernel reads that takes x's first address and trusts its shape."""
    strides = torch.empty(x.shape, device="meta").stride()
    needed = x.storage_offset() + x.numel()
    room = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided(x.shape, strides, min(x.storage_offset(), x.storage_offset() - max(0, needed - room)))


def interleaved_heads(
    attend: Any, self: Any, q: Any, kv: Any, layer: Any, batch: Any, plan: Any, out: Any
) -> None:
    order = torch.arange(q.shape[1]).view(-1, self.env.num_kv_heads).T.flatten()
    turned = torch.empty_like(out)
    attend(q[:, order], kv, layer, batch, plan, turned)
    out[:, order] = turned


def contiguous_q(attend: Any, self: Any, q: Any, *rest: Any) -> None:
    attend(as_if_contiguous(q), *rest)


def contiguous_kv(write: Any, self: Any, kv: Any, k: Any, v: Any, batch: Any) -> None:
    write(kv, as_if_contiguous(k), as_if_contiguous(v), batch)


def contiguous_table(plan: Any, self: Any, batch: Any) -> Any:
    return plan(replace(batch, block_tables=as_if_contiguous(batch.block_tables)))


def plan_by_shape(plan: Any, self: Any, batch: Any) -> Any:
    """Decode rows are grouped once a (T, B); the write addresses are made anew."""
    fresh = plan(batch)
    kept = self.__dict__.setdefault("kept", {})
    return kept.setdefault((batch.num_tokens, batch.num_rows), fresh)


def plan_by_lengths(plan: Any, self: Any, batch: Any) -> Any:
    """A plan has the blocks of its rows in it; the write addresses are made anew."""
    key = (*batch.seq_lens.tolist(), -1, *batch.cu_seqlens_q.tolist())
    return _kept_plan(plan, self, batch, key)


def plan_by_lengths_and_addresses(plan: Any, self: Any, batch: Any) -> Any:
    key = (batch.block_tables.data_ptr(), *batch.seq_lens.tolist(), -1, *batch.cu_seqlens_q.tolist())
    # While a tensor lives, no other has its address.
    self.__dict__.setdefault("alive", []).append(batch.block_tables)
    return _kept_plan(plan, self, batch, key)


def _kept_plan(plan: Any, self: Any, batch: Any, key: Any) -> Any:
    fresh = plan(batch)
    kept = self.__dict__.setdefault("kept", {}).setdefault(key, fresh)
    if kept is fresh:
        kept.short[None] = self._group_short_rows(batch, None)
    return kept


def slots_by_tables(plan: Any, self: Any, batch: Any) -> Any:
    return _kept_slots(
        plan, self, batch, (*batch.seq_lens.tolist(), -1, *batch.block_tables.flatten().tolist())
    )


def slots_by_address(plan: Any, self: Any, batch: Any) -> Any:
    self.__dict__.setdefault("alive", []).append(batch.slot_mapping)
    return _kept_slots(plan, self, batch, (batch.slot_mapping.data_ptr(), batch.num_tokens))


def _kept_slots(plan: Any, self: Any, batch: Any, key: Any) -> Any:
    fresh = plan(batch)
    self._writes = self.__dict__.setdefault("kept", {}).setdefault(key, self._writes)
    return fresh


def spoils(name: str, method: str) -> Callable[..., Any]:
    """Changes a tensor of the batch after the call."""

    def wrong(original: Any, self: Any, *args: Any) -> Any:
        result = original(*args)
        getattr(getattr(next(x for x in args if isinstance(x, AttentionBatch)), name), method)()
        return result

    return wrong


def clears_kv(write: Any, self: Any, kv: Any, k: Any, v: Any, batch: Any) -> None:
    write(kv, k, v, batch)
    k.zero_()
    v.zero_()


def moves_positions(rope_write: Any, self: Any, q: Any, k: Any, v: Any, positions: Any, *rest: Any) -> Any:
    turned = rope_write(q, k, v, positions, *rest)
    positions.add_(1)
    return turned


def sorts_sources(copy: Any, self: Any, kv: Any, source: Any, target: Any) -> None:
    copy(kv, source, target)
    source.copy_(source.sort(descending=True).values)


def replaces_tables(plan: Any, self: Any, batch: Any) -> Any:
    batch.block_tables = batch.block_tables.long()
    return plan(batch)


def sets_default_dtype(plan: Any, self: Any, batch: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    return plan(batch)


def sets_threads(attend: Any, self: Any, *args: Any) -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)
    attend(*args)


def seeds(write: Any, self: Any, *args: Any) -> None:
    torch.manual_seed(torch.initial_seed() + 1)
    write(*args)


def draws(plan: Any, self: Any, batch: Any) -> Any:
    random.random()
    return plan(batch)


def turns_gradients_off(copy: Any, self: Any, *args: Any) -> None:
    torch.set_grad_enabled(False)
    copy(*args)


def edits_environment(init: Any, self: Any, env: Any) -> None:
    os.environ["MYCHIP_THREADS"] = "1"
    init(env)


def changed_layout(dimension: int, by: int) -> Callable[..., Any]:
    def wrong(kv_layout: Any, self: Any) -> Any:
        layout = kv_layout()
        shape = list(layout.shape)
        shape[dimension] += by
        return replace(layout, shape=tuple(shape))

    return wrong


def layout_in(dtype: str) -> Callable[..., Any]:
    return lambda kv_layout, self: replace(kv_layout(), dtype=dtype)


def one_head_off(
    attend: Any, self: Any, q: Any, kv: Any, layer: Any, batch: Any, plan: Any, out: Any
) -> None:
    attend(q, kv, layer, batch, plan, out)
    out[:, -1] *= 1.01


def whole_tiles(attend: Any, self: Any, q: Any, kv: Any, layer: Any, batch: Any, plan: Any, out: Any) -> None:
    """Stores tiles of 8 tokens, one of them past the end."""
    attend(q, kv, layer, batch, plan, out)
    out.as_strided((1, *out.shape[1:]), out.stride(), out.storage_offset() + out.numel()).zero_()


def dropped_tail(attend: Any, self: Any, q: Any, *rest: Any) -> None:
    """A vector loop over the head dim in steps of 32, without the rest."""
    q = q.clone()
    q[..., q.shape[-1] // 32 * 32 :] = 0
    attend(q, *rest)


def half_scores(attend: Any, self: Any, q: Any, *rest: Any) -> None:
    attend((q.float() * 0.7).to(q.dtype), *rest)


def spoils_q(attend: Any, self: Any, q: Any, kv: Any, layer: Any, *rest: Any) -> None:
    attend(q, kv, layer, *rest)
    q.mul_(layer.scale)


def by_batch_size(
    attend: Any, self: Any, q: Any, kv: Any, layer: Any, batch: Any, plan: Any, out: Any
) -> None:
    """Rounding as of a reduction whose split depends on the number of rows."""
    attend(q, kv, layer, batch, plan, out)
    out.mul_(
        1.0 + 2.0**-7 * (batch.num_rows > 1) * (out.dtype == torch.bfloat16) + 2.0**-22 * (batch.num_rows > 1)
    )


def writes_late(
    rope_write: Any, self: Any, q: Any, k: Any, v: Any, positions: Any, rope: Any, kv: Any, batch: Any
) -> Any:
    """Stores K as it was before the rotation."""
    turned = rope_write(q, k, v, positions, rope, kv, batch)
    self.write_kv(kv, k, v, batch)
    return turned


PLACE = (
    "first wrong value at row",
    "head ",
    "token ",
    "block ",
    "pool block ",
    "offset ",
    "got ",
    "expected ",
)

MUTANTS = [
    Mutant("layer's scale ignored", edited((".mul_(layer.scale)", ".mul_(e.head_dim**-0.5)")), "test_scale[0.4]",
           (*PLACE, "scale: first wrong", "looks like: scale: scale 1/sqrt(head dim) was used")),
    Mutant("scale too small by 0.7", overriding(attend=half_scores), "test_output_equals_the_float64_oracle[float32]",
           (*PLACE, "looks like: scale: 0.12374", "asked for 0.176777")),
    Mutant("last slot of a block written one too low",
           edited(("slots % self.env.block_size)", "(slots % self.env.block_size).clamp(max=self.env.block_size - 2))")),
           "test_write_touches_only_its_slots[float32]",
           ("write (slots)", "slot that it was not given", "pool block", "offset 6", "got ", "expected ", "(K, head 0",
            "of row 1 (block 1")),
    Mutant("first slot of a block written to the block before",
           edited(("slots // self.env.block_size,", "(slots - 1) // self.env.block_size,")),
           "test_decode_rows_at_every_length", (*PLACE, "block edge: first wrong")),
    Mutant("last block gathered from the first",
           edited(("index.where(index <= last, 0)", "index.where(index < last, 0)")),
           "test_decode_rows_at_every_length", (*PLACE, "block edge: first wrong", "row 8,")),
    Mutant("chunk reads one key too few at a block edge",
           edited(("keys = gathered[..., : end - begin * bs, :].float()",
                   "keys = gathered[..., : end - begin * bs, :].float()\n        keys[:, :, bs - 1 :: bs] = keys[:, :, bs - 2 : -1 : bs][:, :, : keys[:, :, bs - 1 :: bs].shape[2]]")),
           "test_chunk_boundaries[block+1]",
           (*PLACE, "chunk boundary", "looks like: block edge: the last slot of each block holds the position before it")),
    Mutant("window one too wide in chunks and rows",
           edited(("key <= at - layer.window", "key < at - layer.window"), ("layer.window + 1", "layer.window"),
                  ("(lengths - window)", "(lengths - window - 1)")),
           "test_window_beside_full_history", (*PLACE, "looks like: window: one key too wide")),
    Mutant("window ignored by decode rows", edited(("if window is None else (lengths - window)", "if True else (lengths - 1)")),
           "test_window[block+1]", (*PLACE, "window 9: first wrong", "row 4,", "got nan")),
    Mutant("null block read behind the window",
           edited(("first = oldest // bs", "first = torch.zeros_like(oldest)")), "test_window[block]",
           (*PLACE, "looks like: unused slots")),
    Mutant("softcap ignored", edited(("if layer.softcap is not None:", "if False:")), "test_softcap",
           (*PLACE, "looks like: softcap: ignored")),
    Mutant("sinks ignored", edited(("if layer.sinks is None:", "if True:")), "test_sinks",
           (*PLACE, "looks like: sinks: ignored")),
    Mutant("sink with the oldest key's value",
           edited(("    return weights.div_(weights.sum(-1, keepdim=True) + (sinks - top).exp())",
                   "    total = weights.sum(-1, keepdim=True) + (sinks - top).exp()\n"
                   "    oldest = (~dead).float().argmax(-1, keepdim=True).expand(*weights.shape[:-1], 1)\n"
                   "    return weights.scatter_add_(-1, oldest, (sinks - top).exp().expand(*weights.shape[:-1], 1)).div_(total)")),
           "test_sinks", (*PLACE, "looks like: sinks: the sink was given a value")),
    Mutant("padding written to the last slot of the pool", edited(("if bool((slots < 0).any()):", "if False:")),
           "test_padding_tokens_write_nothing",
           ("padding: write_kv wrote a slot that it was not given", "pool block 9, offset 7 (nobody's)", "got 768, expected -2.87", "expected ",
            "row 1, padding", "token 1 ", "head 0")),
    Mutant("padding written to the null block",
           edited(("if bool((slots < 0).any()):", "slots = slots.clamp(min=0)\n        if False:")),
           "test_padding_tokens_write_nothing", ("padding", "pool block 0 (the null block), offset 0", "row 1, padding")),
    Mutant("reads one slot beyond the row", edited(("(keys >= length)", "(keys > length)")),
           "test_unused_slots_may_hold_anything", (*PLACE, "got nan", "looks like: unused slots")),
    Mutant("0 * NaN of unused slots", edited((".masked_fill(group.tail, 0.0)", "")),
           "test_unused_slots_may_hold_anything", (*PLACE, "got nan", "looks like: unused slots")),
    Mutant("chunk queries see one key ahead", edited(("dead = key > at", "dead = key > at + 1")),
           "test_chunk_boundaries[block]", (*PLACE, "looks like: causal mask: each query sees one key too many")),
    Mutant("chunk queries count from the chunk", edited(("dead = key > at", "dead = key > at - chunk.start")),
           "test_first_and_last_token_of_a_block", (*PLACE, "block edge")),
    Mutant("query heads interleaved over KV heads", overriding(attend=interleaved_heads), "test_grouped_heads[8x2]",
           (*PLACE, "looks like: grouped heads: query head h reads KV head h % Hkv")),
    Mutant("copy_blocks copies K only", edited(("kv[target] = kv[source]", "kv[target, 0] = kv[source, 0]")),
           "test_copy_blocks[float32]", ("first wrong byte in pool block", "a copy of block", "got 0x", "expected 0x")),
    Mutant("copy_blocks the wrong way", edited(("kv[target] = kv[source]", "kv[source] = kv[target]")),
           "test_copy_blocks[bfloat16]", ("first wrong byte in pool block", "got 0x", "expected 0x")),
    Mutant("host lengths taken for exact",
           edited(("lengths = batch.seq_lens.tolist()", "lengths = list(batch.seq_lens_host)")),
           "test_host_lengths_are_upper_bounds", (*PLACE, "host lengths are upper bounds: first wrong")),
    Mutant("blocks taken to lie one after another",
           edited(("batch.block_tables[row, :used].to(torch.int64)",
                   "(batch.block_tables[row, 0] + torch.arange(used)).clamp(max=self.env.num_blocks - 1)")),
           "test_block_tables_in_any_order", (*PLACE, "block tables (scrambled): first wrong")),
    Mutant("K and V taken to be contiguous", overriding(write_kv=contiguous_kv), "test_strided_inputs[fused-qkv]",
           (*PLACE, "strided inputs (fused-qkv): first wrong")),
    Mutant("q taken to be contiguous", overriding(attend=contiguous_q), "test_strided_inputs[padded-heads]",
           (*PLACE, "strided inputs (padded-heads): first wrong")),
    Mutant("block table taken to be contiguous", overriding(plan=contiguous_table), "test_wide_block_tables",
           (*PLACE, "block tables (wide): first wrong")),
    Mutant("write addresses shared by all objects",
           edited(("self._writes: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None", "pass"),
                  ("self._writes", "ReferenceAttention.writes")),
           "test_objects_do_not_disturb_one_another", (*PLACE, "two objects side by side: first wrong")),
    Mutant("plan kept by the shape of the batch", overriding(plan=plan_by_shape), "test_batches_of_one_shape_differ",
           (*PLACE, "a plan for each step: first wrong")),
    Mutant("first layer's window kept for the step",
           edited(("steps.short.get(layer.window)", "steps.short.get('any')"), ("steps.short[layer.window]", "steps.short['any']")),
           "test_one_plan_serves_every_layer", (*PLACE, "layer 1", "looks like: window")),
    Mutant("bits that depend on the number of rows", overriding(attend=by_batch_size),
           "test_row_has_the_same_bits_in_any_batch[bfloat16]",
           ("batch invariance", "row 0", "head 0", "token 0", "block 0", "got ", "expected ", "to the bit")),
    Mutant("rotation in the model's dtype",
           edited(("rope.cos[positions], rope.sin[positions]", "rope.cos[positions].to(q.dtype), rope.sin[positions].to(q.dtype)")),
           "test_rope_write[halves-bfloat16]",
           ("rope_write (halves): rotated q is wrong first at token", "head ", "row ", "block ", "got ", "expected ")),
    Mutant("interleaved rotation taken for halves", edited(("rope is None or rope.interleaved or", "rope is None or")),
           "test_rope_write[interleaved-float32]", ("rope_write (interleaved): rotated q", "got ", "expected ")),
    Mutant("one rotary table for the step", edited(("self._turns.get(id(rope))", "self._turns.get(0)"),
                                                  ("self._turns[id(rope)]", "self._turns[0]")),
           "test_ropes_of_one_step_differ", ("rope_write (a rope a layer): rotated q", "got ", "expected ")),
    Mutant("second tile of queries begins one late",
           edited(("range(chunk.start + tile, chunk.start + stop", "range(chunk.start + tile - (tile > 0), chunk.start + stop - (tile > 0)")),
           "test_long_chunk", (*PLACE, "token 128 ")),
    Mutant("K stored before its rotation", overriding(rope_write=writes_late), "test_rope_write[halves-float32]",
           (*PLACE, "rope_write (halves): first wrong")),
    Mutant("stores past the last token", overriding(attend=whole_tiles), "test_padding_rows_change_nobody",
           ("padding: padding tokens: attend wrote outside of out", "token 7 of 7", "head 0", "became 0", "was 1234.5")),
    Mutant("head dim only in steps of 32", overriding(attend=dropped_tail), "test_head_dim[80-bfloat16]",
           (*PLACE, "head dim 80: first wrong")),
    Mutant("softmax without its maximum",
           edited(("return scores.softmax(-1)", "return scores.exp() / scores.exp().sum(-1, keepdim=True)")),
           "test_large_scores[float32]", (*PLACE, "large scores: first wrong", "got nan")),
    Mutant("masked with a large number", edited(("masked_fill_(dead, -torch.inf)", "masked_fill_(dead, -1e4)")),
           "test_large_scores[float32]", (*PLACE, "large scores: first wrong")),
    Mutant("q spoilt", overriding(attend=spoils_q), "test_attend_only_reads",
           ("inputs are only read: attend changed q: first at token 0, head 0, element 0: got ", "expected ", "as before the call")),
    Mutant("plan kept by the lengths of the rows", overriding(plan=plan_by_lengths), "test_plan_follows_the_block_tables",
           (*PLACE, "a plan for each step (new tensors): first wrong")),
    Mutant("plan kept by the lengths and the addresses", overriding(plan=plan_by_lengths_and_addresses),
           "test_plan_follows_the_block_tables", (*PLACE, "a plan for each step (the same memory): first wrong")),
    Mutant("slots kept by the lengths and the tables", overriding(plan=slots_by_tables), "test_plan_follows_the_slots",
           (*PLACE, "a plan for each step (new tensors, other slots): first wrong")),
    Mutant("slots kept by their address", overriding(plan=slots_by_address), "test_plan_follows_the_slots",
           (*PLACE, "a plan for each step (the same tensors, other slots): first wrong")),
    Mutant("lengths spoilt", overriding(plan=spoils("seq_lens", "zero_")), "test_inputs_are_only_read",
           ("plan changed batch.seq_lens: first at row 0: got 0, expected 8 as before the call",)),
    Mutant("block table spoilt", overriding(plan=spoils("block_tables", "zero_")), "test_inputs_are_only_read",
           ("plan changed batch.block_tables: first at row 0, column 0: got 0, expected ",)),
    Mutant("slots spoilt", overriding(write_kv=spoils("slot_mapping", "abs_")), "test_inputs_are_only_read",
           ("changed batch.slot_mapping: first at token 2: got 1, expected -1 as before the call",)),
    Mutant("starts spoilt by attend", overriding(attend=spoils("cu_seqlens_q", "zero_")), "test_softcap",
           ("attend changed batch.cu_seqlens_q: first at entry 1: got 0, expected 1 as before the call",)),
    Mutant("K and V cleared after the write", overriding(write_kv=clears_kv), "test_inputs_are_only_read",
           ("write_kv changed k: first at token 0, head 0, element 0: got 0, expected ",)),
    Mutant("positions moved by rope_write", overriding(rope_write=moves_positions), "test_inputs_are_only_read",
           ("rope_write changed positions: first at token 0: got 1, expected 0",)),
    Mutant("sources of a copy sorted in place", overriding(copy_blocks=sorts_sources), "test_copy_blocks[float32]",
           ("inputs are only read: copy_blocks changed source: first at index [",)),
    Mutant("another tensor put in the batch", overriding(plan=replaces_tables), "test_inputs_are_only_read",
           ("plan put another Tensor in batch.block_tables",)),
    Mutant("default dtype set", overriding(plan=sets_default_dtype), "test_guest_manners",
           ("guest manners: plan changed the process", "default dtype (got torch.float64, was torch.float32)")),
    Mutant("threads set", overriding(attend=sets_threads), "test_guest_manners",
           ("guest manners: attend changed the process", "threads (got ", "was ")),
    Mutant("torch seeded", overriding(write_kv=seeds), "test_guest_manners",
           ("guest manners: write_kv changed the process", "torch random (its state is another")),
    Mutant("numbers drawn from the host's generator", overriding(plan=draws), "test_guest_manners",
           ("guest manners: plan changed the process", "python random (its state is another")),
    Mutant("gradients turned off", overriding(copy_blocks=turns_gradients_off), "test_guest_manners",
           ("guest manners: copy_blocks changed the process", "grad mode (got False, was True)")),
    Mutant("environment edited", overriding(__init__=edits_environment), "test_guest_manners",
           ("guest manners: Mutant(env) changed the process", "environ['MYCHIP_THREADS'] (got '1', was None)")),
    Mutant("one block more than there are", overriding(kv_layout=changed_layout(0, 1)), "test_layout_has_one_entry_a_block",
           ("layout: KVLayout(shape=(10, 2, 2, 8, 32)", "dimension 0 is 10, expected 9, env.num_blocks exactly")),
    Mutant("one slot a block too few", overriding(kv_layout=changed_layout(3, -1)), "test_layout_has_one_entry_a_block",
           ("layout: KVLayout(shape=(9, 2, 2, 7, 32)", "holds 32256 bytes (3584 a block), expected 36864 (4096) at least")),
    Mutant("KV in a dtype that torch lacks", overriding(kv_layout=layout_in("float33")), "test_layout_has_one_entry_a_block",
           ("dtype 'float33' is no dtype of torch; for KV in float32 it may be",)),
    Mutant("KV in a dtype that is not claimed", overriding(kv_layout=layout_in("float64")), "test_layout_has_one_entry_a_block",
           ("dtype 'float64' is not claimed",)),
    Mutant("one head slightly off", overriding(attend=one_head_off), "test_grouped_heads[4x2]",
           (*PLACE, "looks like: heads: only head 3 is wrong (of 4)")),
    Mutant("one key too many of a short row", edited(("(keys >= length)", "(keys > length)")),
           "test_unwritten_slots_take_no_part", (*PLACE, "unused slots: first wrong", "got nan")),
]  # fmt: skip
