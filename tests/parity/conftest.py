"""Tiny random checkpoints made with transformers, and its greedy continuation as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Maker = Callable[..., tuple[Any, Path]]
Oracle = Callable[[Any, list[list[int]], int], list[list[int]]]


@pytest.fixture
def make_model(tmp_path: Path) -> Maker:
    """make_model(architecture, seed, **config) -> (transformers model in float32, folder of its checkpoint)."""

    def make(architecture: str, seed: int = 0, **config: Any) -> tuple[Any, Path]:
        import transformers

        kind = getattr(transformers, architecture)
        values = {
            "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15, **config,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = kind(kind.config_class(**values))
        model = model.float().eval()
        model.generation_config.eos_token_id = None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        folder = tmp_path / f"{architecture}-{seed}"
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def greedy_oracle() -> Oracle:
    """greedy_oracle(model, prompts, count, claimed) -> ``count`` tokens after each prompt, computed alone; EOS ends
    nothing.

    ``claimed``, tokens said to be these, saves most of the time: where one forward pass over prompt and tokens has
    each of them as its likeliest next one, they are the greedy ones, and nothing is generated.
    """

    @torch.inference_mode()
    def confirmed(model: Any, prompt: list[int], tokens: list[int]) -> bool:
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        return bool((logits.argmax(-1) == torch.tensor(tokens)).all())

    def generated(model: Any, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(out[0, len(prompt) :].tolist())

    def continue_alone(
        model: Any, prompts: list[list[int]], count: int, claimed: list[list[int]] | None = None
    ) -> list[list[int]]:
        if claimed is None or rope_depends_on_length(model.config):
            return [generated(model, prompt, count) for prompt in prompts]
        return [
            tokens
            if len(tokens) == count and confirmed(model, prompt, tokens)
            else generated(model, prompt, count)
            for prompt, tokens in zip(prompts, claimed, strict=True)
        ]

    return continue_alone


def rope_depends_on_length(config: Any) -> bool:
    """Whether one pass over all tokens turns them otherwise than passes over fewer did."""
    return any(kind in str(config.to_dict().get("rope_parameters")) for kind in ("longrope", "dynamic"))
