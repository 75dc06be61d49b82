"""API keys. Compared as digests in constant time, every key each time, so that timing tells nothing."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from kvpage_server.errors import ApiError
from kvpage_server.page import FILES as PAGE_FILES

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", *PAGE_FILES})
"""Answered without a key. Matched whole and exactly: whatever else a path looks like, it is guarded."""


class Keys:
    """The keys that open the guarded routes; none = everything is open."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, path: str, method: str, authorization: str | None) -> None:
        """Raises ApiError 401 where a key is needed and not there. OPTIONS carries none by the CORS protocol.

        ``authorization``: the header's bytes, read as latin-1.
        """
        if not self._digests or path in OPEN_PATHS or method == "OPTIONS":
            return
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() == "bearer" and self._known(key.strip()):
            return
        raise ApiError(
            401,
            "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'",
            kind="AuthenticationError",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _known(self, key: str) -> bool:
        given = _digest(key.encode("latin-1"))  # the bytes as they came
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
