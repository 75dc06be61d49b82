"""What model families are put together from: public names for plugins that bring one (hook ``kvpage_models``).

A family is a function (config, *, max_model_len) -> ``kvpage.api.model.ModelDefinition``. It reads the config, and
these read what most configs say alike:

- ``HFConfig``: the config as every family gets it; ``with_defaults`` and ``renamed`` bring its keys in line.
- ``read_heads``, ``read_plain_heads``, ``read_rope``, ``read_activation``, ``context_length``, ``require``;
  ``window_of_all_layers``, or a layer at a time ``read_layer_types``, ``every_nth_full``, ``read_windows``.
- ``attention_spec``, ``decoder_spec``: the spec of layers, placed in KV groups (``place_in_groups``);
  ``llama_like``: a whole model of Llama's layout.
- ``weight_map`` with a table of names (``HF_NAMES``); ``one_after_another``, ``head_by_head`` and ``transposed`` for
  parameters that share a tensor, or are stored [in, out].
- ``read_moe``, ``read_groups``, ``with_experts``: mixtures of experts.

Nothing here imports torch. Every error is a ``kvpage.CheckpointError`` that names file, key and value.
"""

from __future__ import annotations

from kvpage.models.experts import read_groups, read_moe, with_experts
from kvpage.models.families.llama import llama_like
from kvpage.models.fused_weights import head_by_head, one_after_another, qkv_outputs, transposed
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import every_nth_full, read_layer_types, read_windows
from kvpage.models.layouts import attention_spec, decoder_spec, window_of_all_layers
from kvpage.models.translation import (
    HF_NAMES,
    context_length,
    place_in_groups,
    read_activation,
    read_heads,
    read_plain_heads,
    read_rope,
    require,
    weight_map,
)

__all__ = [
    "HF_NAMES",
    "HFConfig",
    "attention_spec",
    "context_length",
    "decoder_spec",
    "every_nth_full",
    "head_by_head",
    "llama_like",
    "one_after_another",
    "place_in_groups",
    "qkv_outputs",
    "read_activation",
    "read_groups",
    "read_heads",
    "read_layer_types",
    "read_moe",
    "read_plain_heads",
    "read_rope",
    "read_windows",
    "require",
    "transposed",
    "weight_map",
    "window_of_all_layers",
    "with_experts",
]
