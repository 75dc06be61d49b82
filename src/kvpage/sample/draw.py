"""From logits to tokens: the likeliest one, or one drawn from the kept set by inverse CDF.

A row's result is a function of that row alone, bit for bit: no arithmetic here depends on how many rows there are
or on what other rows ask for. Sums run in order of token id (torch's ``cumsum``), never through reductions whose
order may change with the shape; only *values* are sorted, because sets are cut by threshold and ties stay together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvpage.api.sampling import NO_TOKEN, SamplingKernel, Shaping

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_CPU_ROWS = 8  # rows worked on at once, so that their temporaries stay in the second-level cache
_DEVICE_ROWS = 256
_TOP_P_HEAD = 512  # likeliest tokens looked at before a whole row is sorted


class TorchSampling(SamplingKernel):
    """The builtin kernel, for any device that torch has."""

    def likeliest(self, logits: torch.Tensor) -> Int64Array:
        return likeliest(logits)

    def draw(self, logits: torch.Tensor, shaping: Shaping, uniforms: Float32Array) -> Int64Array:
        drawn = np.flatnonzero(shaping.temperature)
        if len(drawn) == len(logits):
            return draw(logits, shaping, uniforms)
        greedy = np.flatnonzero(shaping.temperature == 0.0)
        token_ids = np.empty(len(logits), dtype=np.int64)
        token_ids[greedy] = likeliest(select_rows(logits, greedy))
        token_ids[drawn] = draw(select_rows(logits, drawn), shaping.rows(drawn), uniforms[drawn])
        return token_ids


def likeliest(logits: torch.Tensor) -> Int64Array:
    """The id of the largest logit of each row [N, V] -> [N], the lowest id on ties; ``NO_TOKEN`` where none is."""
    if logits.device.type != "cpu":
        best = logits.argmax(-1, keepdim=True)
        usable = logits.gather(-1, best) > -math.inf
        return np.asarray(torch.where(usable, best, NO_TOKEN).squeeze(-1).cpu().numpy(), dtype=np.int64)
    # numpy's argmax is vectorised, torch's is not (1.2 against 17 us for 32,000 float32). Both take NaN as largest.
    step = len(logits) if logits.dtype == torch.float32 else _CPU_ROWS
    token_ids = np.empty(len(logits), dtype=np.int64)
    for rows in _chunks(len(logits), step):
        values = logits[rows].float().numpy()
        best_ids = values.argmax(-1)
        usable_rows = values[np.arange(len(best_ids)), best_ids] > -math.inf
        token_ids[rows] = best_ids if usable_rows.all() else np.where(usable_rows, best_ids, NO_TOKEN)
    return token_ids


def draw(logits: torch.Tensor, shaping: Shaping, uniforms: Float32Array) -> Int64Array:
    """One token a row by inverse CDF, in order of token id, over the kept set.

    The token is the first whose cumulative weight (float64) exceeds ``uniform * total``. As the uniform is below 1,
    so is the product below the total: the last kept token catches all rounding, and a token of weight 0 is never
    chosen.

    Args:
        logits: float32, bfloat16 or float16 [N, V]; float32 ones are changed.
        shaping: of the N rows; temperatures above 0.
        uniforms: float32 [N] in [0, 1).

    Returns:
        [N]; ``NO_TOKEN`` where a row holds NaN, +inf, or nothing but -inf.
    """
    device = logits.device
    points = torch.from_numpy(uniforms.astype(np.float64)).to(device).unsqueeze(-1)
    count, vocab_size = logits.shape
    step = min(count, _CPU_ROWS if device.type == "cpu" else _DEVICE_ROWS)
    token_ids = torch.empty(count, dtype=torch.int64, device=device)
    sums = torch.empty((step, vocab_size), dtype=torch.float64, device=device)
    for rows in _chunks(count, step):
        kept = weights(logits[rows], shaping.rows(rows))
        cumulative = sums[: len(kept)].copy_(kept).cumsum_(-1)
        total = cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points[rows] * total, right=True)
        token_ids[rows] = torch.where(total > 0, drawn, NO_TOKEN).squeeze(-1)  # false for NaN too
    return np.asarray(token_ids.cpu().numpy(), dtype=np.int64)


def weights(logits: torch.Tensor, shaping: Shaping) -> torch.Tensor:
    """Unnormalised probabilities of the kept tokens, 0 elsewhere: [N, V] -> float32 [N, V].

    The order is that of transformers' logits warpers: temperature, top-k, top-p (of the distribution renormalised
    after top-k), min-p. Every cut is a threshold on float32 probabilities, so tokens that tie with the last one
    kept are kept as well. ``logits`` is changed if it is float32.
    """
    probabilities = torch.softmax(logits.float().div_(_column(shaping.temperature, logits.device)), -1)
    threshold: torch.Tensor | None = None
    cut = ((shaping.top_k > 0) & (shaping.top_k < logits.shape[-1])) | (shaping.top_p < 1.0)
    if cut.any():
        threshold = _top_threshold(probabilities, np.flatnonzero(cut), shaping)
    if shaping.min_p.any():
        least = probabilities.amax(-1, keepdim=True) * _column(shaping.min_p, logits.device)
        threshold = least if threshold is None else torch.maximum(threshold, least)
    return probabilities if threshold is None else _zero_below(probabilities, threshold)


def _top_threshold(probabilities: torch.Tensor, rows: Int64Array, shaping: Shaping) -> torch.Tensor:
    """The least probability that top-k and top-p keep in each of ``rows``; 0 in other rows. Float32 [N, 1]."""
    device = probabilities.device
    vocab_size = probabilities.shape[-1]
    top_k = shaping.top_k[rows]
    top_k[top_k >= vocab_size] = 0
    top_p = shaping.top_p[rows]
    # One more than k shows whether ties with the k-th go on.
    size = min(vocab_size, max(int(top_k.max()) + 1, _TOP_P_HEAD if top_p.min() < 1.0 else 0))
    chosen = select_rows(probabilities, rows)
    ranks, mass = _column(top_k, device), _column(top_p, device)
    lowest, settled = _cut(_largest(chosen, size), ranks, mass)
    if size < vocab_size and not settled.all():
        open_rows = np.flatnonzero(~settled.cpu().numpy())
        index = torch.from_numpy(open_rows).to(device)
        whole = _largest(select_rows(chosen, open_rows), vocab_size)
        lowest[index] = _cut(whole, ranks[index], mass[index])[0]
    if len(rows) == len(probabilities):
        return lowest
    threshold = torch.zeros((len(probabilities), 1), device=device)
    threshold[torch.from_numpy(rows).to(device)] = lowest
    return threshold


def _cut(head: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The threshold that a row's largest probabilities give, and whether they suffice to know it.

    Args:
        head: float32 [N, K], the K largest probabilities, descending; K > top_k, or K = V.
        top_k: int64 [N, 1]; 0 = all. top_p: float64 [N, 1]; 1 = all.

    Returns:
        float32 [N, 1] and bool [N]. The sums of a longer head begin with the sums of this one, so a threshold
        that is settled is the one that the whole row gives, bit for bit.
    """
    running = head.double().cumsum_(-1)
    underflown = head[:, -1:] == 0
    if not top_k.any():
        crossing = torch.searchsorted(running, top_p).clamp_(max=head.shape[-1] - 1)
        return head.gather(-1, crossing), ((running[:, -1:] >= top_p) | underflown).squeeze(-1)
    limited = top_k > 0
    floor = torch.where(limited, head.gather(-1, (top_k - 1).clamp_(min=0)), 0.0)
    inside = (head >= floor).sum(-1, keepdim=True).clamp_(min=1)  # tokens that top-k keeps, ties included
    target = top_p * torch.where(limited, running.gather(-1, inside - 1), 1.0)
    crossing = torch.searchsorted(running, target).clamp_(max=head.shape[-1] - 1)
    lowest = torch.where(top_p < 1.0, head.gather(-1, crossing), floor)  # the target lies within top-k
    settled = ~limited | (inside < head.shape[-1])
    settled &= (top_p == 1.0) | (running[:, -1:] >= target)
    return lowest, (settled | underflown).squeeze(-1)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest of each row of probabilities, descending: [N, V] -> [N, count]."""
    vocab_size = values.shape[-1]
    if values.device.type != "cpu":
        return torch.topk(values, count).values
    # numpy partitions and sorts with vector instructions: 18 and 50 us for 32,000 float32; torch.sort takes 2 ms.
    # Where most values are 0 (underflow) partitioning takes 300 us and sorting 10.
    array = values.numpy()
    if count < vocab_size and 2 * np.count_nonzero(array > 0) > array.size:
        array = np.partition(array, vocab_size - count, axis=-1)[:, vocab_size - count :]
    return torch.from_numpy(np.sort(array, axis=-1)).flip(-1)[:, :count]


def _zero_below(probabilities: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """``probabilities`` [N, V], in place, with 0 for what is below the row's threshold [N, 1]; NaN stays NaN."""
    if probabilities.device.type != "cpu":
        return probabilities.mul_(probabilities >= threshold)
    array = probabilities.numpy()  # torch's product with a bool mask takes four times as long
    np.multiply(array, array >= threshold.numpy(), out=array)
    return probabilities


def select_rows(values: torch.Tensor, rows: Int64Array) -> torch.Tensor:
    """Those rows of [N, ...], by ascending indices; no copy if that is all of them."""
    return values if len(rows) == len(values) else values[torch.from_numpy(rows).to(values.device)]


def _column(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(-1)


def _chunks(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, max(step, 1)):
        yield slice(start, start + step)
