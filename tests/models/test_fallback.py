"""Models that run through transformers: what a probe finds, who is refused and why, and what the host keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpage import Engine, SamplingParams
from kvpage.errors import CheckpointError, ConfigError
from kvpage.models.fallback.attention import Refused
from kvpage.models.fallback.model import load_fallback
from kvpage.models.fallback.source import FallbackDefinition, define_fallback
from kvpage.models.hf_config import HFConfig

TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def make(architecture: str, **config: Any) -> Any:
    """A tiny random model of transformers."""
    import transformers

    kind = getattr(transformers, architecture)
    return kind(kind.config_class(**{**TINY, **config})).eval()


def define(model: Any, **options: Any) -> FallbackDefinition:
    stated = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return define_fallback(HFConfig(stated), module=model, **options)


def load(model: Any) -> None:
    load_fallback(
        define(model), dtype=torch.float32, device="cpu", dummy=False, max_model_len=256, allocate=torch.empty
    )


def test_windows_become_groups_of_their_own() -> None:
    spec = define(make("Exaone4ForCausalLM", sliding_window=20, layer_types=WINDOWS)).spec
    assert [(group.kind, group.window, group.layers) for group in spec.kv_groups] == [
        ("window", 20, (0,)),
        ("full", None, (1,)),
    ]
    assert [layer.window for layer in spec.attention] == [20, None]


def test_a_window_as_long_as_the_context_is_none() -> None:
    spec = define(make("Exaone4ForCausalLM", sliding_window=256, layer_types=WINDOWS)).spec
    assert [group.kind for group in spec.kv_groups] == ["full"]


def test_scale_softcap_and_sizes_are_those_the_model_asks_for() -> None:
    spec = define(make("Gemma2ForCausalLM", attn_logit_softcapping=30.0, query_pre_attn_scalar=64)).spec
    first = spec.attention[0]
    assert (first.scale, first.softcap) == (1 / 8, 30.0)
    assert (first.num_heads, first.num_kv_heads, first.head_dim) == (4, 2, 8)
    assert (spec.vocab_size, spec.hidden_size, spec.max_position, spec.family) == (
        99,
        32,
        256,
        "Gemma2ForCausalLM",
    )


def test_sinks_are_seen() -> None:
    model = make("GptOssForCausalLM", num_local_experts=2, num_experts_per_tok=1, layer_types=WINDOWS)
    assert all(layer.sinks for layer in define(model).spec.attention)


def test_parameters_are_those_of_the_model() -> None:
    model = make("ArceeForCausalLM", tie_word_embeddings=True)
    parameters = define(model).spec.parameters
    assert {p.name: p.shape for p in parameters} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {p.part for p in parameters} == {"embedding", "attention", "mlp", "norms"}


def test_linear_rope_scaling_stretches_the_context() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    assert define(make("ArceeForCausalLM", rope_parameters=rope)).spec.max_position == 512


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": ("MambaForCausalLM", {}, "keep a state of their own"),
    "some layers recurrent": (
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 4},
        "keep a state of their own",
    ),
    "position biases": ("BloomForCausalLM", {"n_head": 4}, "attention-function registry"),
    "convolutions between": (
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"]},
        "1 of its 2 layers",
    ),
    "K and V differ": (
        "MiniCPM3ForCausalLM",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        "a head of K has 16 elements and one of V 8",
    ),
    "chunks": (
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "intermediate_size_mlp": 48},
        "chunked attention",
    ),
    "no causal mask": ("BertLMHeadModel", {"is_decoder": False}, "not causal"),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
        "encoder-decoder",
    ),
    "twice": ("DiffLlamaForCausalLM", {}, "attends more than once"),
    "keywords end at the layer": ("NemotronForCausalLM", {}, "do not hand keyword arguments down"),
    "mask of its own": ("DogeForCausalLM", {}, "a mask of its own"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_paged_attention_cannot_do_is_refused_with_the_reason(case: str) -> None:
    architecture, config, reason = REFUSALS[case]
    with pytest.raises(Refused, match=reason):
        define(make(architecture, **config))


def test_attention_that_changes_with_length_is_refused() -> None:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Scaled(LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            self.scaling = self.head_dim**-0.5 * (2.0 if hidden_states.shape[1] > 100 else 1.0)
            return super().forward(hidden_states, *arguments, **keywords)

    class ScaledLlama(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for index, layer in enumerate(self.model.layers):
                layer.self_attn = Scaled(config, index)

    with pytest.raises(Refused, match="depends on how many tokens run at once"):
        define(ScaledLlama(LlamaForCausalLM.config_class(**TINY)).eval())


def test_tokens_that_meet_outside_attention_are_found_before_the_model_is_trusted() -> None:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Leaking(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
            return super().forward(x + 0.5 * before)

    class LeakingLlama(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = Leaking(config)

    plain = LlamaForCausalLM(LlamaForCausalLM.config_class(**TINY, initializer_range=0.2)).eval()
    leaking = LeakingLlama(plain.config).eval()
    leaking.load_state_dict(plain.state_dict())
    load(plain)
    with pytest.raises(Refused, match="mixes tokens outside attention"):
        load(leaking)


def test_the_head_keeps_what_a_class_does_after_its_body() -> None:
    model = make("GraniteForCausalLM", logits_scaling=5.0)
    loaded = load_fallback(
        define(model), dtype=torch.float32, device="cpu", dummy=False, max_model_len=256, allocate=torch.empty
    )
    hidden = torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.logits(hidden), model.lm_head(hidden) / 5.0)


def test_neither_path_is_told_with_both_reasons(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["NewForCausalLM"], "model_type": "new"})
    )
    with pytest.raises(
        CheckpointError,
        match=r"NewForCausalLM cannot run through transformers: transformers .* has no class of that name.*"
        r"NewForCausalLM is not supported by a model family; .* kvpage_models. There are: cohere, .*, llama, ",
    ):
        Engine(tmp_path)


def test_a_config_without_architectures_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"its config states no 'architectures'.*add that key") as told:
        Engine(tmp_path)
    assert "kvpage_models" not in str(told.value)


@pytest.mark.parametrize(
    ("stated", "way_out"), [({"partial_rotary_factor": 0.5}, True), ({"hidden_size": -1}, False)]
)
def test_what_a_family_refuses_and_transformers_runs_is_told_with_the_option(
    tmp_path: Path, stated: dict[str, Any], way_out: bool
) -> None:
    make("LlamaForCausalLM").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] |= {k: v for k, v in stated.items() if k != "hidden_size"}
    config |= {k: v for k, v in stated.items() if k == "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refusal:
        Engine(tmp_path, skip_tokenizer_init=True)
    assert next(iter(stated)) in str(refusal.value)
    assert str(refusal.value).endswith("give model_impl='transformers'") == way_out
    if way_out:
        Engine(tmp_path, skip_tokenizer_init=True, model_impl="transformers").close()


def test_code_that_comes_with_a_checkpoint_needs_to_be_allowed(tmp_path: Path) -> None:
    config = {
        "architectures": ["NewForCausalLM"],
        "model_type": "new",
        "auto_map": {"AutoModelForCausalLM": "modeling_new.NewForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        Engine(tmp_path)


def test_without_transformers_the_way_to_get_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("ArceeForCausalLM").save_pretrained(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'kvpage\[transformers\]'"):
        Engine(tmp_path)


def test_model_impl_takes_one_path_or_refuses(tmp_path: Path) -> None:
    model = make("ArceeForCausalLM")
    with pytest.raises(CheckpointError, match="ArceeForCausalLM is not supported"):
        Engine(model, model_impl="kvpage")
    with pytest.raises(CheckpointError, match=r"^BloomForCausalLM cannot run through .* registry$"):
        Engine(make("BloomForCausalLM", n_head=4), model_impl="transformers")
    with pytest.raises(ConfigError, match="model_impl must be"):
        Engine(model, model_impl="vllm")


def test_a_tensor_that_is_missing_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("ArceeForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing .*up_proj"):
        Engine(tmp_path, skip_tokenizer_init=True)


def test_a_model_in_memory_stays_as_it_was_and_its_weights_are_shared() -> None:
    model = make("ArceeForCausalLM").train()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = (
        model.config.to_dict(),
        model.config._attn_implementation,
        model.training,
        vars(model.model).keys(),
    )
    hooks, logits = len(model._forward_pre_hooks), model(ids).logits
    with Engine(model, dtype="float32") as engine:
        first = engine.generate([{"prompt_token_ids": [3, 4, 5]}], GREEDY)[0].outputs[0].token_ids
        assert before == (
            model.config.to_dict(), model.config._attn_implementation, model.training, vars(model.model).keys()
        )  # fmt: skip
        assert len(model._forward_pre_hooks) == hooks
        assert torch.equal(model(ids).logits, logits)
        with torch.no_grad():
            model.lm_head.weight[first[0]] = 0.0
            model.lm_head.weight[first[0] + 1] *= 30.0
        changed = engine.generate([{"prompt_token_ids": [3, 4, 5]}], GREEDY)[0].outputs[0].token_ids
    assert changed != first


def test_a_model_in_memory_of_another_dtype_is_copied() -> None:
    model = make("ArceeForCausalLM")
    with Engine(model, dtype="bfloat16") as engine:
        assert len(engine.generate([{"prompt_token_ids": [3, 4, 5]}], GREEDY)[0].outputs[0].token_ids) == 8
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_host_is_left_as_it_was(
    tmp_path: Path, load_format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    make("ArceeForCausalLM").save_pretrained(tmp_path)
    capfd.readouterr()

    def portrait() -> list[Any]:
        state = [logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()]
        return [*state, torch.is_grad_enabled(), torch.random.get_rng_state().tolist()]

    before = portrait()
    with Engine(tmp_path, load_format=load_format, skip_tokenizer_init=True) as engine:
        tokens = engine.generate([{"prompt_token_ids": [3, 4, 5]}], GREEDY)[0].outputs[0].token_ids
    assert portrait() == before
    assert capfd.readouterr() == ("", "")
    with Engine(tmp_path, load_format=load_format, skip_tokenizer_init=True) as engine:
        assert engine.generate([{"prompt_token_ids": [3, 4, 5]}], GREEDY)[0].outputs[0].token_ids == tokens


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 9.0, 20.0], "original_max_position_embeddings": 64,
}  # fmt: skip


def test_a_rope_that_looks_at_the_longest_position_of_the_batch_is_refused() -> None:
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    model = make(
        "PhimoeForCausalLM", rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3}, **options
    )
    with pytest.raises(CheckpointError, match="PhimoeRotaryEmbedding turns a token by the longest position"):
        Engine(model)
    Engine(model, max_model_len=64).close()
    model = make(
        "PhimoeForCausalLM", rope_parameters={**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.2}, **options
    )
    Engine(model).close()


def test_positions_that_change_the_result_of_others_are_found_before_the_model_is_trusted() -> None:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    class Looking(LlamaRotaryEmbedding):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            cos, sin = super().forward(x, position_ids)
            return (cos, sin) if position_ids.max() < 100 else (1.5 * cos, 1.5 * sin)

    model = LlamaForCausalLM(LlamaForCausalLM.config_class(**TINY, initializer_range=0.3)).eval()
    load(model)
    model.model.rotary_emb = Looking(model.config)
    with pytest.raises(Refused, match="depends on the positions that run beside it"):
        load(model)


@pytest.mark.parametrize(("max_model_len", "told"), [(65, True), (64, False)])
def test_longrope_that_is_fixed_for_all_sequences_is_told(
    max_model_len: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="kvpage"):
        Engine(make("ArceeForCausalLM", rope_parameters=LONGROPE), max_model_len=max_model_len).close()
    assert ("longrope through transformers' own code is fixed at load" in caplog.text) == told


@pytest.mark.parametrize("folder", [True, False])
def test_an_engine_can_be_made_in_inference_mode_and_under_another_default_device(
    tmp_path: Path, folder: bool
) -> None:
    model = make("ArceeForCausalLM")
    model.save_pretrained(tmp_path)
    prompt = {"prompt_token_ids": [3, 4, 5]}
    found = []
    for mode in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with mode:  # type: ignore[attr-defined]
            engine = Engine(tmp_path if folder else model, skip_tokenizer_init=True)
        with engine:
            found.append(engine.generate([prompt], GREEDY)[0].outputs[0].token_ids)
    assert found[0] == found[1] == found[2]
