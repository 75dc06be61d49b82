"""The one attention function that kvpage adds to transformers' registry, and what it hands attention to.

transformers calls ``function(module, query, key, value, attention_mask, **keywords)`` in every attention layer,
with all keywords that the model's ``forward`` was given. kvpage gives one more, ``STEP``: the object that attends.
So a step travels as an argument from the runner to the layers, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvpage.api.model import AttentionSpec, StepContext
from kvpage.errors import CheckpointError

STEP = "kvpage_step"
"""The keyword argument."""

PAGED = "kvpage"
"""Name of the attention function in transformers' registry; no mask is made for it."""

PROBE = "kvpage_probe"
"""The same function, for which masks are recorded."""


class Refused(CheckpointError):
    """This model cannot run through the fallback; the message is the reason, without the model's name."""


class AttendingStep(Protocol):
    """What travels under ``STEP``."""

    def attend_module(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        keywords: Mapping[str, Any],
    ) -> torch.Tensor:
        """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
        ...


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; see the module."""
    step: AttendingStep | None = keywords.pop(STEP, None)
    if step is None:
        raise Refused("its layers do not hand keyword arguments down to their attention")
    return step.attend_module(module, query, key, value, attention_mask, keywords), None


def recorded_mask(*, batch_size: int, kv_length: int, mask_function: Any, **_: Any) -> torch.Tensor:
    """A mask of the usual shape (a probe has no past) and no content, which carries the rule it would be made by."""
    mask = torch.empty((batch_size, 1, kv_length, kv_length), device="meta")
    mask.kvpage_rule = mask_function  # type: ignore[attr-defined]
    return mask


def register() -> None:
    """Make transformers know ``PAGED`` and ``PROBE``; idempotent, and no other model is affected."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PAGED, attention_function)
    AttentionInterface.register(PROBE, attention_function)
    AttentionMaskInterface.register(PROBE, recorded_mask)


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Attention of one step through ``context``; ``specs`` of the model's attention modules."""

    context: StepContext
    specs: Mapping[torch.nn.Module, AttentionSpec]

    def attend_module(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        keywords: Mapping[str, Any],
    ) -> torch.Tensor:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.context.attend(self.specs[module], q, k, v, keywords.get("s_aux")).unsqueeze(0)
