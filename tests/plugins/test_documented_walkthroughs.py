"""The walkthroughs of docs/plugins/ are whole: their files, as they stand, make a plugin that passes its own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvpage

DOCS = Path(__file__).resolve().parents[2] / "docs" / "plugins"
FILE = re.compile(r'^```python title="([^"]+)"\n(.*?)^```', flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["model-family", "quantization"])
def test_the_files_of_a_walkthrough_pass_their_own_tests(page: str, tmp_path: Path) -> None:
    files = FILE.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert len(files) >= 3
    for name, source in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    (tmp_path / "tests" / "conftest.py").write_text('pytest_plugins = ["kvpage.testing.plugin"]\n')
    paths = [str(tmp_path / "src"), str(Path(kvpage.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    plugin = next(path for path in (tmp_path / "src").glob("*/plugin.py"))
    program = (
        "import importlib, pytest, sys\nfrom kvpage import PluginRegistry\n"
        f"plugin = importlib.import_module('{plugin.parent.name}.plugin')\n"
        "PluginRegistry(plugins=[plugin], entry_points=False, strict=True)\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--rootdir', '.', 'tests']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)
