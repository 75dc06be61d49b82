"""Reference attention against a float64 oracle that sees each row's whole K and V."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kvpage.api.attention import AttentionBatch, AttentionEnv, AttentionLayer, Rope
from kvpage.builtin.reference_attention import ReferenceAttention


@dataclass
class Case:
    """Rows as (tokens before this step, tokens of this step)."""

    rows: list[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, oracle, KV tensor after the step) with NaN in every slot that no row owns."""
    generator = torch.Generator().manual_seed(7)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bs, lengths = case.block_size, [before + new for before, new in case.rows]
    needed = [-(-length // bs) for length in lengths]
    order = torch.randperm(sum(needed), generator=generator) + 1
    env = AttentionEnv(
        device="cpu", dtype=case.dtype, kv_dtype=case.dtype, num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, v_head_dim=case.head_dim, block_size=bs,
        num_blocks=sum(needed) + 1, max_num_seqs=8, max_num_batched_tokens=4096, max_model_len=4096,
    )  # fmt: skip
    backend = ReferenceAttention(env)
    kv = torch.full(backend.kv_layout().shape, float("nan"), dtype=dtype)
    tables = torch.zeros(len(case.rows), max(needed), dtype=torch.int32)
    keys, values, slots, next_block = [], [], [], 0
    for row, length in enumerate(lengths):
        blocks = order[next_block : next_block + needed[row]]
        next_block += needed[row]
        tables[row, : needed[row]] = blocks
        keys.append(random(length, case.num_kv_heads, case.head_dim))
        values.append(random(length, case.num_kv_heads, case.head_dim))
        at = torch.arange(length)
        slots.append(blocks[at // bs] * bs + at % bs)

    def step(rows: list[tuple[int, int]]) -> AttentionBatch:
        counts = torch.tensor([stop - start for start, stop in rows])
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        return AttentionBatch(
            num_tokens=int(counts.sum()), num_rows=len(rows), num_short=0, cu_seqlens_q=cu_seqlens.int(),
            seq_lens=torch.tensor([stop for _, stop in rows], dtype=torch.int32), block_tables=tables,
            slot_mapping=torch.cat([s[start:stop] for s, (start, stop) in zip(slots, rows, strict=True)]),
        )  # fmt: skip

    def parts(tensors: list[torch.Tensor], rows: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([t[start:stop] for t, (start, stop) in zip(tensors, rows, strict=True)])

    past = [(0, before) for before, _ in case.rows]
    batch = step(past)
    backend.plan(batch)
    backend.write_kv(kv, parts(keys, past), parts(values, past), batch)
    now = [(before, before + new) for before, new in case.rows]
    batch = step(now)
    plan = backend.plan(batch)
    backend.write_kv(kv, parts(keys, now), parts(values, now), batch)
    q = random(batch.num_tokens, case.num_heads, case.head_dim)
    sinks = torch.randn(case.num_heads, generator=generator) if case.sinks else None
    layer = AttentionLayer(index=0, scale=0.3, window=case.window, softcap=case.softcap, sinks=sinks)
    out = torch.empty_like(q)
    backend.attend(q, kv, layer, batch, plan, out)
    queries = q.split([new for _, new in case.rows])
    oracle = [attention_float64(*item, layer=layer) for item in zip(queries, keys, values, strict=True)]
    return out.double(), torch.cat(oracle), kv


def attention_float64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: AttentionLayer
) -> torch.Tensor:
    """q [Q, Hq, D], k and v [L, Hkv, D]; the last query is the last key's."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    query = torch.arange(k.shape[0] - q.shape[0], k.shape[0]).unsqueeze(1)
    key = torch.arange(k.shape[0])
    hidden = key > query
    if layer.window is not None:
        hidden |= key <= query - layer.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if layer.sinks is not None:
        sinks = layer.sinks.double().view(-1, 1, 1).expand(-1, q.shape[0], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, v)


MIXED = [(0, 1), (3, 1), (15, 1), (16, 1), (37, 1), (0, 9), (5, 150), (63, 2)]

CASES = {
    "decode rows and chunks together": Case(MIXED),
    "only decode rows": Case([(n, 1) for n in (0, 1, 3, 4, 5, 31, 100)]),
    "block size 1": Case(MIXED, block_size=1),
    "block larger than every row": Case(MIXED, block_size=256),
    "block size no power of two": Case(MIXED, block_size=7),
    "window inside a block": Case(MIXED, window=3),
    "window over several blocks": Case(MIXED, window=18),
    "softcap": Case(MIXED, softcap=2.0),
    "sinks": Case(MIXED, sinks=True),
    "all features": Case(MIXED, window=10, softcap=3.0, sinks=True),
    "one KV head": Case(MIXED, num_kv_heads=1),
    "no grouping": Case(MIXED, num_kv_heads=4),
    "head dim 80": Case(MIXED, head_dim=80),
    "bfloat16": Case(MIXED, dtype="bfloat16"),
    "float16 with window": Case(MIXED, dtype="float16", window=18),
}


@pytest.mark.parametrize("name", CASES)
def test_output_equals_the_float64_oracle(name: str) -> None:
    case = CASES[name]
    out, oracle, _ = run(case)
    tolerance = {"float32": 5e-6, "bfloat16": 1e-2, "float16": 2e-3}[case.dtype]
    assert (out - oracle).abs().max().item() <= tolerance


def test_slots_that_no_row_owns_are_never_written() -> None:
    case = Case([(0, 3), (5, 1)])
    _, _, kv = run(case)
    written = ~kv.isnan().flatten(3).any(-1).any(2).any(1)
    owned = ~kv[:, 0, 0, :, 0].isnan()
    assert int(owned.sum()) == 3 + 6
    assert not written[0], "the null block was written"


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    env = AttentionEnv(
        device="cpu", dtype="float32", kv_dtype="float32", num_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=16,
        block_size=4, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    kv = torch.randn(64, 2, 2, 4, 16, generator=generator)
    q = torch.randn(3, 4, 16, generator=generator)
    tables = torch.arange(1, 61, dtype=torch.int32).view(3, 20)
    lengths = torch.tensor([22, 4, 77], dtype=torch.int32)

    def attend(rows: list[int]) -> torch.Tensor:
        backend = ReferenceAttention(env)
        batch = AttentionBatch(
            num_tokens=len(rows), num_rows=len(rows), num_short=len(rows),
            cu_seqlens_q=torch.arange(len(rows) + 1, dtype=torch.int32), seq_lens=lengths[rows],
            block_tables=tables[rows], slot_mapping=torch.full((len(rows),), -1),
        )  # fmt: skip
        plan, out = backend.plan(batch), torch.empty(len(rows), 4, 16)
        backend.attend(q[rows], kv, AttentionLayer(index=0, scale=0.25), batch, plan, out)
        return out

    everyone = attend([0, 1, 2])
    for row in range(3):
        assert torch.equal(attend([row])[0], everyone[row])


def test_rotation_in_one_piece_equals_the_contract_default() -> None:
    generator = torch.Generator().manual_seed(3)
    env = AttentionEnv(
        device="cpu", dtype="float32", kv_dtype="float32", num_heads=2, num_kv_heads=1, head_dim=8, v_head_dim=8,
        block_size=4, num_blocks=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=16,
    )  # fmt: skip
    backend = ReferenceAttention(env)
    angles = torch.rand(16, 4, generator=generator)
    rope = Rope(cos=angles.cos(), sin=angles.sin(), rotary_dim=8)
    q, k = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 1, 8, generator=generator)
    positions = torch.tensor([0, 5, 6])
    batch = AttentionBatch(
        num_tokens=3, num_rows=1, num_short=0, cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32), block_tables=torch.tensor([[1]], dtype=torch.int32),
        slot_mapping=torch.tensor([4, 5, 6]),
    )  # fmt: skip
    backend.plan(batch)
    kv = torch.zeros(backend.kv_layout().shape)
    fused = backend.rope_write(q, k, k, positions, rope, kv, batch)
    plain = super(ReferenceAttention, backend).rope_write(
        q, k, k, positions, rope, torch.zeros_like(kv), batch
    )
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)


def test_copied_blocks_equal_their_source() -> None:
    backend = ReferenceAttention.__new__(ReferenceAttention)
    kv = torch.arange(5 * 2 * 1 * 2 * 3, dtype=torch.float32).view(5, 2, 1, 2, 3)
    backend.copy_blocks(kv, torch.tensor([1, 2]), torch.tensor([4, 3]))
    assert torch.equal(kv[4], kv[1])
    assert torch.equal(kv[3], kv[2])
