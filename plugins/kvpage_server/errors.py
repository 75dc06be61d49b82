"""Errors as OpenAI's clients expect them: one object, for whatever went wrong."""

from __future__ import annotations

from typing import Any

from kvpage import EngineDeadError, KvpageError, QueueFullError, RequestError, TooLongError


class ApiError(Exception):
    """An error that is answered: ``status`` is HTTP's, the rest fills the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "BadRequestError",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}; code is the status."""
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        }


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param)


def not_implemented(message: str, param: str | None = None) -> ApiError:
    """501: known, and not something this server does (yet)."""
    return ApiError(501, message, kind="NotImplementedError", param=param)


def shutting_down() -> ApiError:
    """503: the server takes no more requests, or ended this one."""
    return ApiError(
        503, "the server is shutting down", kind="ServiceUnavailableError", headers={"Retry-After": "1"}
    )


def from_engine(error: KvpageError, *, overload_status: int = 503) -> ApiError:
    """What the engine raised, as an answer."""
    if isinstance(error, QueueFullError):
        kind = "RateLimitError" if overload_status == 429 else "ServiceUnavailableError"
        return ApiError(overload_status, str(error), kind=kind, headers={"Retry-After": "1"})
    if isinstance(error, TooLongError) and error.param == "prompt":
        return bad_request(str(error), "input_tokens")
    if isinstance(error, RequestError):
        return bad_request(str(error), error.param)
    if isinstance(error, EngineDeadError):
        return ApiError(500, "the engine has stopped; the server's log says why", kind="EngineDeadError")
    return ApiError(500, "the request failed; the server's log says why", kind="InternalServerError")
