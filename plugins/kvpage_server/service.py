"""Service: what every route is given. One object a server; no route reaches anything that is not in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from kvpage import AsyncEngine, PluginRegistry
from kvpage_server.errors import ApiError
from kvpage_server.settings import ServerSettings


@dataclass(slots=True)
class Service:
    """The engine, the settings, and what the server counts itself.

    Attributes:
        created: seconds since 1970 at which the server started; "created" of its models.
        draining: takes no more requests.
        load: requests being answered now.
    """

    engine: AsyncEngine
    settings: ServerSettings
    registry: PluginRegistry
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    load: int = 0

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
            f"The model `{asked}` does not exist; served here: {', '.join(names)}.",
            kind="NotFoundError",
            param="model",
        )
