"""A step of one whole sequence: plain causal attention, nothing paged. The oracle's side of a parity test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kvpage.api.attention import Rope, rotate
from kvpage.api.model import AttentionSpec, DecoderEnv, ModelDefinition, RopeSpec
from kvpage.loading.memory import Arena
from kvpage.loading.readers import open_checkpoint
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder
from kvpage.nn.rotary import build_rope


@dataclass
class DenseContext:
    """A ``StepContext`` for positions 0 .. T-1 of one sequence."""

    positions: torch.Tensor
    ropes: dict[int, Rope] = field(default_factory=dict)

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if spec.rope is not None:
            rope = self._rope(spec.rope)
            q, k = rotate(q, self.positions, rope), rotate(k, self.positions, rope)
        groups = spec.num_heads // spec.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        distance = self.positions[:, None] - self.positions[None, :]
        hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)

    def _rope(self, spec: RopeSpec) -> Rope:
        if id(spec) not in self.ropes:
            length = len(self.positions)
            if spec.switch is None or length <= spec.switch:
                self.ropes[id(spec)] = build_rope(spec, length, "cpu")
            else:
                both = build_rope(spec, length, "cpu", spec.switch)
                self.ropes[id(spec)] = replace(both, cos=both.cos[spec.switch :], sin=both.sin[spec.switch :])
        return self.ropes[id(spec)]


def decoder_from(folder: Path, definition: ModelDefinition, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a checkpoint folder."""
    loaded = load_weights(definition, open_checkpoint(folder), dtype=dtype, device="cpu", arena=Arena())
    assert loaded.warnings == ()
    return Decoder(
        definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype=str(dtype).removeprefix("torch."))
    )


@torch.inference_mode()
def all_logits(decoder: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of every position of one sequence int64 [T]."""
    positions = torch.arange(len(token_ids))
    return decoder.logits(decoder.forward(token_ids, positions, DenseContext(positions)))
