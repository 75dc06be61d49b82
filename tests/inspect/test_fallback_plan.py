"""A plan of a model that runs through transformers: by which path, what it takes, on how many devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpage.config import EngineOptions
from kvpage.errors import ConfigError
from kvpage.inspect.checkpoint import planned_model
from kvpage.inspect.plan import Devices, plan_memory
from kvpage.plugins import PluginRegistry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without weights, of an architecture without a family."""
    from transformers import ArceeConfig

    place = tmp_path_factory.mktemp("arcee")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ArceeConfig(
        **shape,
        vocab_size=99,
        max_position_embeddings=256,
        architectures=["ArceeForCausalLM"],
        dtype="float32",
    ).save_pretrained(place)
    return place


def test_a_plan_says_by_which_path_a_model_runs(folder: Path) -> None:
    options = EngineOptions(model=str(folder))
    plan = plan_memory(planned_model(options, PluginRegistry()), options, Devices(kind="cpu", memory=2**32))
    assert "model path: transformers fallback (ArceeForCausalLM)" in plan.to_text()
    assert plan.to_dict()["model_path"].startswith("transformers fallback")
    demo = EngineOptions()
    plan = plan_memory(planned_model(demo, PluginRegistry()), demo, Devices(kind="cpu", memory=2**32))
    assert "model path: family llama" in plan.to_text()


def test_its_weights_are_those_that_transformers_makes(folder: Path) -> None:
    from transformers import ArceeConfig, ArceeForCausalLM

    options = EngineOptions(model=str(folder))
    plan = plan_memory(planned_model(options, PluginRegistry()), options, Devices(kind="cpu", memory=2**32))
    made = ArceeForCausalLM(ArceeConfig.from_pretrained(folder))
    assert plan.weights.parameters == sum(parameter.numel() for parameter in made.parameters())
    assert plan.weights.total_bytes == 4 * plan.weights.parameters


def test_it_cannot_be_split(folder: Path) -> None:
    options = EngineOptions(model=str(folder))
    with pytest.raises(ConfigError, match="runs through transformers, on one device; possible are 1"):
        plan_memory(
            planned_model(options, PluginRegistry()), options, Devices(kind="cpu", memory=2**32, count=2)
        )
