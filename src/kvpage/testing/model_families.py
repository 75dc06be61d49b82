"""The conformance suite of model families.

Subclass it in your tests, name your function, run pytest::

    from kvpage.testing.model_families import ModelFamilyConformance
    from mychip.zorg import translate

    class TestZorg(ModelFamilyConformance):
        translate = translate
        architecture = "ZorgForCausalLM"
        configs = [{"hidden_size": 32, "num_hidden_layers": 2, ...}]

A definition is proven to be whole: every parameter has a place, every layer a KV tensor. Then an engine runs it on
made-up weights. Whether it is the right model only an ``oracle`` can tell; give one.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch

from kvpage import CheckpointError, Engine
from kvpage.api.model import AttentionSpec, DecoderSpec, LayerSpec, ModelDefinition, WeightRef
from kvpage.api.parameters import parameters
from kvpage.testing.comparing import require
from kvpage.testing.family_rig import (
    Translate,
    config_of,
    factory_of,
    generated,
    opened,
    require_tokens,
    tokens_of,
)
from kvpage.testing.suite import ConformanceError, ConformanceSuite, not_claimed

Oracle: TypeAlias = tuple[Mapping[str, torch.Tensor], Callable[[Sequence[int]], torch.Tensor]]
"""A checkpoint's tensors by its own names, and the logits [L, V] of every position of L tokens."""

PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2), (2, 7, 1), (1, 6, 1, 8, 0, 3, 3, 9, 8, 8))
HEAD = "head.weight"
WITHOUT_TORCH = """
import importlib, json, pickle, sys
sys.path[:] = json.loads(sys.argv[1])
module, name, config = pickle.load(sys.stdin.buffer)
getattr(importlib.import_module(module), name)(config, max_model_len=None)
print(" ".join(sorted({"torch", "transformers"} & set(sys.modules))))
"""


class ModelFamilyConformance(ConformanceSuite):
    """Subclass it, set ``translate``, ``architecture`` and ``configs``.

    Attributes:
        translate: the family: (ModelConfig, *, max_model_len: int | None) -> ModelDefinition.
        architecture: what your ModelRecord names in ``architectures``.
        configs: what config.json says, of tiny models that together use what the family reads. At least one.
        context_key: where the context length stands in them.
        tolerance: how far a log-probability may be from the oracle's.
    """

    translate: ClassVar[Any]
    architecture: ClassVar[str]
    configs: ClassVar[Sequence[Mapping[str, Any]]]
    context_key: ClassVar[str] = "max_position_embeddings"
    tolerance: ClassVar[float] = 2e-4

    def oracle(self, config: Mapping[str, Any]) -> Oracle | None:
        """A checkpoint of ``config`` and its logits by somebody else's code; ``None``: there is none."""
        return None

    def axes(self) -> dict[str, Sequence[Any]]:
        return {"config": range(len(self.configs))}

    def test_translation_is_a_definition(self, config: int) -> None:
        """A ModelDefinition with a DecoderSpec of as many layers as the config says; the same at every call."""
        values = self.configs[config]
        found = self._define(values)
        require(
            isinstance(found, ModelDefinition) and isinstance(found.spec, DecoderSpec),
            "definition",
            f"translate returned {found!r:.80}, expected a ModelDefinition of a DecoderSpec",
        )
        wrong = [layer for layer in found.spec.layers if not isinstance(layer, LayerSpec)]
        require(
            bool(found.spec.layers) and not wrong,
            "definition",
            f"layers are {wrong!r:.80}, expected LayerSpecs",
        )
        stated = values.get("num_hidden_layers", len(found.spec.layers))
        require(
            len(found.spec.layers) == stated,
            "layers",
            f"the definition has {len(found.spec.layers)}, num_hidden_layers is {stated}",
        )
        require(
            self._define(values) == found, "definition", "a second call gave another one of the same config"
        )

    def test_every_parameter_has_a_place(self, config: int) -> None:
        """``weights`` names every parameter of the spec and nothing else, and no two of a layer lie in one place."""
        found = self._define(self.configs[config])
        needed = [parameter.name for parameter in parameters(found.spec)]
        missing = [name for name in needed if name not in found.weights]
        require(not missing, "weight map", f"no place for {_some(missing)}, of {len(needed)} parameters")
        allowed = {*needed, HEAD} if found.spec.head.tied else set(needed)
        extra = [name for name in found.weights if name not in allowed]
        require(not extra, "weight map", f"the spec has no parameter {_some(extra)}")
        places: dict[tuple[str, WeightRef], str] = {}
        for name in needed:
            ref = found.weights[name]
            require(
                isinstance(ref, WeightRef) and bool(ref.name),
                "weight map",
                f"the place of {name} is {ref!r:.80}, expected a WeightRef",
            )
            layer = ".".join(name.split(".")[:2])
            other = places.setdefault((layer, ref), name)
            require(other == name, "weight map", f"{other} and {name} both lie in {ref}")

    def test_kv_groups_hold_every_layer_once(self, config: int) -> None:
        """A layer's (kv_group, kv_index) is its place in that group's ``layers``; heads and window are the group's."""
        spec = self._define(self.configs[config]).spec
        held = Counter(layer for group in spec.kv_groups for layer in group.layers)
        wrong = {layer: held[layer] for layer in {*held, *range(len(spec.layers))} if held[layer] != 1}
        require(
            not wrong and set(held) == set(range(len(spec.layers))),
            "KV groups",
            f"times that a layer is in a group, expected once each of {len(spec.layers)}: {wrong}",
        )
        for index, layer in enumerate(spec.attention):
            at = (layer.kv_group, layer.kv_index)
            group = spec.kv_groups[at[0]] if 0 <= at[0] < len(spec.kv_groups) else None
            there = group.layers[at[1]] if group and 0 <= at[1] < len(group.layers) else "nothing"
            require(
                there == index, "KV groups", f"layer {index} says (kv_group, kv_index) {at}: there is {there}"
            )
            assert group is not None, "it holds the layer"
            mine = (layer.num_kv_heads, layer.head_dim, layer.v_head_dim, layer.window)
            its = (group.num_kv_heads, group.head_dim, group.v_head_dim, group.window)
            names = "(KV heads, head dim, V head dim, window)"
            require(mine == its, "KV groups", f"layer {index} has {names} {mine}, its group {at[0]} {its}")
            require(
                (group.kind == "window") == (group.window is not None),
                "KV groups",
                f"group {at[0]} is of kind {group.kind!r} with window {group.window}",
            )

    def test_max_position_follows_the_config(self, config: int) -> None:
        """``max_position`` is what the config states, or follows it where rope is stretched."""
        values = self.configs[config]
        stated = values.get(self.context_key)
        if not isinstance(stated, int):
            not_claimed(f"config {config} does not say {self.context_key}; set context_key")
        found = self._define(values).spec.max_position
        plain = not values.get("rope_scaling") and not values.get("rope_parameters")
        require(
            found == stated if plain else found > 0,
            "max_position",
            f"{found}, expected {stated}, which {self.context_key} states",
        )
        half = {**values, self.context_key: stated // 2}
        less = self._define(half).spec.max_position
        require(
            less < found,
            "max_position",
            f"{less} with {self.context_key} {stated // 2}, {found} with {stated}",
        )

    def test_max_model_len_changes_nothing_but_rope(self, config: int) -> None:
        """What an engine is asked for may fix rope frequencies, and nothing else of the model."""
        values = self.configs[config]
        first = self._define(values)
        for length in (first.spec.max_position, max(1, first.spec.max_position // 2)):
            other = self._define(values, max_model_len=length)
            require(
                other.weights == first.weights, "max_model_len", f"the weight map is another with {length}"
            )
            for name in DecoderSpec.__dataclass_fields__:
                was, now = (_without_rope(definition.spec, name) for definition in (first, other))
                require(
                    was == now,
                    "max_model_len",
                    f"spec.{name} follows max_model_len={length}: got {now!r:.200}, expected {was!r:.200}",
                )

    def test_missing_and_wrong_keys_are_checkpoint_errors(self, config: int) -> None:
        """A key that is not there has a default, or is a CheckpointError that names it; so is one of another type."""
        values = self.configs[config]
        for key in values:
            rest = {name: value for name, value in values.items() if name != key}
            self._refused_well(rest, key, "missing", named=True)
            self._refused_well({**rest, key: {"of": "another type"}}, key, "a dict", named=False)

    def test_translation_needs_no_torch(self) -> None:
        """``kvpage plan`` translates where no torch is loaded: importing and calling the family loads none."""
        translate = self._translate()
        if translate.__module__ == type(self).__module__:
            not_claimed("translate is defined beside its test; a plugin's module is what matters")
        module, _, name = factory_of(translate).partition(":")
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, json.dumps(sys.path)],
            input=pickle.dumps((module, name, config_of(self.configs[0]))),
            capture_output=True,
            check=False,
            env=dict(os.environ),
        )
        require(run.returncode == 0, "no torch", f"in a fresh process: {run.stderr.decode()[-400:]}")
        loaded = run.stdout.decode().strip()
        require(not loaded, "no torch", f"importing {module} and calling {name} loads {loaded}")

    def test_engine_gives_the_same_tokens_however_it_runs(self, config: int) -> None:
        """On made-up weights: alone, in a batch, prompts in chunks, and a block for every token."""
        values = self.configs[config]
        longest = self._define(values).spec.max_position
        prompts = [prompt[: longest // 2] for prompt in PROMPTS]
        count = min(12, longest - longest // 2)
        ways: dict[str, dict[str, Any]] = {
            "in a batch": {},
            "in chunks": {"max_num_batched_tokens": 5},
            "with block size 1": {"block_size": 1},
        }
        kinds: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "seed": 3})
        with self._engine(values, enable_prefix_caching=False) as engine:
            alone = [[generated(engine, [p], count, **kind)[0] for p in prompts] for kind in kinds]
        for way, options in ways.items():
            with self._engine(values, **options) as engine:
                for kind, expected in zip(kinds, alone, strict=True):
                    together = generated(engine, prompts, count, **kind)
                    for index, (one, other) in enumerate(zip(together, expected, strict=True)):
                        note = f"config {config}, prompt {index}, {kind or 'greedy'}: {way} against alone"
                        require_tokens(f"same tokens {way}", tokens_of(one), tokens_of(other), note)

    def test_engine_gives_the_oracles_tokens(self, config: int) -> None:
        """Greedy tokens and their log-probabilities are the oracle's, at every position."""
        values = self.configs[config]
        given = self.oracle(values)
        if given is None:
            not_claimed(f"no oracle for config {config}: whether it is the right model is not proven")
        tensors, logits = given
        with self._engine(values, tensors=tensors) as engine:
            outputs = generated(engine, PROMPTS, 8, logprobs=3)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            tokens = tokens_of(output)
            exact = logits([*prompt, *tokens]).detach().double().cpu().log_softmax(-1)
            for step, (token, found) in enumerate(zip(tokens, output.outputs[0].logprobs or (), strict=True)):
                row = exact[len(prompt) + step - 1]
                self._near(int(row.argmax()), row, token, f"greedy token {step} after {len(prompt)} tokens")
                for other, logprob in found.items():
                    difference = abs(logprob.logprob - float(row[other]))
                    require(
                        difference <= self.tolerance,
                        "oracle",
                        f"log-probability of token {other} at position {len(prompt) + step}: got {logprob.logprob:.7g}, "
                        f"expected {float(row[other]):.7g} (may differ by {self.tolerance:g})\n  config {config}",
                    )

    # ---- the subject ------------------------------------------------------------------------------------

    def _translate(self) -> Translate:
        # Not through the instance: a function in a class body would be bound to it.
        found = next(vars(kind)["translate"] for kind in type(self).__mro__ if "translate" in vars(kind))
        translate: Translate = found.__func__ if isinstance(found, staticmethod) else found
        return translate

    def _define(self, values: Mapping[str, Any], max_model_len: int | None = None) -> ModelDefinition:
        return self._translate()(config_of(values), max_model_len=max_model_len)

    @contextmanager
    def _engine(self, values: Mapping[str, Any], **options: Any) -> Iterator[Engine]:
        factory = factory_of(self._translate())
        with (
            tempfile.TemporaryDirectory() as folder,
            opened(Path(folder), values, self.architecture, factory, **options) as engine,
        ):
            yield engine

    def _refused_well(self, values: Mapping[str, Any], key: str, how: str, *, named: bool) -> None:
        try:
            config = config_of(values)
        except CheckpointError:
            return  # the engine itself refuses it, before a family is asked
        try:
            self._translate()(config, max_model_len=None)
        except CheckpointError as error:
            require(
                not named or key in str(error),
                "missing keys",
                f"without {key!r} the message does not name it: {error}",
            )
        except Exception as error:
            raise ConformanceError(
                "missing keys",
                f"{key!r} {how}: {type(error).__name__} ({error}) instead of a CheckpointError that names it",
            ) from error

    def _near(self, best: int, row: torch.Tensor, token: int, where: str) -> None:
        behind = float(row[best] - row[token])
        require(
            behind <= self.tolerance,
            "oracle",
            f"{where} is {token}, expected {best}: {behind:.4g} more likely by the oracle",
        )


def _without_rope(spec: DecoderSpec, field: str) -> object:
    """A field of the spec, rope left out of its layers."""
    if field != "layers":
        return getattr(spec, field)
    return [
        (replace(layer, mixer=replace(attention, rope=None)), isinstance(layer.mixer, AttentionSpec))
        for layer, attention in zip(spec.layers, spec.attention, strict=True)
    ]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
