"""Python that the README and the docs show: all of it compiles, and what is marked runnable runs as it stands.

A block is marked by a line `<!-- runnable -->` before its fence; it runs in a folder of its own, in its own
namespace, and may `await` at top level as in a notebook.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(<!-- runnable -->\n+)?```python[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    source: str
    runnable: bool

    def compile(self) -> CodeType:
        padded = "\n" * self.line + self.source
        return compile(padded, self.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def blocks() -> list[Block]:
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(2))
            found.append(Block(str(path.relative_to(ROOT)), line, match.group(2), bool(match.group(1))))
    return found


BLOCKS = blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_every_python_block_compiles(block: Block) -> None:
    assert block.compile()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.runnable], ids=lambda block: f"{block.page}:{block.line}"
)
def test_every_block_marked_runnable_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block.compile()
    namespace: dict[str, object] = {"__name__": "documented"}
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, namespace))
    else:
        exec(code, namespace)
    assert capsys.readouterr().out.strip(), "a runnable block prints what it shows"


def test_the_readme_and_the_tutorials_have_runnable_blocks() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/embedding.md"} <= {b.page for b in BLOCKS if b.runnable}
