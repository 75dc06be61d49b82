"""Kept for programs written against vLLM, which import ``random_uuid`` from here."""

from __future__ import annotations

import uuid


def random_uuid() -> str:
    """32 random hexadecimal digits: a request id."""
    return uuid.uuid4().hex
