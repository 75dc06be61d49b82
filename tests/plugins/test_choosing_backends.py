"""Which backend, reader and kernel is taken is decided by name or order, and each other one has its reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backends_of_plugins import NEED, Kernel, Model, OverSmallHeads

from installed_plugins import module
from kvpage import ConfigError, PluginError, PluginRegistry, hookimpl
from kvpage.api.model import DecoderEnv
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    Record,
)
from kvpage.plugins import BackendChoice, DecoderChoice, load
from kvpage.plugins.selection import choose_kernels, choose_reader

HERE = "backends_of_plugins"
ENV = DecoderEnv(device="cpu", dtype="float32")
SPEC: Any = type("Spec", (), {"family": "test"})()


class Plugin:
    """Registers the records that it is given."""

    def __init__(self, *records: Record) -> None:
        self._records = records

    def _of(self, kind: type[Record]) -> list[Any]:
        return [record for record in self._records if isinstance(record, kind)]

    @hookimpl
    def kvpage_attention_backends(self) -> Sequence[AttentionBackendRecord]:
        return self._of(AttentionBackendRecord)

    @hookimpl
    def kvpage_decoder_backends(self) -> Sequence[DecoderBackendRecord]:
        return self._of(DecoderBackendRecord)

    @hookimpl
    def kvpage_linear_kernels(self) -> Sequence[LinearKernelRecord]:
        return self._of(LinearKernelRecord)


def attention(
    name: str, factory: str = "Attention", priority: int = 0, **values: Any
) -> AttentionBackendRecord:
    return AttentionBackendRecord(name=name, factory=f"{HERE}:{factory}", priority=priority, **values)


def decoder(name: str, factory: str = "Decoder", priority: int = 0) -> DecoderBackendRecord:
    return DecoderBackendRecord(name=name, factory=f"{HERE}:{factory}", priority=priority)


def registry(*records: Record, others: Sequence[object] = ()) -> PluginRegistry:
    return PluginRegistry(plugins=[Plugin(*records), *others], entry_points=False, strict=True)


def reasons(choice: BackendChoice | DecoderChoice) -> dict[str, str]:
    return {name: "; ".join(why) for name, why in choice.rejected}


def test_the_highest_priority_is_taken_then_the_first_name() -> None:
    choice = registry(attention("b"), attention("a"), attention("low", priority=-1)).select_attention_backend(
        NEED
    )
    assert (choice.record.name, choice.rejected, choice.why) == ("a", (), "by priority")
    choice = registry(attention("a"), attention("b", priority=1)).select_attention_backend(NEED)
    assert choice.record.name == "b"


def test_each_one_that_is_passed_over_has_its_reason() -> None:
    choice = registry(
        attention("small", "SmallHeads", 9),
        attention("gone", "Nowhere", 8),
        attention(
            "needing", priority=7, needs=("no_such_module",), install="pip install 'kvpage-chip[driver]'"
        ),
        attention("broken", "BrokenCaps", 6),
        attention("duck", "NoBackend", 5),
        attention("plain"),
    ).select_attention_backend(NEED)
    assert choice.record.name == "plain"
    assert list(reasons(choice)) == ["small", "gone", "needing", "broken", "duck"]
    assert reasons(choice)["small"] == "head dim 64 (has 32)"
    assert "backends_of_plugins:Nowhere cannot be imported" in reasons(choice)["gone"]
    assert reasons(choice)["needing"] == "needing needs pip install 'kvpage-chip[driver]'"
    assert reasons(choice)["broken"] == "its caps are None, no kvpage.api.attention.AttentionCaps"
    assert "is no subclass of kvpage.api.attention.AttentionBackend" in reasons(choice)["duck"]
    assert "small: no: head dim 64 (has 32)" in choice.reason
    assert choice.broken == {"gone", "broken", "duck"}


def test_a_named_backend_is_taken_or_is_an_error_with_its_reasons() -> None:
    made = registry(attention("small", "SmallHeads"), attention("plain", priority=-9))
    assert made.select_attention_backend(NEED, "plain").why == "given"
    with pytest.raises(
        ConfigError, match=r"'small' cannot serve this engine:\n  small: head dim 64 \(has 32\)$"
    ):
        made.select_attention_backend(NEED, "small")
    with pytest.raises(ConfigError, match=r"'fast' is not registered; known: small, plain, reference"):
        made.select_attention_backend(NEED, "fast")
    with pytest.raises(
        ConfigError, match=r"no attention backend can serve this engine:\n  small: device tpu"
    ):
        made.select_attention_backend(replace(NEED, device="tpu"))


def opinion(body: str, name: str) -> object:
    return module(f"@hookimpl\ndef kvpage_select_attention_backend(candidates):\n    {body}", name)


def test_a_plugin_may_choose_among_those_that_can_serve() -> None:
    others = [
        opinion("raise OSError('no device')", "raising"),
        opinion("return 'small'", "unable"),
        opinion("return None", "silent"),
        opinion("assert candidates == ('a', 'b', 'reference'); return 'b'", "choosing"),
        opinion("return 'a'", "late"),
    ]
    made = registry(attention("a"), attention("b"), attention("small", "SmallHeads"), others=others)
    choice = made.select_attention_backend(NEED)
    assert (choice.record.name, choice.why) == ("b", "by plugin 'choosing'")
    assert reasons(choice) == {"small": "head dim 64 (has 32)", "a": "plugin 'choosing' chose b"}
    assert [line.partition(":")[0] for line in choice.ignored] == ["plugin 'raising'", "plugin 'unable'"]
    assert "OSError: no device" in choice.ignored[0]
    assert "'small', which is none of a, b, reference" in choice.ignored[1]
    assert made.select_attention_backend(NEED, "a").record.name == "a"


def test_where_no_plugin_chooses_the_order_does() -> None:
    made = registry(attention("a"), attention("b"), others=[opinion("return ['b']", "junk")])
    choice = made.select_attention_backend(NEED)
    assert (choice.record.name, choice.why, len(choice.ignored)) == ("a", "by priority", 1)


def test_a_decoder_backend_is_taken_with_its_attention_backend() -> None:
    made = registry(
        decoder("refusing", "Refuses", 9),
        decoder("raising", "RaisesWhenAsked", 8),
        decoder("gone", "Nowhere", 7),
        decoder("heads", "OverSmallHeads", 6),
        decoder("paired", "OverAttention", 5),
        decoder("free", "Decoder", 4),
        attention("small", "SmallHeads"),
        attention("plain", priority=-50),
        attention("first", priority=50),
    )
    choice = made.select_decoder(NEED, SPEC, ENV)
    assert (choice.record.name, choice.attention.record.name) == ("paired", "plain")
    assert [c.record.name for c in choice.candidates] == ["paired", "free", "torch"]
    assert reasons(choice)["refusing"] == "it has a window; it is too deep"
    assert "OSError: no driver" in reasons(choice)["raising"]
    assert "cannot be imported" in reasons(choice)["gone"]
    assert "small: head dim 64" in reasons(choice)["heads"]
    assert "paired: chosen, by priority (priority 5)" in choice.explain()


def test_a_decoder_backend_for_another_attention_backend_gives_way_to_the_one_that_is_named() -> None:
    made = registry(decoder("paired", "OverAttention", 5), attention("plain"), attention("other"))
    choice = made.select_decoder(NEED, SPEC, ENV, attention_backend="other")
    assert (choice.record.name, choice.attention.record.name) == ("torch", "other")
    assert "works with the attention backend plain, and other is named" in reasons(choice)["paired"]
    assert made.select_decoder(NEED, SPEC, ENV, attention_backend="plain").record.name == "paired"


def test_a_decoder_backend_after_one_of_another_attention_backend_does_not_follow_it() -> None:
    made = registry(
        decoder("free", priority=9),
        decoder("heads", "OverSmallHeads"),
        attention("plain"),
        attention("small", "SmallHeads"),
    )
    choice = made.select_decoder(replace(NEED, head_dims=frozenset({32})), SPEC, ENV)
    assert [c.record.name for c in choice.candidates] == ["free", "torch"]
    assert reasons(choice)["heads"] == "it works with the attention backend small, and plain is taken"
    assert OverSmallHeads.attention == "small"


def test_a_named_decoder_backend_is_taken_or_is_an_error_with_its_reasons() -> None:
    made = registry(decoder("refusing", "Refuses"), decoder("low", priority=-500))
    choice = made.select_decoder(NEED, SPEC, ENV, decoder_backend="low")
    assert [c.record.name for c in choice.candidates] == ["low"]
    with pytest.raises(
        ConfigError, match=r"decoder_backend='refusing' cannot run this model: .*it is too deep"
    ):
        made.select_decoder(NEED, SPEC, ENV, decoder_backend="refusing")
    with pytest.raises(
        ConfigError, match="decoder_backend='fast' is not registered; known: refusing, torch, low"
    ):
        made.select_decoder(NEED, SPEC, ENV, decoder_backend="fast")


def test_the_next_decoder_backend_builds_what_others_decline() -> None:
    made = registry(
        decoder("declining", "Declines", 9),
        decoder("raising", "RaisesWhenBuilt", 8),
        decoder("empty", "BuildsNothing", 7),
        decoder("good", priority=6),
    )
    built = made.select_decoder(NEED, SPEC, ENV).build(SPEC, {}, ENV)
    assert isinstance(built.model, Model)
    assert built.record.name == "good"
    (raised,) = dict(built.rejected).pop("raising")
    assert raised.startswith("RuntimeError: no kernel image, at ")
    assert dict(built.rejected)["declining"] == ("its weights are not packed",)
    assert dict(built.rejected)["empty"] == ("build() returned None, no model",)
    assert built.broken == {"raising", "empty"}
    assert "declining: no: its weights are not packed" in built.reason


@pytest.mark.parametrize(
    ("factory", "error", "match"),
    [
        ("Declines", ConfigError, "declines: no: its weights are not packed"),
        ("BuildsNothing", ConfigError, "no model"),
        ("RaisesWhenBuilt", PluginError, "RuntimeError: no kernel image"),
    ],
)
def test_a_named_decoder_backend_that_does_not_build_is_an_error(
    factory: str, error: type[Exception], match: str
) -> None:
    choice = registry(decoder("declines", factory)).select_decoder(
        NEED, SPEC, ENV, decoder_backend="declines"
    )
    with pytest.raises(error, match=match):
        choice.build(SPEC, {}, ENV)


def test_linear_kernels_that_cannot_be_had_are_left_out_with_the_reason() -> None:
    made = registry(
        LinearKernelRecord(name="gone", factory=f"{HERE}:Nowhere", priority=9),
        LinearKernelRecord(name="second", factory=f"{HERE}:Kernel"),
        LinearKernelRecord(name="no", factory=f"{HERE}:Model"),
    )
    ours = [r for r in made.linear_kernels() if r.name in ("gone", "second", "no")]
    assert [record.name for record in ours] == ["gone", "no", "second"]
    kernels, rejected = choose_kernels(ours)
    assert kernels == {"second": Kernel}
    assert [name for name, _ in rejected] == ["gone", "no"]


def readers(**files: str) -> list[CheckpointReaderRecord]:
    made = [CheckpointReaderRecord(name=n, factory=f"{HERE}:Reader", files=(p,)) for n, p in files.items()]
    return [*PluginRegistry(entry_points=False).checkpoint_readers(), *made]


def test_a_reader_is_taken_for_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "weights.mine").touch()
    records = readers(other="*.other", mine="*.mine", late="weights.*")
    for path in (tmp_path, tmp_path / "weights.mine"):
        choice = choose_reader(records, "auto", path)
        assert (choice.record.name, choice.why) == ("mine", "for weights.mine")
        assert dict(choice.rejected) == {
            "safetensors": ("no file like *.safetensors",), "other": ("no file like *.other",),
        }  # fmt: skip
    assert choose_reader(records, "late", tmp_path).record.name == "late"
    with pytest.raises(
        ConfigError, match="'auto', 'dummy', 'safetensors', 'other', 'mine', 'late', got 'pickle'"
    ):
        choose_reader(records, "pickle", tmp_path)


def test_a_folder_that_nobody_reads_goes_to_the_builtin_reader_which_says_what_is_missing(
    tmp_path: Path,
) -> None:
    assert choose_reader(readers(mine="*.mine"), "auto", tmp_path).record.name == "safetensors"


def test_a_reader_whose_modules_are_absent_is_named_where_only_it_would_do(tmp_path: Path) -> None:
    (tmp_path / "model.mine").touch()
    needing = CheckpointReaderRecord(
        name="mine",
        factory=f"{HERE}:Reader",
        files=("*.mine",),
        needs=("no_such_module",),
        install="pip install mine",
    )
    choice = choose_reader([*readers(), needing], "auto", tmp_path)
    with pytest.raises(PluginError, match="mine needs pip install mine"):
        load(choice.record)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (("no_such_module",), "needs no_such_module, which is not installed"),
        (
            ("json", "xml.no_such_part", "json.decoder.x"),
            "needs xml.no_such_part, json.decoder.x, which is not",
        ),
        (("json", "xml.dom.minidom"), ""),
    ],
)
def test_a_record_says_what_is_not_installed(needs: tuple[str, ...], reason: str) -> None:
    record = LogitsProcessorRecord(name="p", factory="json:loads", needs=needs)
    if not reason:
        assert callable(load(record))
        return
    with pytest.raises(PluginError, match=reason):
        load(record)


def test_looking_for_what_is_needed_imports_nothing() -> None:
    program = (
        "import sys\nfrom kvpage.api.records import LogitsProcessorRecord\n"
        "from kvpage.plugins.selection import unavailable\n"
        "record = LogitsProcessorRecord(name='p', factory='a:b', needs=('xml.dom.minidom', 'numpy'))\n"
        "print(repr(unavailable(record)), 'xml' in sys.modules, 'numpy' in sys.modules, 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.split() == ["''", "False", "False", "False"]
