"""Attention in float64, written to be read; and what common mistakes compute, to name them when they are made.

L keys of one row, Q queries, which are the row's last Q positions; Hq / Hkv heads, D and Dv elements a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kvpage.api.attention import AttentionLayer


@dataclass(frozen=True, slots=True)
class RowData:
    """One row of a step as the oracle sees it, all on the CPU in float64.

    Attributes:
        q: [Q, Hq, D]. k: [L, Hkv, D]. v: [L, Hkv, Dv]; of positions 0 .. L-1.
        blocks: pool block of each logical block. block_size: tokens a block.
        pool_k, pool_v: [NB * block_size, Hkv, D | Dv], what was stored at each slot, NaN where nothing was.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: Sequence[int]
    block_size: int
    pool_k: torch.Tensor
    pool_v: torch.Tensor

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.k.shape[0] - self.q.shape[0]


def visible(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """bool [Q, L]: which keys each query sees, causally and within ``window``."""
    here = torch.arange(keys - queries, keys).unsqueeze(1)
    there = torch.arange(keys).unsqueeze(0)
    seen = there <= here
    return seen if window is None else seen & (there > here - window)


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: AttentionLayer,
    seen: torch.Tensor | None = None,
    kv_head: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [Q, Hq, D], k [L, Hkv, D], v [L, Hkv, Dv] -> float64 [Q, Hq, Dv], on the CPU.

    ``seen`` bool [Q, L] and ``kv_head`` int64 [Hq] (the KV head of each query head) replace the contract's own.
    """
    q, k, v = (x.to(device="cpu", dtype=torch.float64) for x in (q, k, v))
    if kv_head is None:
        kv_head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    if seen is None:
        seen = visible(q.shape[0], k.shape[0], layer.window)
    scores = torch.einsum("qhd,lhd->hql", q, k[:, kv_head]) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if layer.sinks is not None:
        sinks = layer.sinks.to(device="cpu", dtype=torch.float64).view(-1, 1, 1)
        scores = torch.cat((scores, sinks.expand(-1, q.shape[0], 1)), -1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("hql,lhd->qhd", weights, v[:, kv_head])


def exact_row(row: RowData, layer: AttentionLayer) -> torch.Tensor:
    """What the contract asks of one row: float64 [Q, Hq, Dv]."""
    return exact_attention(row.q, row.k, row.v, layer)


Hypothesis = Callable[[RowData, AttentionLayer], "torch.Tensor | None"]
"""What a mistake would compute for a row; ``None`` where the mistake changes nothing that can be computed."""


def _masked(
    mask: Callable[[RowData, AttentionLayer, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Hypothesis:
    """The contract's attention with another mask, made from positions of queries [Q, 1] and keys [1, L]."""

    def compute(row: RowData, layer: AttentionLayer) -> torch.Tensor:
        keys = row.k.shape[0]
        here = torch.arange(row.start, keys).unsqueeze(1)
        there = torch.arange(keys).unsqueeze(0)
        return exact_attention(row.q, row.k, row.v, layer, mask(row, layer, here, there))

    return compute


def _windowed(row: RowData, layer: AttentionLayer) -> torch.Tensor:
    return visible(row.q.shape[0], row.k.shape[0], layer.window)


def _layer(change: Callable[[RowData, AttentionLayer], AttentionLayer | None]) -> Hypothesis:
    """The contract's attention with another layer record."""

    def compute(row: RowData, layer: AttentionLayer) -> torch.Tensor | None:
        changed = change(row, layer)
        return None if changed is None else exact_row(row, changed)

    return compute


def _window_of(offset: int) -> Hypothesis:
    def change(row: RowData, layer: AttentionLayer) -> AttentionLayer | None:
        width = 0 if layer.window is None else layer.window + offset
        return replace(layer, window=width) if width > 0 else None

    return _layer(change)


def _keys(source: Callable[[RowData, torch.Tensor], torch.Tensor]) -> Hypothesis:
    """K and V of position p taken from position source(row, p) of the same row."""

    def compute(row: RowData, layer: AttentionLayer) -> torch.Tensor:
        taken = source(row, torch.arange(row.k.shape[0])).clamp(0, row.k.shape[0] - 1)
        return exact_attention(row.q, row.k[taken], row.v[taken], layer)

    return compute


def _slots(source: Callable[[RowData, torch.Tensor], torch.Tensor]) -> Hypothesis:
    """K and V of position p read from slot source(row, p) of the pool."""

    def compute(row: RowData, layer: AttentionLayer) -> torch.Tensor | None:
        slots = source(row, torch.arange(row.k.shape[0]))
        if bool(((slots < 0) | (slots >= row.pool_k.shape[0])).any()):
            return None
        return exact_attention(row.q, row.pool_k[slots], row.pool_v[slots], layer)

    return compute


def _table_slots(row: RowData, positions: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(row.blocks, dtype=torch.int64)
    return table[positions // row.block_size] * row.block_size + positions % row.block_size


def _interleaved_heads(row: RowData, layer: AttentionLayer) -> torch.Tensor:
    return exact_attention(row.q, row.k, row.v, layer, None, torch.arange(row.q.shape[1]) % row.k.shape[1])


def _first_head(row: RowData, layer: AttentionLayer) -> torch.Tensor:
    return exact_attention(row.q, row.k, row.v, layer, None, torch.zeros(row.q.shape[1], dtype=torch.int64))


def _swapped(row: RowData, layer: AttentionLayer) -> torch.Tensor | None:
    if row.k.shape != row.v.shape:
        return None
    return exact_attention(row.q, row.v, row.k, layer)


def _sink_value(row: RowData, layer: AttentionLayer) -> torch.Tensor | None:
    """The sink's weight goes to the first key's value instead of vanishing."""
    if layer.sinks is None:
        return None
    plain = replace(layer, sinks=None)
    with_sink, without = exact_row(row, layer), exact_row(row, plain)
    # out_with = out_without * (1 - weight of the sink), element by element.
    share = 1 - (with_sink * without).sum(-1, keepdim=True) / (without * without).sum(-1, keepdim=True)
    kv_head = torch.arange(row.q.shape[1]) // (row.q.shape[1] // row.k.shape[1])
    oldest = _windowed(row, layer).int().argmax(-1)
    return with_sink + share * row.v[oldest][:, kv_head]


def _cap_before_scale(row: RowData, layer: AttentionLayer) -> torch.Tensor | None:
    if layer.softcap is None or layer.scale == 0:
        return None
    # scale * cap * tanh(x / cap) is a cap of scale * cap on scores that already carry the scale.
    return exact_row(row, replace(layer, softcap=layer.softcap * abs(layer.scale)))


SCALES: dict[str, Callable[[AttentionLayer, int, int], float]] = {
    "scale was ignored (1 was used)": lambda layer, d, h: 1.0,
    "scale 1/sqrt(head dim) was used instead of the layer's": lambda layer, d, h: d**-0.5,
    "scale 1/head dim was used": lambda layer, d, h: 1.0 / d,
    "scale was applied twice": lambda layer, d, h: layer.scale**2,
    "the square root of scale was used": lambda layer, d, h: math.sqrt(abs(layer.scale)),
    "scores went to exp2 without log2(e)": lambda layer, d, h: layer.scale * math.log(2),
    "log2(e) was multiplied in although exp, not exp2, was taken": lambda layer, d, h: (
        layer.scale / math.log(2)
    ),
}

HYPOTHESES: dict[str, Hypothesis] = {
    "causal mask: none, queries see later keys": _masked(
        lambda row, layer, here, there: (
            (there >= 0).expand(len(here), -1) if layer.window is None else there > here - layer.window
        )
    ),
    "causal mask: each query sees one key too many": _masked(
        lambda row, layer, here, there: (
            (there <= here + 1)
            & ((there > here - layer.window) if layer.window is not None else (there >= 0))
        )
    ),
    "causal mask: each query lacks its own key, the last": _masked(
        lambda row, layer, here, there: _windowed(row, layer) & ((there < here) | (here == 0))
    ),
    "causal mask: counted from the chunk's first token, not the sequence's": _masked(
        lambda row, layer, here, there: there <= here - row.start
    ),
    "first key: position 0 is missing": _masked(
        lambda row, layer, here, there: _windowed(row, layer) & ((there > 0) | (here == 0))
    ),
    "window: ignored": _layer(lambda row, layer: replace(layer, window=None) if layer.window else None),
    "window: one key too wide": _window_of(1),
    "window: one key too narrow": _window_of(-1),
    "window: counted from the row's last token for every query": _masked(
        lambda row, layer, here, there: (
            (there <= here) & (there > (row.k.shape[0] - 1 - (layer.window or row.k.shape[0])))
        )
    ),
    "window: rounded down to the start of a block": _masked(
        lambda row, layer, here, there: (
            (there <= here)
            & (
                there
                >= (here + 1 - (layer.window or row.k.shape[0])).clamp(min=0)
                // row.block_size
                * row.block_size
            )
        )
    ),
    "softcap: ignored": _layer(lambda row, layer: replace(layer, softcap=None) if layer.softcap else None),
    "softcap: applied before scale": _cap_before_scale,
    "sinks: ignored": _layer(
        lambda row, layer: replace(layer, sinks=None) if layer.sinks is not None else None
    ),
    "sinks: multiplied by scale": _layer(
        lambda row, layer: (
            replace(layer, sinks=layer.sinks * layer.scale) if layer.sinks is not None else None
        )
    ),
    "sinks: the sink was given a value": _sink_value,
    "grouped heads: query head h reads KV head h % Hkv, not h // (Hq / Hkv)": _interleaved_heads,
    "grouped heads: every query head reads KV head 0": _first_head,
    "K and V: swapped": _swapped,
    "block edge: the first slot of each block holds the position before it": _keys(
        lambda row, at: at.where((at % row.block_size != 0) | (at == 0), at - 1)
    ),
    "block edge: the last slot of each block holds the position before it": _keys(
        lambda row, at: at.where((at % row.block_size != row.block_size - 1) | (at == 0), at - 1)
    ),
    "block edge: the last slot of each block holds the position after it": _keys(
        lambda row, at: at.where(at % row.block_size != row.block_size - 1, at + 1)
    ),
    "block edge: the first slot of each block holds the position after it": _keys(
        lambda row, at: at.where(at % row.block_size != 0, at + 1)
    ),
    "block edge: the last slot of each block is not read": _masked(
        lambda row, layer, here, there: (
            _windowed(row, layer) & ((there % row.block_size != row.block_size - 1) | (there == here))
        )
    ),
    "block edge: the first slot of each later block is not read": _masked(
        lambda row, layer, here, there: _windowed(row, layer) & ((there % row.block_size != 0) | (there == 0))
    ),
    "block edge: the last, partly filled block is not read": _masked(
        lambda row, layer, here, there: (
            _windowed(row, layer)
            & (
                (there < row.k.shape[0] // row.block_size * row.block_size)
                | (row.k.shape[0] < row.block_size)
            )
        )
    ),
    "block edge: positions are read one slot later": _keys(lambda row, at: at + 1),
    "block edge: positions are read one slot earlier": _keys(lambda row, at: at - 1),
    "block table: blocks are read as if they lay one after another": _slots(
        lambda row, at: row.blocks[0] * row.block_size + at
    ),
    "block table: logical block numbers are read as pool blocks": _slots(lambda row, at: at),
    "block table: the first block is read for every block": _slots(
        lambda row, at: row.blocks[0] * row.block_size + at % row.block_size
    ),
    "order: this step's tokens are missing, they were not written before attending": _masked(
        lambda row, layer, here, there: _windowed(row, layer) & ((there < row.start) | (row.start == 0))
    ),
}


def diagnose(
    rows: Sequence[tuple[RowData, torch.Tensor]], layer: AttentionLayer, tolerance: tuple[float, float]
) -> str:
    """The name of a mistake that explains every given (row, output [Q, Hq, Dv]), or ``""``."""

    def explains(hypothesis: Hypothesis) -> bool:
        for row, got in rows:
            other = hypothesis(row, layer)
            if other is None or not close(got, other, tolerance):
                return False
        return True

    for name, hypothesis in _all_hypotheses(rows[0][0], layer):
        if explains(hypothesis):
            return name
    return _fitted_scale(rows, layer, tolerance)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: tuple[float, float]) -> bool:
    """|got - wanted| <= absolute + relative * |wanted| everywhere, and nothing is NaN."""
    return bool(((got - wanted).abs() <= tolerance[0] + tolerance[1] * wanted.abs()).all())


def _all_hypotheses(row: RowData, layer: AttentionLayer) -> Iterator[tuple[str, Hypothesis]]:
    for name, compute in SCALES.items():
        scale = compute(layer, row.q.shape[2], row.q.shape[1])
        if scale != layer.scale:
            yield (
                f"scale: {name} (as with scale {scale:.6g}, asked for {layer.scale:.6g})",
                _layer(lambda row, layer, scale=scale: replace(layer, scale=scale)),  # type: ignore[misc]
            )
    yield from HYPOTHESES.items()


def _fitted_scale(
    rows: Sequence[tuple[RowData, torch.Tensor]], layer: AttentionLayer, tolerance: tuple[float, float]
) -> str:
    """A factor on ``layer.scale`` that explains the outputs: a scan over powers of two, then a ternary search."""
    row, got = max(rows, key=lambda item: item[0].q.shape[0] * item[0].k.shape[0])

    def error(power: float) -> float:
        return float((exact_row(row, replace(layer, scale=layer.scale * 2.0**power)) - got).abs().sum())

    best = min((step / 4 for step in range(-32, 33)), key=error)
    low, high = best - 0.25, best + 0.25
    for _ in range(40):
        third = (high - low) / 3
        if error(low + third) < error(high - third):
            high -= third
        else:
            low += third
    scale = layer.scale * 2.0 ** ((low + high) / 2)
    if not math.isfinite(error(low)) or abs(scale / layer.scale - 1) < 1e-4:
        return ""
    fitted = replace(layer, scale=scale)
    if all(close(got, exact_row(row, fitted), tolerance) for row, got in rows):
        return f"scale: {scale:.6g} was used, asked for {layer.scale:.6g}"
    return ""
