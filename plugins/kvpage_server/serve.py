"""``kvpage serve``: a model behind OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from kvpage import AsyncEngine, KvpageError, PluginRegistry
from kvpage.flags.engine import chosen_model, model_was_named
from kvpage_server.app import create_app
from kvpage_server.command_line import read_flags
from kvpage_server.http_protocol import bounded_protocol
from kvpage_server.lifecycle import serve_until_stopped
from kvpage_server.request_log import lines_go_to
from kvpage_server.server_flags import Listening, engine_keywords, listening_of, make_parser, settings_of
from kvpage_server.service import Service

LOG = logging.getLogger("kvpage.server")
TERMINATED = 128 + signal.SIGTERM


def run(arguments: list[str]) -> int:
    """The command; its exit status."""
    namespace = read_flags(make_parser(), arguments)
    settings, listening = settings_of(namespace), listening_of(namespace)
    options = engine_keywords(namespace)
    registry = PluginRegistry()
    listener = bind(listening)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if not model_was_named(namespace):
            LOG.info("no model is named: serving demo, the one that comes with kvpage")
        if listening.open_to_all and not settings.api_keys:
            LOG.warning(
                "%s is every interface and no --api-key is set: whoever reaches this machine can use the model",
                listening.host,
            )
        engine = AsyncEngine(chosen_model(namespace), plugins=registry, **options)
        try:
            service = Service(engine, settings, registry)
            config = _uvicorn_config(service, listening)
            place = address(listening, listener)

            def announce() -> None:
                print(f"kvpage serving {settings.model_names[0]} at {place}", flush=True)

            with lines_go_to(sys.stderr) if settings.log_requests else nullcontext():
                return _run_in_loop(
                    config.get_loop_factory(),
                    serve_until_stopped(
                        service,
                        config,
                        listener,
                        shutdown_timeout=listening.shutdown_timeout,
                        announce=announce,
                    ),
                )
        finally:
            engine.close()
    except OSError as error:
        raise KvpageError(f"cannot listen on {address(listening, listener)}: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
        if listening.uds is not None:
            with suppress(FileNotFoundError):
                os.unlink(listening.uds)


def bind(listening: Listening) -> socket.socket:
    """A socket at the address, before the model is loaded: a port that is taken is told at once.

    Raises:
        KvpageError: it is taken, or no address of this machine.
    """
    if listening.uds is not None:
        return _bind_unix(listening.uds)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            listening.host or None, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise KvpageError(f"--host {listening.host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise KvpageError(
            f"cannot listen on {listening.host} port {listening.port}: {error.strerror}; choose another --port, or "
            "--port 0 for any that is free"
        ) from error
    return listener


def address(listening: Listening, listener: socket.socket) -> str:
    """Where clients find the server."""
    if listening.uds is not None:
        return f"unix:{listening.uds}"
    host = f"[{listening.host}]" if ":" in listening.host else listening.host or "0.0.0.0"
    port = listening.port
    with suppress(OSError):
        port = port or listener.getsockname()[1]
    return f"{'http' if listening.certfile is None else 'https'}://{host}:{port}"


def _bind_unix(path: str) -> socket.socket:
    """A Unix socket; one that a server left behind is taken over, one that is answered is not."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.connect(path)
            raise KvpageError(f"--uds {path}: another server answers there")
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError as error:
        raise KvpageError(f"--uds {path}: {error.strerror}") from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise KvpageError(f"--uds {path}: {error.strerror}: choose another path") from error
    return listener


def _uvicorn_config(service: Service, listening: Listening) -> uvicorn.Config:
    """How uvicorn runs the application."""
    settings = service.settings
    return uvicorn.Config(
        create_app(service),
        http=bounded_protocol(settings.max_header_bytes),
        ws="none",
        lifespan="off",
        log_level=listening.log_level,
        access_log=listening.access_log,
        server_header=False,
        root_path=settings.root_path,
        timeout_graceful_shutdown=1,
        ssl_keyfile=listening.keyfile,
        ssl_certfile=listening.certfile,
        ssl_ca_certs=listening.ca_certs,
        ssl_cert_reqs=listening.cert_reqs,
    )


def _run_in_loop(
    make_loop: Callable[[], asyncio.AbstractEventLoop] | None, main: Coroutine[Any, Any, int]
) -> int:
    """``asyncio.run`` with the loop that uvicorn prefers."""
    loop = (make_loop or asyncio.new_event_loop)()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM before the server runs; process 1 of a container would otherwise not hear it at all."""
    sys.exit(TERMINATED)
