"""Request bodies: JSON as it should be, then a model; whatever is wrong is a 400 that says where."""

from __future__ import annotations

import asyncio
import json
import reprlib
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from kvpage_server.errors import ApiError
from kvpage_server.protocol.base import ErrorBody

BodyT = TypeVar("BodyT", bound=BaseModel)
MAX_ERRORS = 10
MAX_DEPTH = 100
IN_A_THREAD = 32 * 1024
"""Bytes of body from which on parsing and tokenizing would hold up other streams."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


def documented(body: type[BaseModel], answer: type[BaseModel], *, streams: bool = False) -> dict[str, Any]:
    """Keywords of a route that reads its body itself, for the OpenAPI document."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    request_body = {"required": True, "content": {"application/json": {"schema": schema}}}
    content: dict[str, Any] = (
        {"text/event-stream": {}} if streams else {}
    )  # events, of which a schema cannot tell
    return {
        "openapi_extra": {"requestBody": request_body},
        "responses": {200: {"model": answer, "content": content}, **ERRORS},
    }


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 405, 413, 429, 500, 501, 503)
}


async def read_body(request: Request, body: type[BodyT]) -> BodyT:
    """The body of a request.

    Raises:
        ApiError: 400, it is no JSON object of that shape; 413 where it is too large.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise _bad(f"the body must be JSON, and Content-Type says {kind:.100}: send application/json")
    raw = await request.body()
    if len(raw) > IN_A_THREAD:
        return await asyncio.to_thread(parse_body, raw, body)
    return parse_body(raw, body)


def parse_body(raw: bytes, body: type[BodyT]) -> BodyT:
    """``raw`` as an object of ``body``; ApiError as ``read_body``."""
    value = _parse(raw)
    if not isinstance(value, dict):
        raise _bad(f"the body must be a JSON object, got {_SHORT.repr(value)}")
    _check_depth(raw, value)
    try:
        return body.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from None


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), parse_constant=_no_number, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise _bad(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _bad("the body is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise _bad("the body holds a number that is too long") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of one body must not see different values, so a name may stand there once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _bad(f"the body names {twice[:100]!r} twice in one object")
    return found


def _check_depth(raw: bytes, value: Any) -> None:
    """Raises ApiError for what is so deep that code which walks through it would run out of stack."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _bad(f"the body is nested more than {MAX_DEPTH} levels deep")


def _no_number(text: str) -> NoReturn:
    raise _bad(f"the body holds {text}, which is no JSON number")


def _invalid(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    lines = []
    for entry in found[:MAX_ERRORS]:
        lines.append(f"{_place(entry['loc'])}: {entry['msg']}" + _shown(entry["type"], entry["input"]))
    more = f"; and {len(found) - MAX_ERRORS} more" if len(found) > MAX_ERRORS else ""
    return _bad(f"{len(found)} validation error(s): " + "; ".join(lines) + more, _place(found[0]["loc"]))


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(["body", *(str(part)[:100] for part in location[:8])])


def _shown(kind: str, value: object) -> str:
    return "" if kind == "missing" else f", got {_SHORT.repr(value)[:200]}"


def _bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, kind="Bad Request", param=param)
