"""The requests of each workload, and what they take: bytes of weights a token, operations in all.

| workload | requests | speed is |
|---|---|---|
| a | one: 128 prompt tokens, 128 new ones | new tokens a second after the first |
| b | 32 at once: prompts of 48-254 tokens (4,803 in all), 70-192 new ones (4,474) | new tokens a second |
| c | 32 at once: a prefix of 512 tokens that all share, 32 of their own, 32 new ones | new tokens a second |
| d | one: 2,048 prompt tokens, one new one | prompt tokens a second |
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORKLOADS = ("a", "b", "c", "d")
SEED = 20240607
FIRST_PLAIN_ID = 3  # those below are special tokens of many vocabularies
PREFIX = 512
LENGTHS_B = (
    (142, 189), (62, 127), (178, 109), (221, 96), (218, 70), (201, 176), (213, 191), (254, 141),
    (168, 119), (76, 122), (77, 170), (70, 119), (193, 192), (96, 93), (107, 98), (109, 177),
    (56, 183), (148, 150), (185, 178), (147, 125), (219, 126), (153, 160), (232, 187), (159, 160),
    (238, 151), (119, 182), (80, 83), (48, 71), (84, 163), (218, 119), (240, 128), (92, 119),
)  # fmt: skip
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
"""Bytes a weight; int4 with a 16-bit scale and a 16-bit offset for each 128 weights."""
ARITHMETIC = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8"}
"""Products that bound a type: 4-bit weights are bound by those of 8 bits, which a CPU has instructions for."""


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, and how many new ones are asked for."""

    prompt: Sequence[int]
    new: int


@dataclass(frozen=True)
class Workload:
    """Requests that are made at once; the first ``shared`` prompt tokens are the same in all."""

    name: str
    requests: Sequence[Request]
    shared: int = 0

    @property
    def new_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(request.new for request in self.requests)


def workload(name: str, vocabulary: int, part: int = 1) -> Workload:
    """The requests of workload ``name``, the same ones at each call, ids below ``vocabulary``.

    Args:
        part: every length is divided by it, for a run that only shows that everything works.
    """
    draw = random.Random(f"{SEED} {name}")

    def ids(count: int) -> list[int]:
        return [draw.randrange(FIRST_PLAIN_ID, vocabulary) for _ in range(count)]

    if name == "a":
        return Workload(name, [Request(ids(128 // part), 128 // part)])
    if name == "b":
        return Workload(name, [Request(ids(prompt // part), new // part) for prompt, new in LENGTHS_B])
    if name == "c":
        prefix = ids(PREFIX // part)
        return Workload(name, [Request(prefix + ids(32), 32 // part) for _ in range(32)], shared=len(prefix))
    if name == "d":
        return Workload(name, [Request(ids(2048 // part), 1)])
    raise ValueError(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)}")


def even_batch(count: int, context: int, new: int, vocabulary: int) -> Workload:
    """``count`` requests of ``context`` prompt tokens that share nothing."""
    draw = random.Random(f"{SEED} {count} {context}")
    prompts = [[draw.randrange(FIRST_PLAIN_ID, vocabulary) for _ in range(context)] for _ in range(count)]
    return Workload(f"{count} x {context}", [Request(prompt, new) for prompt in prompts])


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model that its work follows from."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers of the whole stack."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    @classmethod
    def read(cls, checkpoint: Path) -> Shape:
        """The shape that ``config.json`` of a checkpoint states."""
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        return cls(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
        )


def bytes_a_token(shape: Shape, dtype: str) -> float:
    """Bytes of weights that one decoded token reads: every linear layer and the output head once."""
    return (shape.layer_weights + shape.head_weights) * WEIGHT_BYTES[dtype]


def operations(shape: Shape, work: Workload) -> float:
    """Multiplications and additions of a workload where nothing is computed twice.

    Two for each weight of the layers and computed token, two for each weight of the output head and sampled token, and
    4 x layers x heads x head_dim for each pair of a query and a key it sees. The shared prefix is computed once; the
    last new token of a request is not computed.
    """
    tokens, prefix_pairs = work.shared, work.shared * (work.shared + 1) // 2
    pairs = prefix_pairs
    for request in work.requests:
        length = len(request.prompt) + request.new - 1
        tokens += length - work.shared
        pairs += length * (length + 1) // 2 - prefix_pairs
    linear = 2.0 * (tokens * shape.layer_weights + work.new_tokens * shape.head_weights)
    return linear + 4.0 * shape.layers * shape.heads * shape.head_dim * pairs


def bound(shape: Shape, work: Workload, dtype: str, bandwidth: float, arithmetic: float) -> float:
    """Tokens a second that the machine allows: by reading the weights (a), by operations (b, c, d)."""
    if work.name == "a":
        return bandwidth / bytes_a_token(shape, dtype)
    return counted_tokens(work) * arithmetic / operations(shape, work)


def counted_tokens(work: Workload) -> int:
    """The tokens that a workload's speed counts: prompt tokens of d, new ones of the others."""
    return len(work.requests[0].prompt) if work.name == "d" else work.new_tokens


def speed(work: Workload, seconds: float, first_token_seconds: float | None) -> float:
    """Tokens a second of a run; of a from its first token on."""
    if work.name == "a" and first_token_seconds is not None:
        return (work.new_tokens - 1) / (seconds - first_token_seconds)
    return counted_tokens(work) / seconds


def decode_bound(
    shape: Shape, dtype: str, batch: int, context: int, bandwidth: float, arithmetic: float
) -> float:
    """Tokens a second of decode steps: what takes longer, weights and KV read once a step, or their operations."""
    kv_bytes = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * (4 if dtype == "fp32" else 2)
    read = bytes_a_token(shape, dtype) + batch * context * kv_bytes
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * context
    computed = batch * (2.0 * (shape.layer_weights + shape.head_weights) + attention)
    return batch / max(read / bandwidth, computed / arithmetic)
