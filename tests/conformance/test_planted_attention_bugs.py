"""The suite finds each mistake planted in the reference backend, and says what and where; without it, it is silent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest
from collections.abc import Callable
from pathlib import Path

import pytest
from attention_mutants import MUTANTS, Mutant, edited
from row_by_row_attention import Bucket, RowByRowAttention

from kvpage.api.attention import AttentionBackend, AttentionBatch
from kvpage.testing.attention import AttentionBackendConformance
from kvpage.testing.suite import ConformanceError

SOURCE = Path(__file__).resolve().parents[2] / "src"


def cases_of(backend: type[AttentionBackend]) -> dict[str, Callable[[], None]]:
    subject = type("Subject", (AttentionBackendConformance,), {"backend": backend})
    return dict(subject().cases())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found_and_named(mutant: Mutant) -> None:
    with pytest.raises(ConformanceError) as caught:
        cases_of(mutant.make())[mutant.case]()
    message = str(caught.value)
    assert [part for part in mutant.says if part not in message] == [], message


def test_without_a_bug_the_same_cases_pass() -> None:
    cases = cases_of(edited()())
    for name in sorted({mutant.case for mutant in MUTANTS}):
        cases[name]()


class NewPlanEachStep(RowByRowAttention):
    def plan(self, batch: AttentionBatch) -> object:
        return Bucket()


def test_a_new_plan_for_a_known_bucket_is_found() -> None:
    cases_of(RowByRowAttention)["test_static_batches"]()
    with pytest.raises(ConformanceError, match="3 objects for one bucket of 4 rows"):
        cases_of(NewPlanEachStep)["test_static_batches"]()


def test_what_is_not_claimed_is_skipped_by_name() -> None:
    with pytest.raises(
        unittest.SkipTest, match=r"RowByRowAttention does not claim head dim 96 \(has 16, 64, 80, 128\)"
    ):
        cases_of(RowByRowAttention)["test_head_dim[96-float32]"]()


class OnTheWrongDevice(AttentionBackendConformance):
    backend = RowByRowAttention
    device = "cuda"


def test_a_device_that_is_not_claimed_is_a_mistake_not_a_skip() -> None:
    with pytest.raises(ConformanceError, match=r"device 'cuda' is set, RowByRowAttention claims cpu"):
        dict(OnTheWrongDevice().cases())["test_softcap"]()


def test_every_claim_is_a_case_also_one_that_is_not_usual() -> None:
    assert {"test_head_dim[16-float32]", "test_block_size[4]"} <= set(cases_of(RowByRowAttention))


THIRD_PARTY = """
from attention_mutants import MUTANTS
from kvpage.testing.attention import AttentionBackendConformance

class TestMyChip(AttentionBackendConformance):
    backend = next(m for m in MUTANTS if m.name == "layer's scale ignored").make()
    head_dims = [64]

class TestNoCaps(AttentionBackendConformance):
    backend = type("NoCaps", (TestMyChip.backend,), {"caps": None})
"""


def test_a_third_party_reads_the_finding_in_its_own_pytest_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["kvpage.testing.plugin"]\n')
    (tmp_path / "test_mychip.py").write_text(THIRD_PARTY)
    paths = os.pathsep.join((str(SOURCE), str(Path(__file__).parent)))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-W", "error", "-rf", "-q",
         "-k", "can_be_made or scale or window or kv_dtype", "-m", "kvpage_conformance", str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    failed = re.findall(r"^FAILED test_mychip\.py::(\S+)", run.stdout, flags=re.MULTILINE)
    mine = [f"TestMyChip::test_scale[{scale}]" for scale in (0.02, 0.4, 1.0)]
    assert failed == [*mine, "TestNoCaps::test_backend_can_be_made"]
    assert "making: caps is None, expected an AttentionCaps" in run.stdout
    assert re.search(
        r"scale: first wrong value at row \d+, head \d+, token \d+ \(position \d+ of \d+\), block \d+ \(pool block \d+, "
        r"offset \d+\), element \d+: got \S+, expected \S+ \(may differ by",
        run.stdout,
    )
    assert "looks like: scale: scale 1/sqrt(head dim) was used instead of the layer's" in run.stdout
    assert "10 passed" in run.stdout
    assert "16 skipped" in run.stdout
