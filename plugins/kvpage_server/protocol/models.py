"""/v1/models, and what the small endpoints answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One name that the model is served under."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[dict[str, Any]]


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Version(BaseModel):
    """The answer to GET /version."""

    version: str


class Load(BaseModel):
    """The answer to GET /load: requests being answered now."""

    server_load: int
