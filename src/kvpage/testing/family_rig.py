"""A model family inside a real engine: configs as an engine reads them, and made-up checkpoints that it runs."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvpage import CheckpointError, Engine, PluginRegistry, RequestOutput, SamplingParams, hookimpl
from kvpage.api.model import ModelConfig, ModelDefinition
from kvpage.api.records import ModelRecord
from kvpage.testing.checkpoints import write_folder
from kvpage.testing.comparing import require
from kvpage.testing.suite import not_claimed

Translate = Callable[..., ModelDefinition]


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """A config.json of these values, as an engine hands it to a family; for a family's own tests too.

    Raises:
        CheckpointError: no engine would read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with opened(Path(folder), values, "HandedOver", f"{__name__}:hand_over"):
                raise AssertionError("an engine was made without a model")
        except HandedOver as answer:
            return answer.config


class HandedOver(CheckpointError):
    """Carries the config that an engine read out of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("the config was asked for, and no model")
        self.config = config


def hand_over(config: ModelConfig, *, max_model_len: int | None) -> ModelDefinition:
    """A family that only wants to see the config."""
    raise HandedOver(config)


@contextmanager
def opened(
    folder: Path,
    config: Mapping[str, Any],
    architecture: str,
    factory: str,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> Iterator[Engine]:
    """An engine on a checkpoint of ``config``, in float32; without ``tensors`` its weights are made up."""
    write_folder(folder, {**config, "architectures": [architecture]}, tensors or {})
    given = {
        "load_format": "auto" if tensors else "dummy",
        "skip_tokenizer_init": True,
        "model_impl": "kvpage",
        "dtype": "float32",
        "generation_config": "none",
        "num_kv_blocks": 256,
        "max_num_seqs": 4,
        "seed": 0,
    }
    registry = PluginRegistry(plugins=[_Plugin(architecture, factory)], entry_points=False, strict=True)
    with Engine(str(folder), **{**given, **options}, plugins=registry) as engine:
        yield engine


class _Plugin:
    """Registers one family."""

    def __init__(self, architecture: str, factory: str) -> None:
        self._record = ModelRecord(name="subject", factory=factory, architectures=(architecture,))

    @hookimpl
    def kvpage_models(self) -> Sequence[ModelRecord]:
        """The family under test."""
        return [self._record]


def factory_of(translate: Translate) -> str:
    """What a ModelRecord would name; skips where nothing can be named."""
    name = getattr(translate, "__qualname__", "")
    if not name.isidentifier() or not inspect.isfunction(translate):
        not_claimed(f"{name or translate!r} cannot be imported by name, so no record can name it")
    return f"{translate.__module__}:{name}"


def generated(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, **values: Any
) -> list[RequestOutput]:
    """Greedy continuations unless ``values`` say otherwise; no token ends them."""
    params = SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **values})
    return list(engine.generate([list(prompt) for prompt in prompts], [params] * len(prompts)))


def tokens_of(output: RequestOutput) -> list[int]:
    """The one choice's."""
    return list(output.outputs[0].token_ids)


def require_tokens(property: str, got: Sequence[int], expected: Sequence[int], note: str) -> None:
    """Both are the same; else the first token that differs is named."""
    __tracebackhide__ = True
    pairs = zip(got, expected, strict=False)
    wrong = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(expected)))
    require(
        list(got) == list(expected),
        property,
        f"token {wrong} is {list(got[wrong : wrong + 1])}, expected {list(expected[wrong : wrong + 1])}; {list(got)} "
        f"against {list(expected)}\n  {note}",
    )
