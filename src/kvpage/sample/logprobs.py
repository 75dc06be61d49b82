"""Log-probabilities of chosen and top tokens, from the model's raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvpage.outputs import Logprob, PositionLogprobs

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_ROWS = 64  # positions worked on at once, so that a long prompt needs no float32 copy of all its logits


def raw_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Natural-log probabilities, a new float32 tensor: [N, V] -> [N, V]."""
    return torch.log_softmax(logits.float(), -1)


def position_logprobs(
    logprobs: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int],
) -> list[PositionLogprobs]:
    """One mapping a row: the chosen token first, then the top tokens, likeliest first.

    Equal log-probabilities have equal ranks: a rank is 1 + the number of tokens strictly more likely.

    Args:
        logprobs: float32 [N, V].
        token_ids: the chosen token of each row.
        counts: how many top tokens each row reports; 0 = none, -1 = all.
    """
    vocab_size = logprobs.shape[-1]
    chosen = torch.tensor(token_ids, device=logprobs.device).unsqueeze(-1)
    chosen_values = logprobs.gather(-1, chosen)
    chosen_ranks = (torch.count_nonzero(logprobs > chosen_values, dim=-1) + 1).tolist()
    mappings: list[PositionLogprobs] = [
        {token: Logprob(value, rank)}
        for token, value, rank in zip(token_ids, chosen_values.squeeze(-1).tolist(), chosen_ranks, strict=True)
    ]
    sizes = np.array([vocab_size if count < 0 else min(count, vocab_size) for count in counts])
    # Rows of one size together: what a row reports must not depend on what other rows ask for.
    for size in np.unique(sizes[sizes > 0]).tolist():
        rows = np.flatnonzero(sizes == size).tolist()
        values, ids = _top(logprobs[rows], size)
        for row, row_values, row_ids, row_ranks in zip(
            rows, values.tolist(), ids.tolist(), _ranks(values), strict=True,
        ):
            top = dict(zip(row_ids, map(Logprob, row_values, row_ranks), strict=True))
            mappings[row] = {**mappings[row], **top}
    return mappings


def prompt_position_logprobs(logits: torch.Tensor, token_ids: Sequence[int], count: int) -> list[PositionLogprobs]:
    """``position_logprobs`` of M prompt positions from raw logits [M, V]; ``token_ids``: the token after each."""
    mappings: list[PositionLogprobs] = []
    for start in range(0, len(token_ids), _ROWS):
        rows = slice(start, start + _ROWS)
        chosen = token_ids[rows]
        mappings += position_logprobs(raw_logprobs(logits[rows]), chosen, [count] * len(chosen))
    return mappings


def _top(logprobs: torch.Tensor, size: int) -> tuple[Float32Array, Int64Array]:
    """The ``size`` largest of each row, descending, and their ids: [N, V] -> [N, size], [N, size].

    On the CPU the lower id goes first where two are equal; other devices may take either.
    """
    if logprobs.device.type != "cpu":
        top = torch.topk(logprobs, size)
        return top.values.cpu().numpy(), top.indices.cpu().numpy()
    array = logprobs.numpy()
    place = array.shape[-1] - size
    least = np.partition(array, place, axis=-1)[:, place]
    ids = np.empty((len(array), size), dtype=np.int64)
    for row, limit, row_ids in zip(array, least, ids, strict=True):
        # NaN compares false: a row that holds any gives its first tokens.
        candidates = np.flatnonzero(row >= limit) if limit == limit else np.arange(size)
        row_ids[:] = candidates[np.argsort(-row[candidates], kind="stable")[:size]]
    return np.take_along_axis(array, ids, axis=-1), ids


def _ranks(values: Float32Array) -> list[list[int]]:
    """Ranks of descending values [N, K]; equal values share the first one's."""
    places = np.broadcast_to(np.arange(1, values.shape[-1] + 1), values.shape).copy()
    places[:, 1:][values[:, 1:] == values[:, :-1]] = 0
    ranks: list[list[int]] = np.maximum.accumulate(places, axis=-1).tolist()
    return ranks
