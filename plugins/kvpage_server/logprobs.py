"""Log-probabilities in the three shapes that clients read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvpage import Logprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Position = Mapping[int, Logprob]


class TokenTexts(Protocol):
    """What is needed of a tokenizer."""

    @property
    def all_special_ids(self) -> frozenset[int]:
        """Tokens that are left out of texts."""

    def token_text(self, token_id: int) -> str:
        """Text that a token adds."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """UTF-8 bytes that a token adds."""


class CompletionLogprobs:
    """The four lists of /v1/completions. One object a choice: offsets go on from chunk to chunk.

    Offsets count characters of the answer's text, in which special tokens do not stand.

    Args:
        tokenizer: for tokens whose text the engine did not report.
        as_ids: write tokens as "token_id:123".
    """

    def __init__(self, tokenizer: TokenTexts | None, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._hidden = frozenset[int]() if tokenizer is None else tokenizer.all_special_ids
        self._offset = 0

    def block(self, ids: Sequence[int], positions: Sequence[Position | None]) -> dict[str, Any]:
        """The lists for some tokens; a position is ``None`` where there is nothing to report (the first token)."""
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, position in zip(ids, positions, strict=True):
            own = None if position is None else position.get(token_id)
            text = self._text(token_id, own)
            tokens.append(text)
            chosen.append(None if own is None else finite(own.logprob))
            top.append(None if position is None else self._candidates(position))
            offsets.append(self._offset)
            self._offset += 0 if token_id in self._hidden else len(text)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}

    def _candidates(self, position: Position) -> dict[str, float]:
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        found: dict[str, float] = {}
        for token_id, value in ranked:
            found.setdefault(self._text(token_id, value), finite(value.logprob))
        return found

    def _text(self, token_id: int, value: Logprob | None) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        if value is None or value.decoded_token is None:
            return self._tokenizer.token_text(token_id)
        return value.decoded_token


def chat_logprobs(
    ids: Sequence[int],
    positions: Sequence[Position],
    top: int,
    tokenizer: TokenTexts | None,
    *,
    as_ids: bool,
) -> list[dict[str, Any]]:
    """``logprobs.content`` of chat answers: the chosen token and the ``top`` likeliest of each position."""

    def entry(token_id: int, value: Logprob) -> dict[str, Any]:
        text = value.decoded_token
        data = None if tokenizer is None else tokenizer.token_bytes(token_id)
        if data is None and text is not None:
            data = text.encode()
        return {
            "token": f"token_id:{token_id}" if as_ids or text is None else text,
            "logprob": finite(value.logprob),
            "bytes": None if data is None else list(data),
        }

    content = []
    for token_id, position in zip(ids, positions, strict=True):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        candidates = [entry(other, value) for other, value in ranked[:top]]
        content.append({**entry(token_id, position[token_id]), "top_logprobs": candidates})
    return content


def prompt_logprobs(positions: Sequence[Position | None] | None) -> list[dict[str, Any] | None] | None:
    """``prompt_logprobs``: token id -> value, by position."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": finite(value.logprob),
                "rank": value.rank,
                "decoded_token": value.decoded_token,
            }
            for token_id, value in sorted(position.items(), key=lambda item: item[1].rank)
        }
        for position in positions
    ]


def finite(logprob: float) -> float:
    """A value that JSON can hold."""
    return logprob if logprob > LOWEST else LOWEST
