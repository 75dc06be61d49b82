"""Builtin families keep the contract of families, and the suite names the mistakes planted in others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import small_families
from planted import finds
from small_families import GEMMA2, LLAMA, llama_oracle

from kvpage.models.families import gemma2, llama
from kvpage.testing.family_rig import config_of
from kvpage.testing.model_families import ModelFamilyConformance, Oracle


class TestLlama(ModelFamilyConformance):
    translate = llama.translate
    architecture = "SuiteLlamaForCausalLM"
    configs = [LLAMA, {**LLAMA, "num_key_value_heads": 1, "num_hidden_layers": 3}]

    def oracle(self, config: Mapping[str, Any]) -> Oracle | None:
        return llama_oracle(config)


class TestGemma2(ModelFamilyConformance):
    translate = staticmethod(gemma2.translate)
    architecture = "SuiteGemma2ForCausalLM"
    configs = [GEMMA2]


def test_a_config_is_read_as_an_engine_reads_it() -> None:
    config = config_of({**LLAMA, "rope_theta": 5e5})
    assert config.count("hidden_size") == 32
    assert config.rope_parameters() == {"rope_type": "default", "rope_theta": 5e5}
    assert config.source.endswith("config.json")


class OfTheSuite(ModelFamilyConformance):
    architecture = "SuiteLlamaForCausalLM"
    configs = [LLAMA]

    def oracle(self, config: Mapping[str, Any]) -> Oracle | None:
        return llama_oracle(config)


@pytest.mark.parametrize(
    ("translate", "case", "message"),
    [
        ("a_dict_it_returns", "translation_is_a_definition[0]", "definition: translate returned {'spec': None}"),
        ("another_at_every_call", "translation_is_a_definition[0]", "definition: a second call gave another one"),
        ("values_read_from_keys", "every_parameter_has_a_place[0]",
         r"weight map: layers\.1\.attention\.k\.weight and layers\.1\.attention\.v\.weight both lie in WeightRef"),
        ("values_read_from_keys", "engine_gives_the_oracles_tokens[0]", "oracle: "),
        ("a_norm_forgotten", "every_parameter_has_a_place[0]", r"weight map: no place for final_norm\.weight"),
        ("a_bias_too_many", "every_parameter_has_a_place[0]", r"weight map: the spec has no parameter head\.bias"),
        ("one_kv_tensor_for_all", "kv_groups_hold_every_layer_once[0]",
         r"KV groups: layer 1 says \(kv_group, kv_index\) \(0, 0\): there is 0"),
        ("context_of_its_own", "max_position_follows_the_config[0]", "max_position: 2048, expected 96"),
        ("context_cut_to_what_is_asked", "max_model_len_changes_nothing_but_rope[0]",
         r"max_model_len: spec\.max_position follows max_model_len=48: got 48, expected 96"),
        ("reads_what_may_be_missing", "missing_and_wrong_keys_are_checkpoint_errors[0]",
         r"missing keys: 'num_key_value_heads' missing: TypeError \(.*\) instead of a CheckpointError"),
        ("hides_what_is_missing", "missing_and_wrong_keys_are_checkpoint_errors[0]",
         "missing keys: without 'vocab_size' the message does not name it"),
        ("a_norm_forgotten", "translation_needs_no_torch", "no torch: importing small_families and calling .* loads torch"),
        ("scaled_by_another_size", "engine_gives_the_oracles_tokens[0]",
         r"oracle: log-probability of token \d+ at position 17: got \S+, expected \S+|oracle: greedy token 0"),
    ],
)  # fmt: skip
def test_a_familys_bug_is_named(translate: str, case: str, message: str) -> None:
    subject = staticmethod(getattr(small_families, translate))
    finds(OfTheSuite, f"test_{case}", message, translate=subject)
