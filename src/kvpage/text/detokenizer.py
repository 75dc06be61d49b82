"""Token ids to text as they come: what a push returns is never taken back and never ends in half a code point."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Protocol

from kvpage.text.pieces import ByteLevelPieces, LocalPieces, PieceTable
from kvpage.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_HELD_BYTES = 64
"""Longest run of byte tokens that is held back while it is valid UTF-8; see ``_LocalText``."""


class Detokenizer:
    """The text of one choice, built up token by token.

    All pushes and the flush together give what ``tokenizer.decode`` adds to the prompt's text when the output's
    ids are appended to the prompt's. A code point that the prompt began and the output completes is the output's.
    The one exception is in ``_LocalText``. Not thread-safe; one object a choice.

    Args:
        tokenizer: whose ids these are.
        prompt_ids: what comes before the output; decides about the space before the first word and completes
            code points. Only a few ids at both ends are read.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: as in transformers' ``decode``; only slow tokenizers heed it.
    """

    __slots__ = ("_text",)

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        pieces = tokenizer.pieces(skip_special_tokens=skip_special_tokens)
        self._text: _Text
        if isinstance(pieces, ByteLevelPieces):
            self._text = _ByteLevelText(pieces, prompt_ids)
        elif isinstance(pieces, LocalPieces):
            self._text = _LocalText(pieces, prompt_ids)
        else:

            def decode(ids: Sequence[int]) -> str:
                return tokenizer.decode(
                    ids,
                    skip_special_tokens=skip_special_tokens,
                    spaces_between_special_tokens=spaces_between_special_tokens,
                )

            self._text = _WindowText(decode, prompt_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; may be empty, and may belong to earlier tokens."""
        return self._text.push(token_ids)

    def flush(self) -> str:
        """What is still held back, once no more tokens come; bytes that are no code point become U+FFFD."""
        return self._text.flush()


class _Text(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class _ByteLevelText:
    """The UTF-8 reading of the tokens' bytes. ``_held``: an incomplete code point, at most 3 bytes."""

    __slots__ = ("_held", "_pieces", "_prompt_shows_replacement")

    def __init__(self, pieces: PieceTable, prompt_ids: Sequence[int]) -> None:
        self._pieces = pieces
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = _as_bytes(pieces[token_id]) + tail
            if len(tail) >= 3:
                break
        _, used = utf_8_decode(tail, "replace", False)
        self._held = tail[used:]
        # decode(prompt) already ends in one U+FFFD for these bytes, so the output must not repeat it.
        self._prompt_shows_replacement = bool(self._held)

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        if not self._held and len(token_ids) == 1:
            piece = pieces[token_ids[0]]
            if type(piece) is str:
                return piece
        data = self._held + b"".join([_as_bytes(pieces[token_id]) for token_id in token_ids])
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return self._without_repeat(text) if text else ""

    def flush(self) -> str:
        text = self._held.decode("utf-8", "replace")
        self._held = b""
        return self._without_repeat(text)

    def _without_repeat(self, text: str) -> str:
        if self._prompt_shows_replacement:
            self._prompt_shows_replacement = False
            return text.removeprefix(REPLACEMENT)
        return text


class _LocalText:
    """Token-local text with runs of byte tokens.

    ``_run`` is the current run as long as it may still become valid UTF-8: whether it reads as text or as one U+FFFD
    for each byte is known only when it ends, so it is held back until then. A run that cannot become valid any more
    (``_broken``) gives U+FFFD at once. Past MAX_HELD_BYTES what is whole is given out, so that a text made of
    nothing but byte tokens still streams; should such a run break later, ``decode`` would also have turned the
    part given out into U+FFFD. ``_prompt_bytes`` of the run belong to the prompt.
    """

    __slots__ = ("_broken", "_first", "_pieces", "_prompt_bytes", "_run", "_strip", "_strip_character")

    def __init__(self, pieces: LocalPieces, prompt_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._run = b""
        self._broken = False
        self._first = True
        self._prompt_bytes = 0
        self._strip_character, self._strip = pieces.strip
        self._read_prompt(prompt_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not (self._first or self._run or self._broken or self._strip):
            piece = self._pieces[token_ids[0]]
            if type(piece) is str:
                return piece
        return "".join([self._add(token_id) for token_id in token_ids])

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _read_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Bring the state to the end of the prompt: its opening decides ``_first`` and ``_strip``, its end the run."""
        settled = 0
        while settled < len(prompt_ids) and (self._first or self._strip):
            self._add(prompt_ids[settled])
            settled += 1
        tail = len(prompt_ids)
        while tail > settled and not isinstance(self._pieces[prompt_ids[tail - 1]], str):
            tail -= 1
        if tail > settled:
            self._end_run()
        for token_id in prompt_ids[tail:]:
            self._add(token_id)
        # Whole code points of a valid run cannot change what follows; what is left is an incomplete one.
        _, used = utf_8_decode(self._run, "strict", False)
        self._run = self._run[used:]
        self._prompt_bytes = len(self._run)

    def _add(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            self._first = False
            return self._stripped(self._add_byte(piece))
        if self._first:
            self._first = False
            piece = self._pieces.first(token_id)
        return self._stripped(self._end_run() + piece)

    def _add_byte(self, byte: bytes) -> str:
        if self._broken:
            return REPLACEMENT
        self._run += byte
        try:
            text, used = utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            own = len(self._run) - self._prompt_bytes
            self._run, self._prompt_bytes, self._broken = b"", 0, True
            return REPLACEMENT * own
        if used < MAX_HELD_BYTES:
            return ""
        self._run, self._prompt_bytes = self._run[used:], 0
        return text

    def _end_run(self) -> str:
        run, own = self._run, len(self._run) - self._prompt_bytes
        self._run, self._prompt_bytes, self._broken = b"", 0, False
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * own

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._strip_character:
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _WindowText:
    """Any other tokenizer: decode a window of tokens again with each push and give out what it gained.

    The window opens with the tokens whose text was given out last, so that the decoder sees a neighbour on the left
    (vLLM's prefix offset and read offset). Text that ends in U+FFFD waits: it may be half a code point.
    """

    __slots__ = ("_decode", "_given", "_ids", "_num_given")

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        length = min(8, len(prompt_ids))
        while length < len(prompt_ids) and not decode(prompt_ids[-length:]):
            length = min(2 * length, len(prompt_ids))
        self._ids = list(prompt_ids[len(prompt_ids) - length :])
        self._num_given = length
        self._given = decode(self._ids) if length else ""

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(token_ids)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        gained = self._gained(text)
        if gained:
            del self._ids[: self._num_given]
            self._num_given = len(self._ids)
            self._given = self._decode(self._ids)
        return gained

    def flush(self) -> str:
        text = self._decode(self._ids)
        gained = self._gained(text)
        self._given, self._num_given = text, len(self._ids)
        return gained

    def _gained(self, text: str) -> str:
        return text[len(commonprefix([self._given, text])) :]


def _as_bytes(piece: str | bytes | None) -> bytes:
    if isinstance(piece, bytes):
        return piece
    return piece.encode() if piece else b""
