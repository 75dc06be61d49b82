"""What plugins bring that is broken in one way each; tests of the engine register them by import string."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from kvpage.api.attention import AttentionBackend, AttentionEnv
from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.events import EventListener
from kvpage.api.kv import KVLayout
from kvpage.api.model import ModelDefinition
from kvpage.api.sampling import LogitsProcessor
from kvpage.api.scheduling import SchedulingPolicy
from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.models.decoder import TorchDecoder
from kvpage.models.families import llama
from kvpage.nn.linear import DenseLinear
from kvpage_int8.schemes import Int8


class NoChip(ReferenceAttention):
    def __init__(self, env: AttentionEnv) -> None:
        raise RuntimeError("no chip in this machine")


class NoLayout(ReferenceAttention):
    def kv_layout(self) -> Any:
        return None


class UnknownDtype(ReferenceAttention):
    def kv_layout(self) -> KVLayout:
        return replace(super().kv_layout(), dtype="float33")


class FewBlocks(ReferenceAttention):
    def kv_layout(self) -> KVLayout:
        layout = super().kv_layout()
        return replace(layout, shape=(layout.shape[0] - 1, *layout.shape[1:]))


class FewBlocksOnly(ReferenceAttention):
    """Can be made on trial, and not for a whole pool."""

    def __init__(self, env: AttentionEnv) -> None:
        super().__init__(env)
        if env.num_blocks > 100:
            raise RuntimeError(f"{env.num_blocks} blocks do not fit")


class Abstract(AttentionBackend):
    caps = ReferenceAttention.caps


class DictCaps(ReferenceAttention):
    caps: ClassVar[Any] = {"devices": {"cpu"}}


class OverNoChip(TorchDecoder):
    attention = "chip"


class Unbuildable(TorchDecoder):
    def build(self, spec: Any, weights: Any, env: Any) -> Any:
        raise RuntimeError("no kernel image")


class FailingLinear(DenseLinear):
    name = "failing"

    @classmethod
    def supports(cls, form: Any, env: Any) -> list[str]:
        raise RuntimeError("driver gone")


class NaNs(LogitsProcessor):
    def admit(self, slot: int, params: Any, prompt_ids: Any) -> None: ...

    def apply(self, logits: torch.Tensor, slots: Any) -> torch.Tensor:
        return logits.fill_(torch.nan)


class Unadmitting(NaNs):
    def admit(self, slot: int, params: Any, prompt_ids: Any) -> None:
        raise KeyError("limit")


class FailingListener(EventListener):
    def token(self, *given: Any) -> None:
        raise RuntimeError("disk full")


class Careless(SchedulingPolicy):
    """Raises for prompts of seven tokens, has no order for those of eight."""

    def key(self, request: Any) -> Any:
        count = len(request.prompt_token_ids)
        if count == 7:
            raise ZeroDivisionError("no rate")
        return "eight" if count == 8 else count


class ConfigOfNoKind(CheckpointReader):
    def config(self) -> Any:
        return 42

    def weights(self) -> Any: ...


class WeightsOfNoKind(CheckpointReader):
    def weights(self) -> Any:
        return {}


class Nothing:
    """Of no kind at all."""


class Unopened(Int8):
    @classmethod
    def from_checkpoint(cls, config: Any, view: Any) -> Any:
        return None


class FormOfNoKind(Int8):
    quantizes_tables = False

    def to_form(self, linear: Any, tensors: Any) -> Any:
        return 42


class NoTensors(Int8):
    quantizes_tables = False

    def tensors(self, linear: Any, view: Any) -> Any:
        return None


def family_of_no_kind(config: Any, *, max_model_len: int | None) -> Any:
    return 42


def family_without_lengths(config: Any) -> Any:
    return None


def family_that_raises(config: Any, *, max_model_len: int | None) -> Any:
    raise ValueError("bad config")


def family_without_a_weight(config: Any, *, max_model_len: int | None) -> ModelDefinition:
    whole = llama.translate(config, max_model_len=max_model_len)
    return replace(whole, weights={k: v for k, v in whole.weights.items() if k != "final_norm.weight"})
