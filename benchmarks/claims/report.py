"""What the programs of this folder print: a table and a verdict, or the same as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

VERDICTS = ("reproduced", "bounded", "refuted", "not testable here")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring and knows ``--json``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="every number, as JSON")
    return parser


def show(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], verdicts: Mapping[str, str], as_json: bool
) -> None:
    """Print tables, by title, and a verdict for each claim: "Q1 reproduced: ..."."""
    for claim, verdict in verdicts.items():
        if not verdict.startswith(VERDICTS):
            raise ValueError(f"{claim}: {verdict!r} begins with none of {', '.join(VERDICTS)}")
    if as_json:
        print(json.dumps({"tables": tables, "verdicts": verdicts}, indent=2))
        return
    for title, rows in tables.items():
        print(title)
        _print_table(rows)
        print()
    for claim, verdict in verdicts.items():
        print(f"{claim} {verdict}")


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    heads = list(rows[0])
    lines = [heads, *([_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    is_text = [isinstance(rows[0][head], str) for head in heads]
    for line in lines:
        cells = (
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        )
        sys.stdout.write("  " + "  ".join(cells).rstrip() + "\n")


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
