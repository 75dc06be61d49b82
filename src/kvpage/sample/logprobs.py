"""Log-probabilities of chosen and top tokens, from the model's raw logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvpage.outputs import Logprob, PositionLogprobs

_ROWS = 8  # rows worked on at once: temporaries stay in cache, and a long prompt needs no float32 copy of its logits


def raw_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Natural-log probabilities, a new float32 tensor: [N, V] -> [N, V]."""
    return torch.log_softmax(logits.float(), -1)


def position_logprobs(
    logprobs: torch.Tensor,
    token_ids: Sequence[int],
    counts: Sequence[int],
) -> list[PositionLogprobs]:
    """One mapping a row: the chosen token first, then the top tokens, likeliest first.

    Equal log-probabilities have equal ranks: a rank is 1 + the number of tokens strictly more likely.

    Args:
        logprobs: float32 [N, V].
        token_ids: the chosen token of each row.
        counts: how many top tokens each row reports; 0 = none, -1 = all.
    """
    mappings: list[PositionLogprobs] = []
    for start in range(0, len(token_ids), _ROWS):
        rows = slice(start, start + _ROWS)
        mappings += _few_position_logprobs(logprobs[rows], token_ids[rows], counts[rows])
    return mappings


def prompt_position_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], count: int
) -> list[PositionLogprobs]:
    """``position_logprobs`` of M prompt positions from raw logits [M, V]; ``token_ids``: the token after each."""
    mappings: list[PositionLogprobs] = []
    for start in range(0, len(token_ids), _ROWS):
        rows = slice(start, start + _ROWS)
        chosen = token_ids[rows]
        mappings += _few_position_logprobs(raw_logprobs(logits[rows]), chosen, [count] * len(chosen))
    return mappings


def _few_position_logprobs(
    logprobs: torch.Tensor,
    token_ids: Sequence[int],
    counts: Sequence[int],
) -> list[PositionLogprobs]:
    vocab_size = logprobs.shape[-1]
    chosen = torch.tensor(token_ids, device=logprobs.device).unsqueeze(-1)
    chosen_values = logprobs.gather(-1, chosen)
    chosen_ranks = (torch.count_nonzero(logprobs > chosen_values, dim=-1) + 1).tolist()
    mappings: list[PositionLogprobs] = [
        {token: Logprob(value, rank)}
        for token, value, rank in zip(
            token_ids, chosen_values.squeeze(-1).tolist(), chosen_ranks, strict=True
        )
    ]
    sizes = np.array([vocab_size if count < 0 else min(count, vocab_size) for count in counts])
    # Rows of one size together: which of two equal tokens topk takes must not depend on what other rows ask for.
    for size in np.unique(sizes[sizes > 0]).tolist():
        rows = np.flatnonzero(sizes == size).tolist()
        values, ids = torch.topk(logprobs if len(rows) == len(logprobs) else logprobs[rows], size)
        for row, row_values, row_ids, row_ranks in zip(
            rows,
            values.tolist(),
            ids.tolist(),
            _ranks(values),
            strict=True,
        ):
            mappings[row] = {
                **mappings[row],
                **dict(zip(row_ids, map(Logprob, row_values, row_ranks), strict=True)),
            }
    return mappings


def _ranks(values: torch.Tensor) -> list[list[int]]:
    """Ranks of descending values [N, K]; equal values share the first one's."""
    array = values.cpu().numpy()
    places = np.broadcast_to(np.arange(1, array.shape[-1] + 1), array.shape).copy()
    places[:, 1:][array[:, 1:] == array[:, :-1]] = 0
    ranks: list[list[int]] = np.maximum.accumulate(places, axis=-1).tolist()
    return ranks
