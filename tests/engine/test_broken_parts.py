"""A part of a plugin that is broken is named, and costs no more than what asked for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from engine_state import MakeEngine
from parts_of_plugins import Plugin

from kvpage import ConfigError, Engine, PluginError, PluginRegistry, RequestError, SamplingParams, hookimpl
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    DecoderBackendRecord,
    EventListenerRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    ModelRecord,
    QuantizationSchemeRecord,
    Record,
    SchedulingPolicyRecord,
)
from kvpage.config import EngineOptions
from kvpage.inspect.checkpoint import planned_model
from tiny_checkpoint import write_checkpoint

HERE = "broken_parts"
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


class Others(Plugin):
    """The kinds of records that ``Plugin`` leaves out, too."""

    def __init__(self, *records: Record) -> None:
        super().__init__(*records)
        self._records = records

    def _of(self, kind: type[Record]) -> list[Any]:
        return [record for record in self._records if isinstance(record, kind)]

    @hookimpl
    def kvpage_attention_backends(self) -> list[AttentionBackendRecord]:
        return self._of(AttentionBackendRecord)

    @hookimpl
    def kvpage_models(self) -> list[ModelRecord]:
        return self._of(ModelRecord)

    @hookimpl
    def kvpage_quantization_schemes(self) -> list[QuantizationSchemeRecord]:
        return self._of(QuantizationSchemeRecord)

    @hookimpl
    def kvpage_event_listeners(self) -> list[EventListenerRecord]:
        return self._of(EventListenerRecord)


def registry(*records: Record) -> PluginRegistry:
    return PluginRegistry(plugins=[Others(*records)], entry_points=False, strict=True)


def attention(factory: str, name: str = "chip") -> AttentionBackendRecord:
    return AttentionBackendRecord(name=name, factory=f"{HERE}:{factory}", priority=500)


BROKEN_BACKENDS = {
    "NoChip": r"it cannot be made \(RuntimeError: no chip in this machine, at \S+:\d+\)",
    "NoLayout": r"kv_layout\(\) gives None, which is no kvpage.api.kv.KVLayout",
    "UnknownDtype": r"kv_layout\(\) gives the dtype 'float33', which torch does not have",
    "FewBlocks": r"kv_layout\(\) gives the shape \(\d+, .*; its first entry must be env.num_blocks = \d+",
    "Abstract": r"it cannot be made \(TypeError: Can't instantiate abstract class",
    "DictCaps": r"its caps are \{'devices': \{'cpu'\}\}, no kvpage.api.attention.AttentionCaps",
    "Gone": r"broken_parts:Gone cannot be imported: AttributeError",
}  # fmt: skip


@pytest.mark.parametrize("factory", BROKEN_BACKENDS)
def test_an_attention_backend_that_cannot_be_made_gives_way_and_if_named_is_an_error(
    make_engine: MakeEngine, tiny: Path, caplog: pytest.LogCaptureFixture, factory: str
) -> None:
    made = registry(attention(factory))
    engine = make_engine(plugins=made)
    assert engine.config.attention_backend == "reference"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("attention backend chip: no: ")
    reason = engine.config.reasons["attention_backend"]
    assert reason.startswith("reference (by priority; chip: no: ")
    with pytest.raises(
        PluginError, match="attention_backend='chip' cannot be used: " + BROKEN_BACKENDS[factory]
    ):
        Engine(tiny, plugins=made, attention_backend="chip")
    assert len(engine.generate([9, 8, 7], GREEDY)[0].outputs[0].token_ids) == 4


def test_an_attention_backend_that_cannot_be_made_for_all_blocks_is_named(tiny: Path) -> None:
    match = r"attention backend chip: it cannot be made \(RuntimeError: 201 blocks do not fit"
    with pytest.raises(PluginError, match=match):
        Engine(tiny, plugins=registry(attention("FewBlocksOnly")), num_kv_blocks=200)


def test_a_decoder_backend_whose_attention_backend_cannot_be_made_gives_way(make_engine: MakeEngine) -> None:
    over = DecoderBackendRecord(name="over", factory=f"{HERE}:OverNoChip", priority=9)
    config = make_engine(plugins=registry(attention("NoChip"), over)).config
    assert (config.attention_backend, config.decoder_backend) == ("reference", "torch")
    assert "over: no: its attention backend chip does not serve" in config.reasons["decoder_backend"]


def test_a_decoder_backend_that_raises_gives_way_with_a_warning_and_if_named_is_an_error(
    make_engine: MakeEngine, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = registry(DecoderBackendRecord(name="bad", factory=f"{HERE}:Unbuildable", priority=9))
    assert make_engine(plugins=made).config.decoder_backend == "torch"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("decoder backend bad: no: RuntimeError: no kernel image")
    with pytest.raises(PluginError, match=r"decoder backend 'bad' cannot build llama \(RuntimeError"):
        Engine(tiny, plugins=made, decoder_backend="bad")
    wrong = registry(DecoderBackendRecord(name="wrong", factory=f"{HERE}:Nothing"))
    with pytest.raises(
        PluginError, match=r"'wrong' cannot run this model: .*is no subclass of .*DecoderBackend"
    ):
        Engine(tiny, plugins=wrong, decoder_backend="wrong")


def test_a_linear_kernel_that_fails_is_warned_of_once_and_the_choice_is_kept(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(
        plugins=registry(LinearKernelRecord(name="bad", factory=f"{HERE}:FailingLinear", priority=9))
    )
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        "linear kernel bad fails on layers.0.attention.q, k, v (Dense) and is passed over: it raised RuntimeError: "
        "driver gone"
    )
    # Two layers of qkv, out, gate_up and down, and the head.
    chosen = engine.config.reasons["linear_kernels"]
    assert chosen.startswith("torch: 9 Dense (bad: no: it raised RuntimeError: driver gone; ")


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("NaNs", "logits processor 'x' wrote NaN into the logits"),
        ("Unadmitting", "logits processor 'x' raised KeyError in admit: 'limit'"),
        ("Nothing", "logits processor 'x' could not be made: .* is no kvpage.api.sampling.LogitsProcessor"),
    ],
)
def test_a_broken_processor_ends_the_requests_that_name_it_and_is_named(
    make_engine: MakeEngine, factory: str, reason: str
) -> None:
    engine = make_engine(plugins=registry(LogitsProcessorRecord(name="x", factory=f"{HERE}:{factory}")))
    beside = engine.submit([5, 6], GREEDY)
    with pytest.raises(RequestError, match=reason):
        engine.generate([9, 8, 7], GREEDY.clone(logits_processors=["x"]))
    assert len(beside.result().outputs[0].token_ids) == 4


def test_a_request_that_the_policy_cannot_place_is_refused_alone(make_engine: MakeEngine) -> None:
    made = registry(SchedulingPolicyRecord(name="careless", factory=f"{HERE}:Careless"))
    engine = make_engine(plugins=made, scheduling_policy="careless", max_num_seqs=1)
    good = [engine.submit([5] * count, GREEDY) for count in (3, 2)]
    with pytest.raises(
        RequestError, match=r"'careless' failed on this request \(ZeroDivisionError: no rate\)"
    ):
        engine.submit([5] * 7, GREEDY)
    with pytest.raises(
        RequestError, match="'careless' gave this request the key 'eight', which cannot be ordered"
    ):
        engine.submit([5] * 8, GREEDY)
    assert engine.stats().waiting == 2
    assert [len(handle.result().outputs[0].token_ids) for handle in good] == [4, 4]


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        (SchedulingPolicyRecord(name="p", factory=f"{HERE}:Nothing"), {"scheduling_policy": "p"},
         "scheduling policy 'p': .* which is no kvpage.api.scheduling.SchedulingPolicy"),
        (CheckpointReaderRecord(name="r", factory=f"{HERE}:Nothing", files=("*",)), {"load_format": "r"},
         "r: broken_parts:Nothing is no subclass of kvpage.api.checkpoint.CheckpointReader"),
        (CheckpointReaderRecord(name="r", factory=f"{HERE}:ConfigOfNoKind", files=("*",)), {"load_format": "r"},
         r"checkpoint reader 'r': config\(\) returned 42, no mapping"),
        (CheckpointReaderRecord(name="r", factory=f"{HERE}:WeightsOfNoKind", files=("*",)), {"load_format": "r"},
         r"checkpoint reader WeightsOfNoKind: weights\(\) returned \{\}, which lacks shared, names"),
        (EventListenerRecord(name="l", factory=f"{HERE}:Nothing"), {},
         "event listener 'l': .* which is no kvpage.api.events.EventListener"),
        (QuantizationSchemeRecord(name="s", factory=f"{HERE}:Nothing"), {"quantization": "s"},
         "s: broken_parts:Nothing is no subclass of kvpage.api.quant.QuantScheme"),
        (QuantizationSchemeRecord(name="s", factory=f"{HERE}:Unopened"), {"quantization": "s"},
         r"scheme 's': from_checkpoint\(\) returned None"),
        (QuantizationSchemeRecord(name="s", factory=f"{HERE}:FormOfNoKind"), {"quantization": "s"},
         r"scheme FormOfNoKind failed on 'model.layers.0.self_attn.q_proj' \(TypeError: to_form\(\) returned 42"),
        (QuantizationSchemeRecord(name="s", factory=f"{HERE}:NoTensors"), {"quantization": "s"},
         r"scheme NoTensors failed on 'model.layers.0.self_attn.q_proj' \(TypeError: tensors\(\) returned None"),
    ],
)  # fmt: skip
def test_a_factory_of_the_wrong_kind_is_named_when_the_engine_starts(
    tiny: Path, record: Record, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PluginError, match=reason):
        Engine(tiny, plugins=registry(record), **options)


def test_a_listener_that_fails_is_named_by_its_record(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    made = registry(EventListenerRecord(name="ledger", factory=f"{HERE}:FailingListener"))
    make_engine(plugins=made).generate([9, 8, 7], GREEDY)
    assert "event listener ledger failed in token and is dropped" in caplog.messages


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("family_of_no_kind", "'zorg' returned 42, which is no kvpage.api.model.ModelDefinition"),
        ("family_without_lengths", r"'zorg' fails on .*config.json \(TypeError: .*max_model_len"),
        ("family_that_raises", r"'zorg' fails on .*config.json \(ValueError: bad config\)"),
        ("family_without_a_weight", "'zorg': weights lack final_norm.weight, which the spec has"),
        ("HERE", "cannot be imported"),
    ],
)
def test_a_broken_family_is_named_by_an_engine_and_by_a_plan(
    tmp_path: Path, factory: str, reason: str
) -> None:
    model = write_checkpoint(tmp_path / "zorg", architectures=["ZorgForCausalLM"], tokenizer=False)
    made = registry(ModelRecord(name="zorg", factory=f"{HERE}:{factory}", architectures=("ZorgForCausalLM",)))
    with pytest.raises(PluginError, match=reason):
        Engine(model, plugins=made, skip_tokenizer_init=True)
    with pytest.raises(PluginError, match=reason):
        planned_model(EngineOptions(model=model), made)


def test_a_policy_that_is_none_is_refused_at_the_start(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="scheduling_policy must be the name of a policy"):
        Engine(tiny, scheduling_policy=object())


def test_a_block_that_no_sequence_can_fill_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="block_size=1048576 is more than a sequence of max_model_len=512"):
        Engine(tiny, block_size=1048576)


def test_a_plan_names_the_method_of_a_checkpoint_that_nobody_reads(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvpage.cli.main import main

    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["plan", str(tmp_path), "--memory", "8GB", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "quantized by 'mine' (quant_method), which no installed plugin reads" in err
    assert "--quantization" not in err
