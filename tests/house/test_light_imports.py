"""`import kvpage` and `kvpage --help` load nothing heavy: a host pays for torch when it makes an engine."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "huggingface_hub", "safetensors", "jinja2", "rich")
REPORT = f"import sys; print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"


def loaded_by(program: str) -> str:
    """Run a program in a fresh interpreter; what it reported of the heavy modules."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return run.stdout.rpartition("loaded:")[2].strip()


def test_importing_kvpage_loads_nothing_heavy() -> None:
    assert loaded_by(f"import kvpage\n{REPORT}") == ""


def test_importing_the_contracts_loads_nothing_heavy() -> None:
    modules = (
        "kvpage.errors, kvpage.params, kvpage.outputs, kvpage.config, kvpage.api.attention, kvpage.api.model"
    )
    assert loaded_by(f"import {modules}\n{REPORT}") == ""


def test_the_report_would_name_a_heavy_module() -> None:
    assert loaded_by(f"import numpy\n{REPORT}") == "numpy"


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    program = "\n".join(
        (
            "from kvpage.cli.main import main",
            "try:",
            "    main(['--help'])",
            "except SystemExit as stop:",
            "    assert not stop.code",
            REPORT,
        )
    )
    assert loaded_by(program) == ""
