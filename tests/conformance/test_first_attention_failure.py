"""What is wrong is said once, by the test that is about it, and that test is the first to fail."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from attention_mutants import MUTANTS

from kvpage.api.attention import AttentionBackend, AttentionEnv
from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.testing.attention import AttentionBackendConformance
from kvpage.testing.guest_manners import HostState
from kvpage.testing.suite import ConformanceError

FIRST = {
    "lengths spoilt": "inputs_are_only_read",
    "torch seeded": "guest_manners",
    "default dtype set": "guest_manners",
    "environment edited": "guest_manners",
    "one slot a block too few": "layout_has_one_entry_a_block",
    "last slot of a block written one too low": "write_touches_only_its_slots[float32]",
    "first slot of a block written to the block before": "write_touches_only_its_slots[float32]",
    "padding written to the null block": "padding_tokens_write_nothing",
    "copy_blocks the wrong way": "copy_blocks[float32]",
    "one key too many of a short row": "unwritten_slots_take_no_part",
    "layer's scale ignored": "scale[0.02]",
    "scale too small by 0.7": "scale[0.02]",
    "query heads interleaved over KV heads": "grouped_heads[4x2]",
    "last block gathered from the first": "decode_rows_at_every_length",
    "chunk queries see one key ahead": "causal_mask",
    "window one too wide in chunks and rows": "window[1]",
    "softcap ignored": "softcap",
    "sinks ignored": "sinks",
    "plan kept by the lengths of the rows": "plan_follows_the_block_tables",
    "slots kept by the lengths and the tables": "plan_follows_the_slots",
    "first layer's window kept for the step": "one_plan_serves_every_layer",
}


@pytest.mark.parametrize(("name", "first"), FIRST.items(), ids=FIRST)
def test_the_first_failure_names_the_property(name: str, first: str) -> None:
    backend = next(mutant for mutant in MUTANTS if mutant.name == name).make()
    assert next(iter(failures(backend))) == f"test_{first}"


def test_the_suite_ends_with_what_varies_everything() -> None:
    names = list(cases_of(ReferenceAttention))
    at = [
        names.index(f"test_{name}")
        for name in ("backend_can_be_made", "scale[0.4]", "one_plan_serves_every_layer")
    ]
    at += [names.index(f"test_head_dim[{size}-float32]") for size in (32, 256)]
    assert at == sorted(at)
    assert names[0] == "test_backend_can_be_made"
    assert names[-1] == "test_row_has_the_same_bits_in_any_batch[float16]"


class RaisesWhenMade(ReferenceAttention):
    def __init__(self, env: AttentionEnv) -> None:
        raise OSError("no driver")


class Incomplete(AttentionBackend):
    caps = ReferenceAttention.caps


CAPS = {"devices": {"cpu"}}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (None, "making: backend is not set: name your subclass of kvpage.api.attention.AttentionBackend"),
        (42, "making: backend = 42 is no subclass of kvpage.api.attention.AttentionBackend"),
        (dict, "making: backend = <class 'dict'> is no subclass"),
        (
            Incomplete,
            "making: Incomplete is abstract: it lacks attend, copy_blocks, kv_layout, plan, write_kv",
        ),
        (RaisesWhenMade, r"making: RaisesWhenMade\(env\) raised OSError: no driver"),
        (
            type("NoCaps", (ReferenceAttention,), {"caps": None}),
            "making: caps is None, expected an AttentionCaps",
        ),
        (
            type("Dict", (ReferenceAttention,), {"caps": CAPS}),
            "making: caps is {'devices': {'cpu'}}, expected an Att",
        ),
    ],
)
def test_a_class_that_cannot_be_made_is_one_failure(backend: Any, message: str) -> None:
    cases = cases_of(backend)
    with pytest.raises(ConformanceError, match=message):
        cases.pop("test_backend_can_be_made")()
    for case in cases.values():
        with pytest.raises(unittest.SkipTest, match="see test_backend_can_be_made"):
            case()


def test_an_object_is_no_class() -> None:
    made = object.__new__(ReferenceAttention)
    with pytest.raises(
        ConformanceError, match="backend is a ReferenceAttention object; name the class itself"
    ):
        cases_of(made)["test_backend_can_be_made"]()


def test_a_wrong_layout_is_one_failure() -> None:
    backend = next(mutant for mutant in MUTANTS if mutant.name == "one slot a block too few").make()
    assert list(failures(backend, all_of_them=True)) == ["test_layout_has_one_entry_a_block"]


@pytest.mark.parametrize("name", ["default dtype set", "environment edited", "torch seeded"])
def test_a_guest_without_manners_disturbs_no_other_test(name: str) -> None:
    backend = next(mutant for mutant in MUTANTS if mutant.name == name).make()
    before = HostState.now()
    for case in ("inputs_are_only_read", "layout_has_one_entry_a_block", "causal_mask"):
        with suppress(ConformanceError, RuntimeError):
            cases_of(backend)[f"test_{case}"]()
    assert HostState.now() == before


def cases_of(backend: Any) -> dict[str, Callable[[], None]]:
    return dict(type("Subject", (AttentionBackendConformance,), {"backend": backend})().cases())


def failures(backend: Any, *, all_of_them: bool = False) -> dict[str, str]:
    """Cases that fail, in order; the first one only unless told otherwise."""
    found: dict[str, str] = {}
    for name, case in cases_of(backend).items():
        try:
            case()
        except unittest.SkipTest:
            continue
        except AssertionError as error:
            found[name] = str(error)
            if not all_of_them:
                break
    return found
