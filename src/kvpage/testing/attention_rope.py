"""Inputs that lie in memory as models leave them, and rotary positions held against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage.api.attention import AttentionBatch, Rope
from kvpage.testing.attention_report import check_tensor
from kvpage.testing.attention_rig import Rig, Row, Step

ROPES = ("none", "halves", "interleaved", "partial-halves", "partial-interleaved")
STRIDES = ("fused-qkv", "padded-heads", "v-inside-k")


def strided(
    kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same values as views, NaN between them."""
    tokens = q.shape[0]

    def roomy(*tensors: torch.Tensor) -> list[torch.Tensor]:
        """Side by side in one [T, heads, sum of widths] tensor."""
        width = sum(tensor.shape[2] for tensor in tensors)
        room = tensors[0].new_full((tokens, tensors[0].shape[1], width + 8), torch.nan)
        views, start = [], 0
        for tensor in tensors:
            view = room[:, :, start : start + tensor.shape[2]]
            view.copy_(tensor)
            views.append(view)
            start += tensor.shape[2]
        return views

    if kind == "contiguous":
        return q, k, v
    if kind == "v-inside-k":
        first, second = roomy(k, v)
        return roomy(q)[0], first, second
    if kind == "padded-heads":
        return roomy(q)[0], roomy(k)[0], roomy(v)[0]
    flat = torch.cat([tensor.reshape(tokens, -1) for tensor in (q, k, v)], 1)
    parts = flat.split([tensor.shape[1] * tensor.shape[2] for tensor in (q, k, v)], 1)
    return parts[0].view(q.shape), parts[1].view(k.shape), parts[2].view(v.shape)


def rope_tables(kind: str, rig: Rig, seed: int = 11) -> Rope | None:
    """Tables with angles of any size for positions 0 .. longest."""
    if kind == "none":
        return None
    rotary = rig.shape.head_dim // 2 if kind.startswith("partial") else rig.shape.head_dim
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = (max(rig.lengths), rotary // 2)
    angles = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") * 1e3
    cos, sin = angles.cos().to(rig.device), angles.sin().to(rig.device)
    return Rope(cos=cos, sin=sin, rotary_dim=rotary, interleaved=kind.endswith("interleaved"))


def rope_step(rig: Rig, rows: Sequence[Row], ropes: Sequence[Rope | None], strides: str, name: str) -> Step:
    """rope_write of history, then of the step, a rope a layer; what it returns is checked, then attends."""
    __tracebackhide__ = True
    history = [Row(row.sequence, 0, row.first) for row in rows if row.first]
    for part in (history, rows):
        batch = rig.batch(part)
        plan = rig.backend.plan(batch)
        turned = [
            _rope_write(rig, part, batch, index, rope, strides, name) for index, rope in enumerate(ropes)
        ]
    # From here on the sequences hold what the cache should: q and k rotated.
    for index, rope in enumerate(ropes):
        if rope is None:
            continue
        for tensors in (rig.q[index], rig.k[index]):
            for sequence, values in enumerate(tensors):
                at, moved = torch.arange(len(values), device=rig.device), values.to(rig.device)
                tensors[sequence] = exact_rotation(moved, at, rope).to(moved.dtype).cpu()
    rig.note_written([Row(row.sequence, 0, row.last) for row in rows])
    step = Step(rows, batch, [rig.layer(index=index) for index in range(len(ropes))])
    for q, kv, layer in zip(turned, rig.kv, step.layers, strict=True):
        rig.attend(step, q, kv, layer, plan)
    return step


def _rope_write(
    rig: Rig,
    rows: Sequence[Row],
    batch: AttentionBatch,
    index: int,
    rope: Rope | None,
    strides: str,
    name: str,
) -> torch.Tensor:
    """rope_write of one layer; the rotated q."""
    __tracebackhide__ = True
    given = rig.inputs(rows, index)
    positions = torch.cat([torch.arange(row.first, row.last) for row in rows]).to(rig.device)
    exact = [x.double() if rope is None else exact_rotation(x, positions, rope) for x in given[:2]]
    q, k, v = strided(strides, *(x.clone() for x in given))
    turned = rig.backend.rope_write(q, k, v, positions, rope, rig.kv[index], batch)
    for letter, mine, wanted in zip("qk", turned, exact, strict=True):
        # Half a unit in the last place of the result, and what float32 loses before that.
        near = (4e-6 if mine.dtype == torch.float32 else 2e-5, 0.51 * torch.finfo(mine.dtype).eps + 1e-6)
        allowed = None if rope is None else near
        check_tensor(
            f"rope_write ({name})",
            f"rotated {letter}",
            mine,
            wanted,
            allowed,
            lambda token: rig.place(rows, token),
        )
    return turned[0]


def exact_rotation(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """rotate in float64."""
    wide = Rope(
        cos=rope.cos.double(), sin=rope.sin.double(), rotary_dim=rope.rotary_dim, interleaved=rope.interleaved
    )
    half = wide.rotary_dim // 2
    cos, sin = wide.cos[positions].unsqueeze(1), wide.sin[positions].unsqueeze(1)
    out = x.double()
    pairs = (slice(0, wide.rotary_dim, 2), slice(1, wide.rotary_dim, 2)) if wide.interleaved else (
        slice(0, half), slice(half, wide.rotary_dim)
    )  # fmt: skip
    first, second = out[..., pairs[0]].clone(), out[..., pairs[1]].clone()
    out[..., pairs[0]] = first * cos - second * sin
    out[..., pairs[1]] = second * cos + first * sin
    return out
