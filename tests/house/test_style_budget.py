"""The style budget of CONTRIBUTING.md, kept by reading the source, never by importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("src", "plugins")
SHIPPED_FOLDERS = (*SOURCE_FOLDERS, "benchmarks", "examples")
CODE_FOLDERS = (*SHIPPED_FOLDERS, "tests")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
MAX_FUNCTION_LINES_P95 = 45
# Spelt in halves, so that this file does not hold what it forbids.
UNFINISHED = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|XX" + "X|HA" + r"CK)\b")
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])/(" + "ho" + "me|wo" + "rk|ro" + "ot|Us" + r"ers|tm" + r"p/\w+)/(?!\.cache/huggingface)"
)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".ini", ".yml", ".json", ".cfg", ".sh", ".cpp", ".h", ".cu"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def place(path: Path, node: ast.AST | None = None) -> str:
    line = getattr(node, "lineno", None)
    return str(path.relative_to(ROOT)) + ("" if line is None else f":{line}")


def violations(path: Path) -> Iterator[str]:
    """Statements that no source file may hold."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Global):
            yield f"{place(path, node)}: global statement"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{place(path, node)}: bare except"


def unannotated(function: Function) -> list[str]:
    """Names of parameters, or 'return', that carry no annotation; self and cls need none."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    if positional and positional[0].arg.lstrip("_") in {"self", "cls"}:
        positional = positional[1:]
    every = [*positional, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    missing = [argument.arg for argument in every if argument.annotation is None]
    return missing if function.returns is not None else [*missing, "return"]


def test_no_file_of_the_source_is_longer_than_the_budget() -> None:
    lines = {
        place(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(SHIPPED_FOLDERS)
    }
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_the_budget() -> None:
    found = [(path, function) for path in python_files(CODE_FOLDERS) for function in functions(path)]
    long = [f"{place(path, f)} {f.name} {length(f)}" for path, f in found if length(f) > MAX_FUNCTION_LINES]
    assert long == []


def test_nearly_all_functions_are_short() -> None:
    lengths = sorted(length(f) for path in python_files(SOURCE_FOLDERS) for f in functions(path))
    assert lengths[int(0.95 * len(lengths))] <= MAX_FUNCTION_LINES_P95


def test_there_is_no_global_statement_and_no_bare_except() -> None:
    assert [found for path in python_files(CODE_FOLDERS) for found in violations(path)] == []


def test_every_function_of_the_source_is_annotated() -> None:
    bare = [
        f"{place(path, function)} {function.name}: {', '.join(missing)}"
        for path in python_files(SOURCE_FOLDERS)
        for function in functions(path)
        if (missing := unannotated(function))
    ]
    assert bare == []


def test_no_name_says_that_a_file_holds_whatever_was_left() -> None:
    # kvpage/utils.py is there for the import path of vLLM's random_uuid, and holds nothing else.
    vague = {"utils", "helpers", "misc", "common", "util"}
    named = [path for path in python_files(SOURCE_FOLDERS) if path.stem in vague]
    assert [place(path) for path in named if place(path) != "src/kvpage/utils.py"] == []


def committed_text_files() -> list[Path]:
    tops = [path for path in ROOT.iterdir() if path.is_file()]
    below = [
        path
        for folder in (*CODE_FOLDERS, "docs", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return sorted(
        path for path in (*tops, *below) if path.suffix in TEXT_SUFFIXES or path.parent.name == ".ci"
    )


@pytest.mark.parametrize(
    ("pattern", "meaning"),
    [(UNFINISHED, "a mark of unfinished work"), (MACHINE_PATH, "a path that exists on one machine only")],
)
def test_no_file_carries_what_belongs_to_a_desk(pattern: re.Pattern[str], meaning: str) -> None:
    found = [
        f"{place(path)}:{number}: {meaning}: {line.strip()[:80]}"
        for path in committed_text_files()
        if path.stat().st_size < 1_000_000
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def undocumented(path: Path) -> Iterator[str]:
    """Public classes, functions and methods of a module without a docstring of their own or of a base class there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def methods(owner: ast.ClassDef) -> dict[str, Function]:
        return {node.name: node for node in owner.body if isinstance(node, Function)}

    def inherits_docstring(owner: ast.ClassDef, name: str) -> bool:
        bases = [
            classes[base.id] for base in owner.bases if isinstance(base, ast.Name) and base.id in classes
        ]
        return any(name in methods(base) and ast.get_docstring(methods(base)[name]) for base in bases)

    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, Function)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name
        for name, method in methods(node).items() if isinstance(node, ast.ClassDef) else ():
            if not (name.startswith("_") or ast.get_docstring(method) or inherits_docstring(node, name)):
                yield f"{node.name}.{name}"


def test_every_public_name_of_the_api_says_what_it_means() -> None:
    modules = [path for path in sorted((ROOT / "src/kvpage/api").glob("*.py")) if path.stat().st_size]
    assert [f"{place(path)} {name}" for path in modules for name in undocumented(path)] == []
