"""Service: what every route is given. One object a server; no route reaches anything that is not in it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Protocol

from kvpage import AsyncEngine, PluginRegistry, __version__
from kvpage_server.errors import ApiError
from kvpage_server.http_counts import HttpCounts
from kvpage_server.settings import ServerSettings


class Cancellable(Protocol):
    """A request in the engine."""

    def cancel(self) -> None:
        """End it; nothing where it has ended."""


@dataclass(slots=True)
class Service:
    """The engine, the settings, and what the server counts itself.

    Attributes:
        created: seconds since 1970 at which the server started; "created" of its models.
        draining: takes no more requests.
        load: requests being answered now.
        open: requests in the engine, to be cancelled where the server must end.
        http: what was asked by HTTP and how it was answered.
    """

    engine: AsyncEngine
    settings: ServerSettings
    registry: PluginRegistry
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    load: int = 0
    open: set[Cancellable] = field(default_factory=set)
    http: HttpCounts = field(default_factory=HttpCounts)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        what = f"{self.settings.model_path} {self.engine.config.dtype} {self.max_model_len}"
        self.fingerprint = f"kvpage-{__version__}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt included."""
        return int(self.engine.config.max_model_len)

    def cancel_all(self) -> None:
        """End every request that is in the engine."""
        for request in list(self.open):
            request.cancel()

    def model_name(self, asked: str | None) -> str:
        """The name to answer with.

        Raises:
            ApiError: 404, the model is not served here.
        """
        names = self.settings.model_names
        if not asked:
            return names[0]
        if asked in names:
            return asked
        raise ApiError(
            404,
            f"The model `{asked[:200]}` does not exist; served here: {', '.join(names)}.",
            kind="NotFoundError",
            param="model",
        )
