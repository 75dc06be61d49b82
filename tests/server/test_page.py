"""The page's files: who may have them, under which policy, and that people can read what they show."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kvpage import AsyncEngine, PluginRegistry
from kvpage_server.app import create_app
from kvpage_server.page import FILES
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings

PAGE = Path(__file__).resolve().parents[2] / "plugins" / "kvpage_server" / "page"


class Asker:
    """ask(path, method, headers=..., **settings) -> the answer of a server with these settings."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._apps: dict[str, FastAPI] = {}

    def __call__(
        self, path: str, method: str = "GET", *, headers: dict[str, str] | None = None, **settings: Any
    ) -> httpx.Response:
        name = repr(settings)
        if name not in self._apps:
            service = Service(
                self._engine, ServerSettings(model_names=("tiny",), **settings), PluginRegistry()
            )
            self._apps[name] = create_app(service)

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self._apps[name])
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(run())


@pytest.fixture(scope="module")
def ask(engine: AsyncEngine) -> Asker:
    return Asker(engine)


@pytest.mark.parametrize("path", FILES)
def test_the_files_are_had_without_a_key_under_a_strict_policy(ask: Asker, path: str) -> None:
    answer = ask(path, api_keys=("sk-1",))
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == FILES[path][1].split(";")[0]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"


def test_who_has_a_file_is_told_so_and_sent_nothing(ask: Asker) -> None:
    first = ask("/page/page.js")
    again = ask("/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert ask("/", "HEAD").status_code == 200


@pytest.mark.parametrize(("keys", "mark"), [((), "none"), (("sk-1",), "needed")])
def test_the_page_knows_whether_to_ask_for_a_key(ask: Asker, keys: tuple[str, ...], mark: str) -> None:
    text = ask("/", api_keys=keys).text
    assert re.findall(r'name="kvpage-key" content="(\w+)"', text) == [mark]
    assert "sk-1" not in text


@pytest.mark.parametrize("path", [*FILES, "/kvpage/blocks", "/kvpage/plan"])
def test_a_server_without_the_page_has_nothing_of_it(ask: Asker, path: str) -> None:
    assert ask(path, enable_page=False).status_code == 404


@pytest.mark.parametrize("path", ["/page/", "/page/../auth.py", "/page/%2e%2e/auth.py", "/page/__init__.py"])
def test_no_other_file_can_be_had(ask: Asker, path: str) -> None:
    assert ask(path).status_code == 404


def test_every_file_of_the_page_is_served_and_no_address_leads_elsewhere() -> None:
    shown = {path.name for path in PAGE.iterdir() if path.suffix in {".html", ".css", ".js", ".svg"}}
    assert shown == {name for name, _ in FILES.values()}
    for path in PAGE.iterdir():
        if path.name in shown:
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert re.findall(r"(?:https?:)?//[\w.-]+\.\w", text) == [], path.name
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    linked = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert {f"/{address}" for address in linked} <= set(FILES)
    assert re.findall(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", html) == []


def test_nothing_writes_markup_into_the_document() -> None:
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    scripts = [path for path in PAGE.iterdir() if path.suffix == ".js"]
    assert [path.name for path in scripts if re.search(sinks, path.read_text(encoding="utf-8"))] == []


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb"."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: int) -> None:
    css = (PAGE / "page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    pairs = [(text, ground) for text in ("text", "soft", "accent", "error") for ground in ("card", "page")]
    for text, ground in [*pairs, ("on-accent", "accent")]:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
