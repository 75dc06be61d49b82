"""The README's two commands, `.ci/run`, `tox.ini` and CONTRIBUTING name the same things."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def shell_lines(name: str) -> list[str]:
    """Lines of a page's bash blocks, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text(name), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def stages() -> list[str]:
    found = re.search(r"^STAGES=\((.*)\)$", text(".ci/run"), flags=re.MULTILINE)
    assert found
    return found.group(1).split()


def test_the_readme_opens_with_a_command_that_streams_and_one_that_tests() -> None:
    streams, tests = shell_lines("README.md")[:2]
    assert streams.startswith(
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && .venv/bin/kvpage generate "
    )
    assert tests.startswith(
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' && "
    )
    assert tests.endswith(".venv/bin/pytest")


def test_ci_runs_the_tests_with_the_command_of_the_readme_and_no_other() -> None:
    assert sum(line.endswith(".venv/bin/pytest") for line in text("README.md").splitlines()) == 1
    outsider = "../outsider/bin/python"  # the example's own tests, in its own environment
    browser = "-m browser"  # tests that the command runs as well, alone, where a Chromium is
    kernels = "pytest tests/cpu "  # likewise, on a library with sanitizers
    mentions = [
        line
        for line in text(".ci/run").splitlines()
        if "pytest" in line and not any(known in line for known in (outsider, browser, kernels))
    ]
    assert len(mentions) == 2
    assert "$(readme_command pytest)" in mentions[0]
    assert "has no command that runs" in mentions[1]


def test_every_stage_is_a_function_of_ci_and_explained_to_contributors() -> None:
    script, guide = text(".ci/run"), text("CONTRIBUTING.md")
    assert [stage for stage in stages() if f"\nstage_{stage}() {{" not in script] == []
    assert [stage for stage in stages() if f"`{stage}`" not in guide] == []


def test_every_tool_that_ci_needs_is_pinned() -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    extras = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    names = {re.split(r"[<>=\[ ]", need)[0].lower().replace("_", "-") for need in extras} - {"kvpage"}
    pinned = set(re.findall(r"^([a-z0-9-]+)==", text("constraints.txt"), flags=re.MULTILINE))
    assert names - pinned == set()


def test_nothing_names_where_packages_come_from() -> None:
    files = ("constraints.txt", "tox.ini", ".ci/run", "pyproject.toml", "README.md", "CONTRIBUTING.md")
    assert [
        name for name in files if re.search(r"index-url|find-links|--index|://[\w.]*pypi", text(name))
    ] == []
