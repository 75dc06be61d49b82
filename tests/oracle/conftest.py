"""These tests need other people's packages, at versions that exclude each other: ``tox -e oracle`` and the like."""

from __future__ import annotations

import os

TESTS_OF = {
    "oracle": "test_oracle_quantize.py",
    "oracle-modern": "test_oracle_gptqmodel.py",
    "oracle-ct": "test_oracle_llmcompressor.py",
}
WANTED = TESTS_OF.get(os.environ.get("TOX_ENV_NAME", ""))
collect_ignore = [name for name in TESTS_OF.values() if name != WANTED]
