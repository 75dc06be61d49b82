"""What each token id adds to running text, worked out once a token and shared by every detokenizer.

The decoders of `tokenizers` work on whole sequences. The two kinds that language models use can be taken apart:
byte-level ones, where the text is the UTF-8 reading of the tokens' bytes put end to end, and token-local ones
(Metaspace, Replace, WordPiece, none), where a token's text depends on nothing but whether it is the first, with
runs of byte tokens in between where there is byte fallback (Llama 2, Gemma, Mistral).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeAlias

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Decoder

Piece: TypeAlias = str | bytes | None
"""str: whole code points. bytes: part of one, so its neighbours decide. None: not in the text at all (a special
token that is skipped, an id without a token)."""

LOCAL_STAGES = frozenset({"Replace", "Metaspace", "WordPiece"})
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceTable(ABC, dict[int, Piece]):
    """Token id -> piece, filled as ids turn up. Filling is idempotent, so threads may share a table.

    Args:
        backend: where the tokens come from.
        skipped: texts of the tokens that are left out, as ``skip_special_tokens`` asks.
    """

    def __init__(self, backend: Backend, skipped: frozenset[str]) -> None:
        super().__init__()
        self._backend = backend
        self._skipped = skipped

    def __missing__(self, token_id: int) -> Piece:
        token = self._backend.id_to_token(token_id)
        piece = None if token is None or token in self._skipped else self._read(token)
        self[token_id] = piece
        return piece

    @abstractmethod
    def _read(self, token: str) -> Piece:
        """The piece of a token that is part of the text."""


class ByteLevelPieces(PieceTable):
    """Pieces of a byte-level tokenizer (GPT-2, Llama 3, Qwen): the text is the UTF-8 reading of all bytes.

    Every character of a token stands for one byte (GPT-2's table); a token with any other character, such as an
    added one, stands for its own UTF-8 bytes.
    """

    def _read(self, token: str) -> Piece:
        if token.isascii():  # stands for itself either way
            return token
        try:
            data = bytes(map(BYTE_OF_CHARACTER.__getitem__, token))
        except KeyError:
            return token
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data


class LocalPieces(PieceTable):
    """Pieces of a tokenizer whose tokens' texts depend only on whether they come first.

    A ``bytes`` piece is one byte of a run; a run that is valid UTF-8 as a whole is its text, one that is not is
    U+FFFD for every byte (`tokenizers`' ByteFallback).

    Args:
        local: the decoder's token-local stages; ``None`` for a tokenizer without a decoder, which puts a space
            between tokens.
        byte_fallback: ``<0x41>`` is a byte.
        strip: a character, and how many of it at most are taken off the start of the whole text.
    """

    def __init__(
        self,
        backend: Backend,
        skipped: frozenset[str],
        *,
        local: Decoder | None,
        byte_fallback: bool = False,
        strip: tuple[str, int] = ("", 0),
    ) -> None:
        super().__init__(backend, skipped)
        self._local = local
        self._byte_fallback = byte_fallback
        self._anchor_length = 0 if local is None else len(local.decode(["a"]))
        self.strip = strip

    def first(self, token_id: int) -> str:
        """The text of a token that opens the whole text and is not a byte."""
        token = self._backend.id_to_token(token_id) or ""
        return token if self._local is None else str(self._local.decode([token]))

    def _read(self, token: str) -> Piece:
        if self._local is None:
            return " " + token
        text = str(self._local.decode(["a", token]))[self._anchor_length :]
        byte = BYTE_TOKEN.fullmatch(text) if self._byte_fallback else None
        return text if byte is None else bytes([int(byte[1], 16)])


def read_pieces(backend: Backend, skipped: frozenset[str]) -> PieceTable | None:
    """The table for a tokenizer, or ``None`` if its decoder cannot be taken apart into pieces.

    Args:
        backend: a tokenizer; read, never changed.
        skipped: texts of the tokens to leave out.
    """
    if backend.decoder is None:
        return LocalPieces(backend, skipped, local=None)
    stages = list(_stages(json.loads(backend.decoder.__getstate__())))
    if [stage["type"] for stage in stages if stage["type"] != "Fuse"] == ["ByteLevel"]:
        return ByteLevelPieces(backend, skipped)
    local: list[dict[str, Any]] = []
    while stages and stages[0]["type"] in LOCAL_STAGES:
        local.append(stages.pop(0))
    byte_fallback = bool(stages) and stages[0]["type"] == "ByteFallback"
    if byte_fallback:
        stages.pop(0)
    fused = bool(stages) and stages[0]["type"] == "Fuse"
    if fused:
        stages.pop(0)
    strip = ("", 0)
    if fused and stages and stages[0]["type"] == "Strip" and stages[0]["stop"] == 0:
        strip = (stages[0]["content"], stages[0]["start"])
        stages.pop(0)
    if stages or not (local or byte_fallback or fused):
        return None
    return LocalPieces(backend, skipped, local=_decoder(local), byte_fallback=byte_fallback, strip=strip)


def _stages(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The decoder's stages in order, nested sequences flattened."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for stage in decoder["decoders"]:
        yield from _stages(stage)


def _decoder(stages: list[dict[str, Any]]) -> Decoder:
    """A decoder of these stages alone (an empty list is the identity)."""
    empty = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Sequence", "decoders": stages},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    decoder: Decoder = Backend.from_str(json.dumps(empty)).decoder
    return decoder


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table backwards: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


BYTE_OF_CHARACTER = _byte_of_character()
