"""Q18: what grouped-query attention saves, and what tensor parallelism sends over the links. Arithmetic only.

    python benchmarks/claims/attention_and_links.py [--json]

KV bytes are `KVGroupSpec.bytes_per_token` of the published shapes. Tensor parallelism adds up two activations a
layer; a ring all-reduce of b bytes moves 2 (n - 1) / n b bytes over every card's link. Links at their data sheet's rate
in one direction, A100-80GB cards at peak, no latency and no overlap: a model, good for orders of magnitude.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model_shapes import SHAPES
from report import arguments, show

from kvpage.api.kv import KVGroupSpec

FLOPS, BANDWIDTH = 312e12, 2.039e12
LINKS = {"NVLink 3": 300e9, "PCIe 4 x16": 32e9}
ELEMENT = 2
SHAPE = SHAPES["llama-2-70b"]
PARAMETERS = 68.98e9
CARDS = 4


def kv_group(config: dict[str, Any]) -> KVGroupSpec:
    """The KV group of a shape whose layers are all alike."""
    size = config["hidden_size"] // config["num_attention_heads"]
    return KVGroupSpec(
        kind="full",
        layers=tuple(range(config["num_hidden_layers"])),
        num_kv_heads=config["num_key_value_heads"],
        head_dim=size,
        v_head_dim=size,
    )


def grouped_queries() -> list[dict[str, Any]]:
    """KV of a token as the config says, and with a K/V head for every query head."""
    table = []
    for name in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-70b"):
        config = SHAPES[name]
        group = kv_group(config)
        one_each = replace(group, num_kv_heads=config["num_attention_heads"])
        stated, full = group.bytes_per_token(ELEMENT), one_each.bytes_per_token(ELEMENT)
        table.append(
            {
                "model": name,
                "query heads": config["num_attention_heads"],
                "K/V heads": group.num_kv_heads,
                "bytes a token": stated,
                "with one each": full,
                "x": full // stated,
            }
        )
    return table


def links() -> list[dict[str, Any]]:
    """Milliseconds a step of Llama-2-70B in 16 bits on 4 cards: computing, and sending."""
    table = []
    for what, tokens in (("decode, 1 sequence", 1), ("decode, 32 sequences", 32), ("decode, 256 sequences", 256),
                         ("prompt of 2,048 tokens", 2048)):  # fmt: skip
        compute = max(PARAMETERS * ELEMENT / BANDWIDTH, 2 * PARAMETERS * tokens / FLOPS) / CARDS
        payload = 2 * SHAPE["num_hidden_layers"] * SHAPE["hidden_size"] * ELEMENT * tokens
        moved = 2 * (CARDS - 1) / CARDS * payload
        line: dict[str, Any] = {
            "step": what,
            "compute ms": round(1e3 * compute, 1),
            "MB a link": round(moved / 1e6, 1),
        }
        for link, rate in LINKS.items():
            line[f"{link} ms"] = round(1e3 * moved / rate, 2)
            line[f"{link} +%"] = round(100 * moved / rate / compute, 1)
        table.append(line)
    return table


def main() -> None:
    options = arguments(__doc__).parse_args()
    heads, steps = grouped_queries(), links()
    saved = next(line for line in heads if line["model"] == "llama-2-70b")
    few, prompt = steps[1], steps[-1]
    show(
        {"KV cache in 16 bits": heads, f"Llama-2-70B in 16 bits on {CARDS} x A100-80GB": steps},
        {
            "Q18": f"bounded: GQA is in the config and saves x {saved['x']} on 70B, x 1 on 7B and 13B; over PCIe "
            f"the links add {few['PCIe 4 x16 +%']:g} % to a decode step of 32 sequences and "
            f"{prompt['PCIe 4 x16 +%']:g} % to a prompt, over NVLink {few['NVLink 3 +%']:g} and "
            f"{prompt['NVLink 3 +%']:g} %"
        },
        options.json,
    )


if __name__ == "__main__":
    main()
