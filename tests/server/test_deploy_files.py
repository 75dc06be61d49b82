"""What is under docker/: files that fit each other and the code, and programs that do what they say. No Docker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvpage import AsyncEngine, PluginRegistry
from kvpage.cli.main import COMMANDS
from kvpage_server.app import create_app
from kvpage_server.plugin import kvpage_cli_commands
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
METRIC = r"((?:kvpage:|http_|process_)\w+)"


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined."""
    lines = [
        line
        for line in (DOCKER / name).read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    pairs = [line.split(None, 1) for line in whole]
    return [(word.upper(), rest) for word, rest in pairs]


def last_stage(name: str) -> list[tuple[str, str]]:
    steps = instructions(name)
    start = max(index for index, (word, _) in enumerate(steps) if word == "FROM")
    return steps[start:]


# ---- the images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_nobody_special_and_says_how_it_is(name: str) -> None:
    final = dict(last_stage(name))
    user, _, group = final["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert json.loads(final["ENTRYPOINT"]) == ["entrypoint"]
    assert json.loads(final["HEALTHCHECK"].partition("CMD ")[2]) == ["healthcheck"]
    assert final["EXPOSE"] == "8000"
    assert "CMD" not in final, "without arguments the entry point serves the bundled model"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_stage_builds_nothing_and_takes_the_environment_that_was_built(name: str) -> None:
    final = last_stage(name)
    assert ("COPY", "--from=build /opt/kvpage /opt/kvpage") in final
    assert not any("pip" in rest for word, rest in final if word == "RUN")
    assert len([word for word, _ in instructions(name) if word == "FROM"]) == 2


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_exists_and_reaches_the_builder(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    copied = [
        rest.split()[:-1] for word, rest in instructions(name) if word == "COPY" and "--from" not in rest
    ]
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists(), path
        assert f"!{path}" in ignored, path


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_installs_pinned_versions_and_extras_that_exist(name: str) -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions(name) if word == "ARG" and "=" in rest)
    extras = arguments["EXTRAS"].strip('"').split(",")
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(extras) <= set(declared)
    installs = re.findall(
        r"pip install (.*?)(?:;|$)", "\n".join(rest for _, rest in instructions(name)), re.M
    )
    assert installs
    assert all("constraints.txt" in install for install in installs)
    assert arguments["TORCH_INDEX"] == '""', "an index is the builder's choice"


# ---- the programs in it ------------------------------------------------------------------------------------------


@pytest.fixture
def enter(tmp_path: Path) -> Any:
    """enter(*arguments, **environment) -> (arguments that kvpage was run with, its KVPAGE_HOST)."""
    stub = tmp_path / "kvpage"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$KVPAGE_HOST" "$@"\n', encoding="utf-8")
    stub.chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[list[str], str]:
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        done = subprocess.run(
            [DOCKER / "entrypoint", *arguments], env={"PATH": path, **environment}, capture_output=True, text=True,
            check=True, timeout=20,
        )  # fmt: skip
        host, *given = done.stdout.split("\0")[:-1]
        return given, host

    return run


@pytest.mark.parametrize(
    "arguments",
    [[], ["--model", "a/b"], ["a/b", "--max-model-len", "4k"], ["--help"], ["--api-key", "two words"]],
)
def test_bare_flags_are_those_of_serve(enter: Any, arguments: list[str]) -> None:
    assert enter(*arguments)[0] == ["serve", *arguments]


@pytest.mark.parametrize(
    "command", sorted({"serve", *(c.name for c in COMMANDS), *(c.name for c in kvpage_cli_commands())})
)
def test_a_first_word_that_is_a_command_runs_that_command(enter: Any, command: str) -> None:
    assert enter(command, "--help")[0] == [command, "--help"]


def test_the_container_listens_on_every_interface_unless_told_otherwise(enter: Any) -> None:
    assert enter("--model", "x")[1] == "0.0.0.0"
    assert enter("--model", "x", KVPAGE_HOST="::1")[1] == "::1"


@pytest.fixture
def health() -> Iterator[Any]:
    """An HTTP server; ``health.status`` is what it answers to GET /health."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def is_healthy(words: list[str], folder: Path, **environment: str) -> bool:
    command_line = folder / "cmdline"
    command_line.write_bytes("".join(f"{word}\0" for word in words).encode())
    done = subprocess.run(
        [sys.executable, DOCKER / "healthcheck", command_line], env=environment, capture_output=True, check=False,
        timeout=20,
    )  # fmt: skip
    return done.returncode == 0


def test_the_health_check_finds_the_port_and_believes_only_200(health: Any, tmp_path: Path) -> None:
    port = str(health.server_address[1])
    for status in (200, 503):
        health.status = status
        good = status == 200
        assert is_healthy(["kvpage", "serve", "--port", port], tmp_path) is good
        assert is_healthy(["kvpage", "serve", f"--port={port}"], tmp_path, KVPAGE_PORT="1") is good
        assert (
            is_healthy(["kvpage", "serve"], tmp_path, KVPAGE_PORT=port, http_proxy="http://127.0.0.1:1")
            is good
        )
    health.status = 200
    assert not is_healthy(["kvpage", "serve", "--port", "1"], tmp_path)
    assert not is_healthy(["kvpage", "serve", "--ssl-certfile", "x", "--port", port], tmp_path), (
        "speaks no https"
    )


@pytest.mark.parametrize("name", ["entrypoint", "healthcheck"])
def test_the_programs_can_be_run(name: str) -> None:
    assert os.access(DOCKER / name, os.X_OK)
    if name == "entrypoint":
        shell = shutil.which("dash") or shutil.which("sh")
        assert shell is not None
        assert subprocess.run([shell, "-n", DOCKER / name], check=False).returncode == 0


# ---- compose, Prometheus, Grafana --------------------------------------------------------------------------------


def read_yaml(*parts: str) -> Any:
    return yaml.safe_load(DOCKER.joinpath(*parts).read_text(encoding="utf-8"))


def test_compose_opens_no_port_to_the_world_and_mounts_what_exists() -> None:
    compose = read_yaml("compose.yaml")
    volumes = set(compose["volumes"])
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert ":" in service["image"] or "build" in service, f"{name}: an image without a version"
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in volumes or (DOCKER / source).exists(), mount
    build = compose["services"]["kvpage"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    services = read_yaml("compose.yaml")["services"]
    (job,) = read_yaml("prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["kvpage:8000"]}]
    (source,) = read_yaml("grafana", "provisioning", "datasources", "prometheus.yaml")["datasources"]
    host = re.fullmatch(r"http://(\w+):9090", source["url"])
    assert host is not None
    assert host.group(1) in services
    (provider,) = read_yaml("grafana", "provisioning", "dashboards", "kvpage.yaml")["providers"]
    mounts = services["grafana"]["volumes"]
    assert any(mount.split(":")[1].startswith(provider["options"]["path"] + "/") for mount in mounts)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def exported(engine: AsyncEngine) -> dict[str, set[str]]:
    """Sample name -> its labels, as a server of which something was asked exports them."""
    service = Service(engine, ServerSettings(model_names=("tiny",)), PluginRegistry())

    async def scrape() -> str:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await client.post("/v1/completions", json={"prompt": "Every request", "max_tokens": 2})
            return (await client.get("/metrics")).text

    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(asyncio.run(scrape())):
        for sample in family.samples:
            # What Prometheus adds itself.
            found.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    return found


def test_every_metric_of_the_dashboard_is_exported_with_its_labels(exported: dict[str, set[str]]) -> None:
    selectors = [found for text in expressions() for found in re.findall(METRIC + r"\{([^}]*)\}", text)]
    variables = [str(variable["query"]) for variable in dashboard()["templating"]["list"]]
    selectors += [
        (name, "model_name=") for text in variables for name in re.findall(r"\((kvpage:\w+),", text)
    ]
    assert len({name for name, _ in selectors}) > 20
    assert {name for name, _ in selectors} - exported.keys() == set()
    for name, matchers in selectors:
        assert set(re.findall(r"(\w+)=", matchers)) <= exported[name], name


def test_every_metric_of_the_dashboard_is_chosen_by_a_label() -> None:
    for text in expressions():
        assert len(re.findall(METRIC, text)) == len(re.findall(METRIC + r"\{", text)), text


def test_what_the_dashboard_groups_by_is_a_label(exported: dict[str, set[str]]) -> None:
    groups = [found for text in expressions() for found in re.findall(r"by \((\w+)\)[^{]*?" + METRIC, text)]
    assert {label for label, _ in groups} == {"le", "finished_reason", "status", "state", "phase"}
    assert [(label, name) for label, name in groups if label not in exported[name]] == []


def test_the_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(numbers) == len(set(numbers))
