"""The hook that this plugin adds: routes of other plugins."""

from __future__ import annotations

from dataclasses import dataclass

from kvpage.api.records import Record


@dataclass(frozen=True, kw_only=True)
class ServerRoutesRecord(Record):
    """``factory`` names a function (Service) -> fastapi.APIRouter; its routes are served where ``--enable-routes
    NAME`` asks for them, behind the same key as ``/v1``."""

    summary: str = ""
