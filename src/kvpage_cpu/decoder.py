"""The native decoder backend: every layer of a model in one call of the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from kvpage.api.decoder import DecoderBackend, KVGroupStep, Reasons
from kvpage.api.model import AttentionSpec, DecoderEnv, DecoderSpec, StepContext
from kvpage.api.quant import WeightForm
from kvpage.errors import KvpageError
from kvpage_cpu.attention import HEAD_DIMS, kv_type_of
from kvpage_cpu.model_weights import ModelWeights
from kvpage_cpu.native import open_library
from kvpage_cpu.packing import context_for
from kvpage_cpu.structs import KvpGroup, KvpStep

DTYPES = ("float32", "bfloat16")


class CpuDecoder(DecoderBackend):
    """Runs a model natively on the CPU, in float32 between products whatever the model's dtype.

    Weights are packed once, in their own memory where they are the engine's (``DecoderEnv.weights_owned``), else as a
    copy. A row's result has the same bits whatever its batch mates, its chunks and the number of threads are.
    """

    attention: ClassVar[str | None] = "cpu"

    @classmethod
    def refuses(cls, spec: DecoderSpec, env: DecoderEnv) -> list[str]:
        reasons = []
        if env.device != "cpu":
            reasons.append(f"device {env.device} (has cpu)")
        if env.dtype not in DTYPES:
            reasons.append(f"dtype {env.dtype} (has {', '.join(DTYPES)})")
        try:
            open_library()
        except KvpageError as error:
            reasons.append(str(error))
        return reasons + unfit_layers(spec)

    def build(
        self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv
    ) -> CpuModel | Reasons:
        reasons = self.refuses(spec, env)
        if reasons:
            return Reasons(tuple(reasons))
        return CpuModel(spec, weights, env)


def unfit_layers(spec: DecoderSpec) -> list[str]:
    """What of ``spec`` the native code has no kernels for, each once."""
    reasons: dict[str, None] = {}
    for layer in spec.layers:
        if not isinstance(layer.mixer, AttentionSpec):
            reasons[f"token mixers of {type(layer.mixer).__name__} (has softmax attention)"] = None
            continue
        for dim in {layer.mixer.head_dim, layer.mixer.v_head_dim} - HEAD_DIMS:
            reasons[f"head dim {dim} (has multiples of 8 up to {max(HEAD_DIMS)})"] = None
    return list(reasons)


class CpuModel:
    """A ``CausalLM`` whose layers run in one native call; hidden states and logits are float32."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> None:
        self.spec = spec
        self._context = context_for(weights.values(), env.dtype)
        self._weights = ModelWeights(self._context, spec, weights, env)
        count = len(spec.layers)
        self._places = [(mixer.kv_group, mixer.kv_index) for mixer in spec.attention]
        self._groups = (KvpGroup * max(1, len(spec.kv_groups)))()
        self._kv, self._cos, self._sin = ((ctypes.c_void_p * count)() for _ in range(3))
        self._step = KvpStep(groups=self._groups, kv=self._kv, cos=self._cos, sin=self._sin)
        self._bound: tuple[object, ...] = ()

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """int64 [T], int64 [T] -> float32 [T, H]; only rows that ``ctx.wanted`` names are defined."""
        steps = [ctx.group(index) for index in range(len(self._groups))]
        self._bind(steps)
        rope_positions = steps[0].rope_positions
        turns = positions if rope_positions is None else rope_positions
        hidden = torch.empty((len(token_ids), self.spec.hidden_size), dtype=torch.float32, device="cpu")
        for group, step in zip(self._groups, steps, strict=True):
            batch = step.batch
            group.num_rows = batch.num_rows
            group.cu_seqlens, group.seq_lens = batch.cu_seqlens_q.data_ptr(), batch.seq_lens.data_ptr()
            group.tables, group.table_stride = batch.block_tables.data_ptr(), batch.block_tables.stride(0)
            group.slots = batch.slot_mapping.data_ptr()
        call = self._step
        call.num_tokens = len(token_ids)
        call.token_ids, call.positions = token_ids.data_ptr(), positions.data_ptr()
        call.rope_positions, call.hidden = turns.data_ptr(), hidden.data_ptr()
        wanted = ctx.wanted
        call.wanted = None if wanted is None else wanted.data_ptr()
        call.num_wanted = 0 if wanted is None else len(wanted)
        context = self._context
        context.check(
            context.library.kvp_step(context.handle, ctypes.byref(self._weights.struct), ctypes.byref(call))
        )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> float32 [N, V]."""
        hidden = hidden.float().contiguous()
        logits = torch.empty((len(hidden), self.spec.vocab_size), dtype=torch.float32, device="cpu")
        if len(hidden):
            context = self._context
            context.check(
                context.library.kvp_logits(
                    context.handle,
                    ctypes.byref(self._weights.struct),
                    len(hidden),
                    hidden.data_ptr(),
                    logits.data_ptr(),
                )
            )
        return logits

    def _bind(self, steps: Sequence[KVGroupStep]) -> None:
        """Addresses of KV and rotary tables, which stay from step to step."""
        now = tuple(part for step in steps for part in (step.tensors, step.ropes))
        if len(now) == len(self._bound) and all(a is b for a, b in zip(now, self._bound, strict=True)):
            return
        for layer, (group, index) in enumerate(self._places):
            self._kv[layer] = steps[group].tensors[index].data_ptr()
            rope = steps[group].ropes[index]
            struct = self._weights.layers[layer]
            struct.rotary_dim = 0 if rope is None else rope.rotary_dim
            struct.interleaved = rope is not None and rope.interleaved
            self._cos[layer] = None if rope is None else rope.cos.data_ptr()
            self._sin[layer] = None if rope is None else rope.sin.data_ptr()
        for group_struct, step in zip(self._groups, steps, strict=True):
            group_struct.block_size = step.backend.env.block_size
        self._weights.struct.kv_type = kv_type_of(steps[0].backend.env.kv_dtype)
        self._bound = now
