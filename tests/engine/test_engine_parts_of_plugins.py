"""An engine made of parts that plugins bring, and an engine beside plugins that are broken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_state import MakeEngine
from parts_of_plugins import SELF, SUFFIX, Counting, CountingLinear, Plugin, pack

import kvpage
from installed_plugins import install, policy_plugin
from kvpage import (
    CheckpointError,
    ConfigError,
    Engine,
    PluginError,
    PluginRegistry,
    RequestError,
    SamplingParams,
)
from kvpage.api.records import (
    CheckpointReaderRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    Record,
    SchedulingPolicyRecord,
)
from kvpage.config import EngineOptions
from kvpage.inspect.checkpoint import planned_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PACKED = CheckpointReaderRecord(name="packed", factory=f"{SELF}:Packed", files=("*" + SUFFIX,))


def registry(*records: Record) -> PluginRegistry:
    return PluginRegistry(plugins=[Plugin(*records)], entry_points=False, strict=True)


def decoder(name: str, factory: str, priority: int = 0) -> DecoderBackendRecord:
    return DecoderBackendRecord(name=name, factory=f"{SELF}:{factory}", priority=priority)


def token_ids(engine: Engine) -> list[int]:
    return list(engine.generate([9, 8, 7], GREEDY)[0].outputs[0].token_ids)


PROGRAM = """
import json, logging, sys
logging.basicConfig(stream=sys.stderr)
from kvpage import Engine, PluginRegistry, SamplingParams
registry = PluginRegistry()
with Engine(sys.argv[1], plugins=registry) as engine:
    (output,) = engine.generate([9, 8, 7], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
print(json.dumps([output.outputs[0].token_ids, [[s.name, s.origin, s.status, s.reason] for s in registry.statuses()]]))
"""


def test_an_engine_starts_beside_broken_distributions_and_each_is_listed(tiny: Path, tmp_path: Path) -> None:
    install(tmp_path, "kvpage-a", "raising = a_plugin", "raise RuntimeError('no driver')")
    install(
        tmp_path, "kvpage-b", "misspelt = b_plugin", "@hookimpl\ndef kvpage_attention_backend(): return []"
    )
    install(tmp_path, "kvpage-c", "newer = c_plugin", "KVPAGE_API_VERSION = '1.2'\n" + policy_plugin("c"))
    install(tmp_path, "kvpage-d", "same = d_plugin", policy_plugin("d"))
    install(tmp_path, "kvpage-e", "same = e_plugin", policy_plugin("e"))
    install(tmp_path, "kvpage-f", "zealous = f_plugin", policy_plugin("d"))
    install(tmp_path, "kvpage-g", "leaving = g_plugin", "raise SystemExit(1)")
    paths = [str(tmp_path), str(Path(kvpage.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("KVPAGE_PLUGINS", None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny)],
        capture_output=True, text=True, timeout=100, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    tokens, statuses = json.loads(run.stdout)
    with Engine(tiny, plugins=PluginRegistry(entry_points=False)) as engine:
        assert tokens == token_ids(engine)
    found = {(name, origin): (status, reason) for name, origin, status, reason in statuses}
    active = [
        key for key, (status, _) in found.items() if status == "active" and key[1].startswith("kvpage-")
    ]
    assert active == [("same", "kvpage-d")]
    assert found["builtin", "kvpage"][0] == "active"
    for key, reason in {
        ("raising", "kvpage-a"): "RuntimeError: no driver",
        (
            "misspelt",
            "kvpage-b",
        ): "kvpage_attention_backend is no hook; did you mean kvpage_attention_backends?",
        ("newer", "kvpage-c"): "newer needs kvpage api 1.2, this is 1.0: pip install -U kvpage",
        ("same", "kvpage-e"): "kvpage-e offers a plugin 'same', a name that kvpage-d already has",
        ("zealous", "kvpage-f"): "'d' is already registered by 'same' (kvpage-d)",
        ("leaving", "kvpage-g"): "SystemExit: 1",
    }.items():
        assert found[key][0] == "failed"
        assert reason in found[key][1]
        assert f"plugin {key[0]} ({key[1]}) is left out: " in run.stderr


def test_an_engine_says_which_backends_it_took_and_why(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kvpage")
    records = (
        decoder("refusing", "Refusing", 9),
        decoder("declining", "Declining", 8),
        decoder("counting", "Counting"),
    )
    Counting.built.clear()
    engine = make_engine(plugins=registry(*records))
    config = engine.config
    assert (config.attention_backend, config.decoder_backend) == ("reference", "counting")
    assert Counting.built == ["llama"]
    assert config.reasons["attention_backend"] == "reference (by priority)"
    assert config.reasons["decoder_backend"] == (
        "counting (by priority; refusing: no: 2 layers are too many; "
        "declining: no: the weights lie the wrong way round)"
    )
    assert "attention backend reference, decoder counting" in caplog.messages
    assert "decoder backend declining: no: the weights lie the wrong way round" in caplog.messages
    plain = make_engine(decoder_backend="torch", attention_backend="reference")
    assert plain.config.reasons["decoder_backend"] == "torch (given)"
    assert token_ids(engine) == token_ids(plain)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("refusing", "decoder_backend='refusing' cannot run this model: refusing: 2 layers are too many"),
        ("declining", "declining: no: the weights lie the wrong way round"),
        ("nope", "decoder_backend='nope' is not registered; known: declining, refusing, torch"),
    ],
)
def test_a_named_decoder_backend_that_does_not_take_the_model_is_an_error(
    tiny: Path, name: str, reason: str
) -> None:
    records = (decoder("refusing", "Refusing"), decoder("declining", "Declining"))
    with pytest.raises(ConfigError, match=reason):
        Engine(tiny, plugins=registry(*records), decoder_backend=name)


def test_a_linear_kernel_of_a_plugin_computes_what_it_supports_and_a_broken_one_is_left_out(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    CountingLinear.rows.clear()
    engine = make_engine(
        plugins=registry(
            LinearKernelRecord(name="gone", factory=f"{SELF}:Gone", priority=99),
            LinearKernelRecord(name="counting", factory=f"{SELF}:CountingLinear", priority=98),
        )
    )
    assert "linear kernel gone: no: gone: parts_of_plugins:Gone cannot be imported" in caplog.text
    assert token_ids(engine) == token_ids(make_engine())
    assert 3 in CountingLinear.rows


@pytest.mark.parametrize("named", ["file", "folder", "load_format"])
def test_a_checkpoint_of_a_plugin_s_format_runs_with_its_config_weights_and_tokenizer(
    make_engine: MakeEngine, tiny: Path, tmp_path: Path, named: str
) -> None:
    file = pack(tiny, tmp_path / "packed")
    options: dict[str, Any] = {"load_format": "packed"} if named == "load_format" else {}
    model = file if named == "file" else file.parent
    engine = make_engine(model, plugins=registry(PACKED), **options)
    assert token_ids(engine) == token_ids(make_engine())
    (text,) = engine.generate("The block pool", GREEDY)
    assert text.prompt_token_ids == make_engine().generate("The block pool", GREEDY)[0].prompt_token_ids


def test_a_plan_reads_a_plugin_s_format_as_it_reads_safetensors(tiny: Path, tmp_path: Path) -> None:
    made = registry(PACKED)
    packed = planned_model(EngineOptions(model=pack(tiny, tmp_path / "packed")), made)
    plain = planned_model(EngineOptions(model=tiny), made)
    assert packed.stored == plain.stored != {}
    assert packed.spec == plain.spec


def test_one_safetensors_file_is_a_model_with_the_config_beside_it(
    make_engine: MakeEngine, tiny: Path
) -> None:
    engine = make_engine(tiny / "model.safetensors", plugins=registry())
    assert token_ids(engine) == token_ids(make_engine())


def test_a_reader_that_raises_is_named_with_what_it_raised(tmp_path: Path) -> None:
    (tmp_path / "model.bad").touch()
    bad = CheckpointReaderRecord(name="bad", factory=f"{SELF}:Doubling", files=("*.bad",))
    match = r"the checkpoint reader 'bad' fails \(KeyError: 'general.architecture', at \S+:\d+\)"
    with pytest.raises(CheckpointError, match=match):
        Engine(tmp_path, plugins=registry(bad))
    with pytest.raises(CheckpointError, match="fails"):
        planned_model(EngineOptions(model=tmp_path), registry(bad))


def test_a_load_format_that_nobody_registered_lists_those_there_are(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="'auto', 'dummy', 'safetensors', 'packed', got 'gguf'"):
        Engine(tiny, plugins=registry(PACKED), load_format="gguf")


def test_a_processor_that_is_not_there_refuses_the_requests_that_name_it_alone(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    made = registry(LogitsProcessorRecord(name="gone", factory="no_such_module:Gone"))
    engine = make_engine(plugins=made)
    assert "logits processor gone: no_such_module:Gone cannot be imported" in caplog.text
    with pytest.raises(RequestError, match="no_such_module:Gone cannot be imported"):
        engine.generate([9], GREEDY.clone(logits_processors=["gone"]))
    assert token_ids(engine)


def test_a_policy_that_cannot_be_made_is_named(tiny: Path) -> None:
    made = registry(SchedulingPolicyRecord(name="unmakable", factory=f"{SELF}:UnmakablePolicy"))
    with pytest.raises(PluginError, match=r"'unmakable' cannot be made .*boom in the constructor"):
        Engine(tiny, plugins=made, scheduling_policy="unmakable")
