"""The conformance suite of attention backends.

Subclass it in your tests, name your class, run pytest::

    from kvpage.testing.attention import AttentionBackendConformance
    from mychip import MyChipAttention

    class TestMyChip(AttentionBackendConformance):
        backend = MyChipAttention

Every test first asks ``backend.caps``: what they do not claim is skipped, with the claim by name; what they claim is
proven. The truth is attention in float64. A failure names the property, the first wrong row, head, token and block
with both values, and the mistake that would explain the output where it is a common one.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvpage.api.attention import AttentionBackend
from kvpage.testing.attention_making import AttentionMaking
from kvpage.testing.attention_memory import AttentionMemory
from kvpage.testing.attention_steps import AttentionSteps
from kvpage.testing.attention_sweeps import AttentionSweeps
from kvpage.testing.attention_values import AttentionValues
from kvpage.testing.attention_writes import AttentionWrites

SHORT = (
    "test_backend_can_be_made",
    "test_caps_are_known_terms",
    "test_layout_has_one_entry_a_block",
    "test_guest_manners",
    "test_inputs_are_only_read",
    "test_output_equals_the_float64_oracle",
    "test_kv_dtype",
    "test_decode_rows_at_every_length",
    "test_scale[0.4]",
    "test_grouped_heads[8x2]",
    "test_window[block+1]",
    "test_softcap",
    "test_sinks",
    "test_value_head_dim",
    "test_padding_tokens_write_nothing",
    "test_padding_rows_change_nobody",
    "test_strided_inputs[fused-qkv]",
    "test_shared_blocks_filled_in_the_same_step",
    "test_copy_blocks",
    "test_rope_write[halves-float32]",
    "test_rope_write[halves-bfloat16]",
    "test_rope_write[partial-interleaved-float32]",
)
"""What ``kvpage plugins check`` runs: cases of the suite, or all cases of a test."""


class AttentionBackendConformance(
    AttentionSweeps, AttentionSteps, AttentionMemory, AttentionValues, AttentionWrites, AttentionMaking
):
    """Subclass it, set ``backend``; see AttentionSubject for what else may be set.

    Tests run from the last base to the first: the most specific ones come first, so that the first failure (pytest's
    ``-x``) names the property, and those that vary everything at once come last.
    """


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One case of a short check: "passed", "failed" with the finding, or "skipped" with the claim that lacks."""

    case: str
    verdict: str
    finding: str = ""

    @property
    def passed(self) -> bool:
        """Nothing was found wrong; a skipped case found nothing."""
        return self.verdict != "failed"


def short_check(backend: type[AttentionBackend], device: str) -> Iterator[CheckResult]:
    """A short pass of the suite over ``backend`` on a torch device, without pytest, case by case.

    It finds a backend that is broken on this machine; only the whole suite proves one right.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        yield CheckResult(f"device {device}", "failed", f"not on this machine: {error}")
        return
    subject = type("ShortCheck", (AttentionBackendConformance,), {"backend": backend, "device": device})()
    for name, case in subject.cases():
        if name not in SHORT and name.partition("[")[0] not in SHORT:
            continue
        test, bracket, values = name.removeprefix("test_").partition("[")
        label = test.replace("_", " ") + bracket.replace("[", " [") + values
        try:
            case()
        except unittest.SkipTest as reason:
            yield CheckResult(label, "skipped", str(reason))
        except AssertionError as finding:
            yield CheckResult(label, "failed", str(finding))
        except Exception as error:  # whatever a backend raises is the finding
            yield CheckResult(label, "failed", f"{type(error).__name__}: {error}")
        else:
            yield CheckResult(label, "passed")
