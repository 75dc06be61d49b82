"""A short comparison of an attention backend with attention computed directly in float64.

It finds a backend that is broken on this machine; the conformance suite is what proves one right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvpage.api.attention import AttentionBackend, AttentionBatch, AttentionEnv, AttentionLayer

TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest difference allowed; values are of order 1."""

HEADS, KV_HEADS = 4, 2
CACHED = (5, 40, 0, 17)
NEW = (1, 1, 7, 20)
"""Four rows: tokens already in the cache, tokens of this step. Two decode, two are prompt chunks."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one comparison found: the largest difference and the limit, or the error it ended in."""

    case: str
    difference: float
    limit: float
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.difference <= self.limit


def check_backend(backend: type[AttentionBackend], device: str) -> Iterator[CheckResult]:
    """Every dtype that ``backend`` states and this check knows, plain and with each feature it states."""
    for dtype, limit in TOLERANCES.items():
        if dtype not in backend.caps.dtypes:
            continue
        cases = {"plain": AttentionLayer(index=0, scale=0.25)}
        if "window" in backend.caps.features:
            cases["window"] = AttentionLayer(index=0, scale=0.25, window=9)
        if "softcap" in backend.caps.features:
            cases["softcap"] = AttentionLayer(index=0, scale=0.25, softcap=2.0)
        for name, layer in cases.items():
            case = f"{dtype}, {name}"
            try:
                yield CheckResult(case, _difference(backend, device, dtype, layer), limit)
            except Exception as error:  # whatever a backend raises is the finding
                yield CheckResult(case, float("inf"), limit, f"{type(error).__name__}: {error}")


def _difference(backend: type[AttentionBackend], device: str, dtype: str, layer: AttentionLayer) -> float:
    caps = backend.caps
    head_dim = min(caps.head_dims) if caps.head_dims else 16
    size = caps.preferred_block_size
    lengths = [cached + new for cached, new in zip(CACHED, NEW, strict=True)]
    tables = _tables(lengths, size)
    env = AttentionEnv(
        device=device, dtype=dtype, kv_dtype=dtype, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=head_dim,
        v_head_dim=head_dim, block_size=size, num_blocks=max(map(max, tables)) + 1, max_num_seqs=len(NEW),
        max_num_batched_tokens=sum(lengths), max_model_len=max(lengths),
    )  # fmt: skip
    numbers = torch.Generator(device="cpu").manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        values = torch.randn(tokens, heads, head_dim, generator=numbers, dtype=torch.float32, device="cpu")
        return values.to(device=device, dtype=kind)

    keys, values = [draw(n, KV_HEADS) for n in lengths], [draw(n, KV_HEADS) for n in lengths]
    queries = [draw(n, HEADS) for n in NEW]
    served = backend(env)
    layout = served.kv_layout()
    kv = torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype), device=device)
    # The cached tokens first, as a step of their own, then the step that is compared.
    for starts, counts in ((tuple(0 for _ in CACHED), CACHED), (CACHED, NEW)):
        rows = [row for row, count in enumerate(counts) if count]
        batch = _batch(
            [starts[r] for r in rows], [counts[r] for r in rows], [tables[r] for r in rows], size, device
        )
        plan = served.plan(batch)
        spans = [(row, starts[row], starts[row] + counts[row]) for row in rows]
        step_keys = torch.cat([keys[row][start:stop] for row, start, stop in spans])
        step_values = torch.cat([values[row][start:stop] for row, start, stop in spans])
        served.write_kv(kv, step_keys, step_values, batch)
    query = torch.cat(queries)
    out = torch.empty_like(query)
    served.attend(query, kv, layer, batch, plan, out)
    wanted = torch.cat([_exact(q, k, v, layer) for q, k, v in zip(queries, keys, values, strict=True)])
    return float((out.double().cpu() - wanted).abs().max())


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: AttentionLayer
) -> torch.Tensor:
    """Causal attention of one row in float64: query [q, Hq, D], key and value [L, Hkv, D] -> [q, Hq, D]."""
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (x.double().cpu().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = layer.scale * q @ k.transpose(1, 2)
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    here = torch.arange(key.shape[0] - query.shape[0], key.shape[0], device="cpu")[:, None]
    there = torch.arange(key.shape[0], device="cpu")[None, :]
    seen = there <= here
    if layer.window is not None:
        seen &= there > here - layer.window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1)


def _tables(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Blocks of each row, scattered: neighbours in a sequence are no neighbours in memory."""
    counts = [-(-length // block_size) for length in lengths]
    numbers = list(range(sum(counts), 0, -1))
    tables: list[list[int]] = [[] for _ in lengths]
    while numbers:
        for table, count in zip(tables, counts, strict=True):
            if len(table) < count:
                table.append(numbers.pop())
    return tables


def _batch(
    starts: Sequence[int], counts: Sequence[int], tables: Sequence[Sequence[int]], size: int, device: str
) -> AttentionBatch:
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    ends = [sum(counts[: row + 1]) for row in range(len(counts))]
    slots = [
        tables[row][position // size] * size + position % size
        for row, start in enumerate(starts)
        for position in range(start, lengths[row])
    ]
    width = max(map(len, tables))
    padded = [[*table, *([0] * (width - len(table)))] for table in tables]

    def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return AttentionBatch(
        num_tokens=len(slots), num_rows=len(counts), num_short=sum(count == 1 for count in counts),
        cu_seqlens_q=tensor([0, *ends], torch.int32), seq_lens=tensor(lengths, torch.int32),
        block_tables=tensor(padded, torch.int32), slot_mapping=tensor(slots, torch.int64),
        q_lens_host=list(counts), seq_lens_host=lengths, max_query_len=max(counts), max_seq_len=max(lengths),
    )  # fmt: skip
