"""A plugin written against kvpage.api 1.0. FROZEN: it is never edited, whatever changes in kvpage.

It implements every hook and every class that 1.0 lets a plugin bring (the provisional ones aside), each in the
plainest way. If kvpage breaks it, kvpage is wrong.
"""

from __future__ import annotations

import torch

from kvpage import hookimpl
from kvpage.api.attention import AttentionBackend, AttentionCaps
from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.decoder import DecoderBackend, Reasons
from kvpage.api.events import EventListener
from kvpage.api.kv import KVGroupSpec, KVLayout
from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    ModelDefinition,
    NormSpec,
    RopeSpec,
    WeightRef,
)
from kvpage.api.parameters import parameters
from kvpage.api.quant import ChannelInt8, Dense, LinearKernel, QuantScheme, TensorInfo, TensorSpec
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    CliCommandRecord,
    DecoderBackendRecord,
    EventListenerRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    ModelRecord,
    QuantizationSchemeRecord,
    SchedulingPolicyRecord,
)
from kvpage.api.sampling import LogitsProcessor
from kvpage.api.scheduling import SchedulingPolicy

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_attention_backends():
    return [AttentionBackendRecord(name="frozen", factory="plugin_api_1_0:Attention", priority=-500)]


@hookimpl
def kvpage_decoder_backends():
    return [DecoderBackendRecord(name="frozen", factory="plugin_api_1_0:Decoder", priority=500)]


@hookimpl
def kvpage_checkpoint_readers():
    return [CheckpointReaderRecord(name="frozen", factory="plugin_api_1_0:Reader", files=("*.frozen",))]


@hookimpl
def kvpage_quantization_schemes():
    return [QuantizationSchemeRecord(name="frozen", factory="plugin_api_1_0:Scheme", bits=8.0)]


@hookimpl
def kvpage_linear_kernels():
    return [LinearKernelRecord(name="frozen", factory="plugin_api_1_0:Kernel", priority=500)]


@hookimpl
def kvpage_models():
    return [
        ModelRecord(name="frozen", factory="plugin_api_1_0:translate", architectures=("FrozenForCausalLM",))
    ]


@hookimpl
def kvpage_logits_processors():
    return [LogitsProcessorRecord(name="frozen", factory="plugin_api_1_0:Processor")]


@hookimpl
def kvpage_scheduling_policies():
    return [SchedulingPolicyRecord(name="frozen", factory="plugin_api_1_0:Policy")]


@hookimpl
def kvpage_event_listeners():
    return [EventListenerRecord(name="frozen", factory="plugin_api_1_0:Listener")]


@hookimpl
def kvpage_cli_commands():
    return [CliCommandRecord(name="frozen", factory="plugin_api_1_0:command", help="a command of 1.0")]


@hookimpl
def kvpage_select_attention_backend(need, candidates):
    return "frozen" if "frozen" in candidates else None


class Attention(AttentionBackend):
    caps = AttentionCaps(devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}), preferred_block_size=8)

    def kv_layout(self):
        e = self.env
        return KVLayout(shape=(e.num_blocks, 2, e.block_size, e.num_kv_heads, e.head_dim), dtype=e.kv_dtype)

    def plan(self, batch):
        return batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()

    def write_kv(self, kv, k, v, batch):
        for token, slot in enumerate(batch.slot_mapping.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, self.env.block_size)
                kv[block, 0, offset], kv[block, 1, offset] = k[token], v[token]

    def attend(self, q, kv, layer, batch, plan, out):
        starts, lengths = plan
        groups = self.env.num_heads // self.env.num_kv_heads
        for row, length in enumerate(lengths):
            first, last = starts[row], starts[row + 1]
            blocks = batch.block_tables[row, : -(-length // self.env.block_size)].long()
            k, v = (kv[blocks, part].flatten(0, 1)[:length].repeat_interleave(groups, 1) for part in (0, 1))
            scores = torch.einsum("qhd,khd->hqk", q[first:last], k) * layer.scale
            hidden = torch.arange(length) > torch.arange(length - (last - first), length)[:, None]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[first:last] = torch.einsum("hqk,khd->qhd", weights, v)

    def copy_blocks(self, kv, source, target):
        kv[target] = kv[source]


class Decoder(DecoderBackend):
    attention = "frozen"

    @classmethod
    def refuses(cls, spec, env):
        return [] if env.device == "cpu" else [f"device {env.device}"]

    def build(self, spec, weights, env):
        return Reasons((f"{len(weights)} weights seen; the next one may have them",))


class View:
    shared = False

    def __init__(self, tensors, path):
        self.tensors, self.path = tensors, path

    def names(self):
        return self.tensors.keys()

    def info(self, name):
        tensor = self.tensors[name]
        return TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def read(self, name):
        return self.tensors[name]

    def slices(self, name, start, stop):
        yield self.tensors[name][start:stop]

    def where(self, name):
        return str(self.path)


class Reader(CheckpointReader):
    def weights(self):
        path = next(self.path.glob("*.frozen"))
        return View(torch.load(path, weights_only=True), path)


class Scheme(QuantScheme):
    quantizes_plain = True

    @classmethod
    def from_checkpoint(cls, config, view):
        return cls()

    def tensors(self, linear, view):
        if not all(name.startswith("layers.") for name in linear.parameters):
            return {}
        return {"weight": TensorSpec(shape=(linear.out_features, linear.in_features), dtype="float32")}

    def to_form(self, linear, tensors):
        weight = tensors["weight"].float()
        scales = weight.abs().amax(1).clamp_(min=1e-12) / 127
        return ChannelInt8(codes=(weight / scales[:, None]).round().to(torch.int8), scales=scales)


class Kernel(LinearKernel):
    name = "frozen"

    @classmethod
    def supports(cls, form, env):
        return [] if isinstance(form, Dense | ChannelInt8) else [f"weights held as {type(form).__name__}"]

    def prepare(self, form, bias):
        self.weight, self.bias = form.dequantize(), bias

    def forward(self, x):
        # One row after another, so that no row depends on the others.
        rows = [torch.mv(self.weight, row) for row in x]
        out = torch.stack(rows) if rows else x.new_empty(0, self.weight.shape[0])
        return out if self.bias is None else out + self.bias


def translate(config, *, max_model_len):
    heads, kv_heads = config.count("num_attention_heads"), config.count("num_key_value_heads")
    size, count = config.count("head_dim"), config.num_layers
    norm = NormSpec(kind="rms", eps=config.get(float, "rms_norm_eps", 1e-6))
    rope = RopeSpec(kind="default", theta=config.rope_parameters()["rope_theta"], rotary_dim=size)
    layers = tuple(
        LayerSpec(
            mixer=AttentionSpec(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=size,
                v_head_dim=size,
                scale=size**-0.5,
                kv_group=0,
                kv_index=index,
                rope=rope,
            ),
            ffn=MLPSpec(intermediate_size=config.count("intermediate_size"), activation="silu"),
            mixer_norm_before=norm,
            ffn_norm_before=norm,
        )
        for index in range(count)
    )
    group = KVGroupSpec(
        kind="full", layers=tuple(range(count)), num_kv_heads=kv_heads, head_dim=size, v_head_dim=size
    )
    spec = DecoderSpec(
        family="frozen",
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        max_position=config.count("max_position_embeddings"),
        embedding=EmbeddingSpec(),
        layers=layers,
        final_norm=norm,
        head=HeadSpec(tied=False),
        kv_groups=(group,),
    )
    return ModelDefinition(spec=spec, weights={p.name: WeightRef(name=p.name) for p in parameters(spec)})


class Processor(LogitsProcessor):
    def __init__(self):
        self.counts = {}

    def admit(self, slot, params, prompt_ids):
        self.counts[slot] = 0

    def apply(self, logits, slots):
        for row, slot in enumerate(slots):
            allowed = self.counts[slot] % 3 + 5
            kept = logits[row, allowed].clone()
            logits[row] = -torch.inf
            logits[row, allowed] = kept
        return logits

    def advance(self, slot, token_ids):
        self.counts[slot] += len(token_ids)

    def rollback(self, slot, count):
        self.counts[slot] -= count

    def release(self, slot):
        del self.counts[slot]


class Policy(SchedulingPolicy):
    def key(self, request):
        return len(request.prompt_token_ids)


class Listener(EventListener):
    heard = []

    def admitted(self, request_id, prompt_tokens):
        self.heard.append(("admitted", request_id))

    def finished(self, request_id, index, reason, output_tokens):
        self.heard.append(("finished", request_id, index, reason, output_tokens))

    def completed(self, request_id, metrics):
        self.heard.append(("completed", request_id))

    def step(self, stats):
        assert stats.num_rows >= 1


def command(argv):
    print("frozen", *argv)
    return 0
