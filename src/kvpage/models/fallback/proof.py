"""A fallback model proves itself before it is trusted.

Two sequences of ``LENGTH`` tokens run packed together and in pieces, as an engine would run them, with plain
attention over what was stored; and each alone, whole, with transformers' own eager attention. Where the logits
differ, tokens reach each other in a way that the probe did not see (a convolution, a recurrent state, a mean over
the batch), or attention is not what it was taken for.

Then a sequence at the first positions and one at the last ones run packed, and each alone. Where these logits differ,
a token's result depends on the positions beside it (a rope of the model's own that looks at the longest).

It costs seven forward passes of at most 24 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvpage.api.decoder import KVGroupStep
from kvpage.api.model import AttentionSpec, StepContext
from kvpage.models.fallback.attention import Refused
from kvpage.models.fallback.source import attending_as
from kvpage.models.fallback.spec import FallbackSpec

LENGTH = 12
STEPS: tuple[tuple[tuple[int, int], ...], ...] = (((0, 5), (0, 9)), ((5, 6), (9, 10)), ((6, 12), (10, 12)))
"""For each step, [start, stop) of each sequence."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest norm of a position's difference in logits, relative to their spread. In half precision rounding alone
sends a token of a mixture of experts to another expert: a quarter of the positions may be beyond it there."""


class _Model(Protocol):
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def prove(model: _Model, module: Any, spec: FallbackSpec, dtype: torch.dtype) -> None:
    """Compare ``model`` with the transformers ``module`` that it runs.

    Raises:
        Refused: they differ.
    """
    device = next(module.parameters()).device
    length = min(LENGTH, spec.max_position)
    ids = _tokens(spec.vocab_size, length).to(device)
    with attending_as(module, "eager"):
        expected = module(input_ids=ids, use_cache=False)[0].float()
    found = torch.empty_like(expected)
    memory = _Memory()
    for step in STEPS:
        pieces = [(row, start, min(stop, length)) for row, (start, stop) in enumerate(step) if start < length]
        context = _DenseStep(memory, pieces)
        token_ids = torch.cat([ids[row, start:stop] for row, start, stop in pieces])
        positions = torch.cat([torch.arange(start, stop, device=device) for _, start, stop in pieces])
        logits = model.logits(model.forward(token_ids, positions, context)).float()
        parts = logits.split([stop - start for _, start, stop in pieces])
        for (row, start, stop), part in zip(pieces, parts, strict=True):
            found[row, start:stop] = part
    worst = _difference(found, expected, dtype)
    if worst:
        raise Refused(
            f"it mixes tokens outside attention, or attends in a way of its own: in pieces its logits differ by "
            f"{worst:.1e} of their spread from those of transformers"
        )


def prove_apart(
    model: _Model, spec: FallbackSpec, dtype: torch.dtype, max_model_len: int, device: torch.device | str
) -> None:
    """Compare two sequences packed, one at the first positions and one at the last, with each alone.

    Raises:
        Refused: they differ.
    """
    length = min(LENGTH, max_model_len // 2)
    if not length:
        return
    ids = _tokens(spec.vocab_size, length).to(device)
    first = torch.arange(length, device=device)
    places = torch.stack((first, first + max_model_len - length))

    def run(*rows: int) -> torch.Tensor:
        context = _DenseStep(_Memory(), [(row, 0, length) for row in rows])
        return model.logits(
            model.forward(ids[list(rows)].flatten(), places[list(rows)].flatten(), context)
        ).float()

    worst = _difference(run(0, 1), torch.cat((run(0), run(1))), dtype)
    if worst:
        raise Refused(
            f"a token's result depends on the positions that run beside it: beside a sequence near position "
            f"{max_model_len} its logits differ by {worst:.1e} of their spread"
        )


def _difference(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """How much logits [..., V] differ, relative to their spread; 0.0 where that is no more than rounding."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-12)
    differences = ((found - expected).norm(dim=-1) / spread).flatten().nan_to_num(torch.inf)
    worst = float(differences.max() if dtype == torch.float32 else differences.quantile(0.75))
    return worst if worst > TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) else 0.0


def _tokens(vocab_size: int, length: int) -> torch.Tensor:
    """Two sequences of ordinary ids, all different where the vocabulary allows."""
    first = torch.arange(2 * length, device="cpu") * max(1, (vocab_size - 4) // (2 * length))
    return ((first + 3) % vocab_size).view(2, length)


@dataclass
class _Memory:
    """K and V of (KV group, layer, sequence) so far, [L, Hkv, D]."""

    kept: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def extend(
        self, place: tuple[int, int, int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if place in self.kept:
            old_k, old_v = self.kept[place]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self.kept[place] = (k, v)
        return k, v


@dataclass
class _DenseStep:
    """A ``StepContext``: plain attention of each piece (row, start, stop) over its sequence so far."""

    memory: _Memory
    pieces: Sequence[tuple[int, int, int]]
    wanted: torch.Tensor | None = None

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found, first = [], 0
        for row, start, stop in self.pieces:
            own = slice(first, first + stop - start)
            first = own.stop
            keys, values = self.memory.extend((spec.kv_group, spec.kv_index, row), k[own], v[own])
            found.append(_attend(spec, q[own], keys, values, start, sinks))
        return torch.cat(found).to(q.dtype)

    def group(self, index: int) -> KVGroupStep:
        raise NotImplementedError(f"KV group {index} is plain memory here; attention goes through attend()")


def _attend(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [T, Hq, D] at positions start ..., k and v [L, Hkv, D] from position 0: float32 [T, Hq, D]."""
    share = spec.num_heads // spec.num_kv_heads
    k, v = (tensor.float().repeat_interleave(share, 1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    distance = torch.arange(start, start + len(q), device=q.device)[:, None] - torch.arange(
        len(k), device=q.device
    )
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, len(q), 1)), -1)
    weights = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v)
