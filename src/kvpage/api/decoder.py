"""The contract of a decoder backend: the largest seam, all layers of a model in one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from kvpage.api.attention import AttentionBackend, AttentionBatch, Rope
    from kvpage.api.model import CausalLM, DecoderEnv, DecoderSpec
    from kvpage.api.quant import WeightForm


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why a decoder backend does not take a model; never empty."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KVGroupStep:
    """One KV group during one step, for decoders that reach the cache themselves.

    Attributes:
        backend: the attention backend that owns the layout; it planned this step.
        batch, plan: what ``backend.attend`` would be given.
        tensors: KV tensor of each layer of the group, by ``kv_index``.
        ropes: rotary tables of each layer, ``None`` where it does not rotate.
        rope_positions: int64 [T], the row of these tables that each token of the step turns by: what
            ``backend.rope_write`` is to be given. Equal to ``positions`` of ``CausalLM.forward`` but for models of
            which long sequences turn by frequencies of their own (longrope). ``None``: they are equal.
    """

    backend: AttentionBackend
    batch: AttentionBatch
    plan: object
    tensors: Sequence[torch.Tensor]
    ropes: Sequence[Rope | None]
    rope_positions: torch.Tensor | None = None


class DecoderBackend(ABC):
    """Runs a whole model: in one native call, in one captured graph, or layer by layer.

    Whoever decodes keeps the rule of the cache: in each layer the K and V of all rows are written before any
    row attends.
    """

    attention: ClassVar[str | None] = None
    """Name of the attention backend whose ``KVLayout`` it reads and writes: the engine takes the two together.
    ``None``: it reaches the cache only through ``StepContext.attend``, and any attention backend will do."""

    @classmethod
    def refuses(cls, spec: DecoderSpec, env: DecoderEnv) -> list[str]:
        """Reasons known before any weight is read why it cannot run ``spec``; empty if it may."""
        return []

    @abstractmethod
    def build(
        self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv
    ) -> CausalLM | Reasons:
        """The model, or why not: then the next decoder backend is asked.

        ``weights`` has every parameter that ``kvpage.api.parameters`` names for ``spec``. They may be kept; a
        backend that packs copies of its own should say so in its documentation, since memory is planned without.
        Where ``env.weights_owned`` it may write over them, once it is sure to build the model: what goes wrong after
        that it raises as MemoryError, since no other backend can use them any more.
        """
