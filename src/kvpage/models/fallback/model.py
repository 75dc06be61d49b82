"""A model that runs through transformers' own code, its attention through paged KV."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch

from kvpage.api.model import AttentionSpec, StepContext
from kvpage.models.fallback.attention import STEP, PagedStep, Refused
from kvpage.models.fallback.probe import split
from kvpage.models.fallback.proof import prove, prove_apart
from kvpage.models.fallback.source import Allocate, FallbackDefinition, load_module
from kvpage.models.fallback.spec import FallbackSpec

LOG = logging.getLogger("kvpage")


class FallbackModel:
    """A ``CausalLM``: transformers' model, given all sequences of a step as one row of packed tokens.

    Args:
        module: the engine's own; it is changed. max_model_len: rope frequencies that would depend on the batch
            are fixed for it.
    """

    def __init__(self, module: Any, spec: FallbackSpec, max_model_len: int) -> None:
        fix_rope(module, max_model_len)
        self._module = module
        self._base, self._head = split(module)
        paths = dict(self._base.named_modules())
        self._specs: dict[torch.nn.Module, AttentionSpec] = {
            paths[path]: attention for path, attention in zip(spec.modules, spec.attention, strict=True)
        }

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """int64 [T], int64 [T] -> hidden states after the final norm [T, H]."""
        output = self._base(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            **{STEP: PagedStep(ctx, self._specs)},
        )
        hidden: torch.Tensor = output[0]
        return hidden.squeeze(0)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, V], by all that the class does after its body."""
        output = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False)
        logits: torch.Tensor = output[0]
        return logits.squeeze(0)


def load_fallback(
    definition: FallbackDefinition,
    *,
    dtype: torch.dtype,
    device: str,
    dummy: bool,
    max_model_len: int,
    allocate: Allocate,
) -> FallbackModel:
    """The model, loaded and proved (see ``prove``).

    Raises:
        CheckpointError: it cannot be loaded. Refused: it mixes tokens outside attention.
    """
    module = load_module(definition, dtype=dtype, device=device, dummy=dummy, allocate=allocate)
    model = FallbackModel(module, definition.spec, max_model_len)
    began = time.perf_counter()
    with torch.inference_mode():
        prove(model, module, definition.spec, dtype)
        prove_apart(model, definition.spec, dtype, max_model_len, device)
    LOG.info("compared with transformers' own attention in %.2f s", time.perf_counter() - began)
    return model


def fix_rope(module: Any, max_model_len: int) -> None:
    """Fix rope frequencies that transformers would recompute from the longest position of a batch.

    "dynamic" and "longrope" are run once at the last position, then treated as plain: what a token's keys are does
    not depend on what else runs.

    Raises:
        Refused: a rotary module still turns a token by what else runs.
    """
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
        changing = [t for t, kind in by_layer_type.items() if kind == "longrope" or "dynamic" in str(kind)]
        if not changing:
            continue
        last = torch.full((1, 1), max_model_len - 1, device=next(part.buffers()).device)
        early = torch.ones_like(last)
        in_short_sequences = {t: _turns(part, early, t) for t in changing}
        for layer_type in changing:
            _turns(part, last, layer_type)
        fixed = {t: "default" if t in changing else kind for t, kind in by_layer_type.items()}
        part.rope_type = fixed if isinstance(kinds, dict) else "default"
        for layer_type in changing:
            alone = _turns(part, early, layer_type)
            packed = _turns(part, torch.cat((early, last), 1), layer_type)
            if not _equal(alone, [tensor[:, :1] for tensor in packed]):
                raise Refused(
                    f"{type(part).__name__} turns a token by the longest position that runs beside it (rope_type "
                    f"{by_layer_type[layer_type]!r}), so that its result would depend on its batch; a max_model_len "
                    "within the model's original context avoids that"
                )
            if by_layer_type[layer_type] == "longrope" and not _equal(alone, in_short_sequences[layer_type]):
                LOG.warning(
                    "longrope through transformers' own code is fixed at load: max_model_len %d is beyond the "
                    "model's original context, so that short sequences have the long factors, too; a smaller "
                    "max_model_len, within that context, gives all of them the short ones",
                    max_model_len,
                )


def _turns(part: Any, positions: torch.Tensor, layer_type: str | None) -> tuple[torch.Tensor, ...]:
    """What a rotary module gives for positions [1, T]: cos and sin, or one complex tensor."""
    keywords = {} if layer_type is None else {"layer_type": layer_type}
    with torch.no_grad():
        found = part(next(part.buffers()).new_zeros((1, 1, 1)), positions, **keywords)
    return found if isinstance(found, tuple) else (found,)


def _equal(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
