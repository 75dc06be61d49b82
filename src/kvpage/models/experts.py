"""What mixture-of-experts families share when they translate a config: routing values, and where experts lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from kvpage.api.model import (
    DecoderSpec,
    ExpertGroups,
    MLPSpec,
    ModelDefinition,
    MoESpec,
    WeightRef,
)
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig
from kvpage.models.translation import HF_NAMES, read_activation, weight_map

MAX_EXPERTS = 10_000

PARTS: Mapping[str, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def read_moe(
    cfg: HFConfig,
    *,
    experts: str = "num_experts",
    intermediate_size: str = "moe_intermediate_size",
    renormalise: bool,
    shared: MLPSpec | None = None,
) -> MoESpec:
    """Routing and experts; ``experts`` and ``intermediate_size`` are the keys that state them.

    Raises:
        CheckpointError: a key is missing, or more experts a token are asked for than there are.
    """
    count, top_k = cfg.count(experts, at_most=MAX_EXPERTS), cfg.count("num_experts_per_tok")
    if top_k > count:
        raise CheckpointError(
            f"{cfg.source}: num_experts_per_tok {top_k} is more than {experts} {count}; at most all of them are used"
        )
    return MoESpec(
        expert=MLPSpec(intermediate_size=cfg.count(intermediate_size), activation=read_activation(cfg)),
        num_experts=count,
        top_k=top_k,
        renormalise=renormalise,
        shared=shared,
        shared_gate=shared is not None,
    )


def read_groups(cfg: HFConfig, *, score: Literal["best", "best_two"]) -> ExpertGroups:
    """``n_group`` and ``topk_group``.

    Raises:
        CheckpointError: experts do not divide into them, or those chosen have too few experts.
    """
    count, chosen, experts = cfg.count("n_group"), cfg.count("topk_group"), cfg.count("n_routed_experts")
    size, top_k = experts // count, cfg.count("num_experts_per_tok")
    least = 1 if score == "best" else 2
    if experts % count or chosen > count or size * chosen < top_k or size < least:
        raise CheckpointError(
            f"{cfg.source}: n_group {count} and topk_group {chosen} do not fit n_routed_experts {experts} and "
            f"num_experts_per_tok {top_k}; groups must be of one size, {least} at least, and those chosen must "
            "have enough experts"
        )
    return ExpertGroups(count=count, chosen=chosen, score=score)


def has_experts(cfg: HFConfig) -> tuple[bool, ...]:
    """For each layer, whether it has experts, as Qwen's configs say: every ``decoder_sparse_step``-th layer,
    without ``mlp_only_layers``; none where ``num_experts`` is 0."""
    step = cfg.count("decoder_sparse_step", 1)
    plain = [cfg.typed(int, "mlp_only_layers", index) for index in cfg.get(list, "mlp_only_layers", [])]
    some = cfg.get(int, "num_experts") != 0
    return tuple(some and index not in plain and (index + 1) % step == 0 for index in range(cfg.num_layers))


def with_experts(
    spec: DecoderSpec,
    experts: Sequence[MoESpec | None],
    *,
    block: str = "mlp",
    shared: str = "shared_expert",
    parts: Mapping[str, str] = PARTS,
    names: Mapping[str, str] = HF_NAMES,
) -> ModelDefinition:
    """``spec`` with experts in each layer for which there are some, and where everything lies.

    On disk each expert has its own tensors, ``block``.experts.3.gate_proj.weight, also in what transformers 5
    writes. Where those are missing, as in a model that transformers 5 holds in memory (or has saved as it is), all
    experts of a layer lie in one mlp.experts.gate_up_proj [experts, gate and up, hidden] and one
    mlp.experts.down_proj [experts, hidden, inner]. Quantizers that take those apart call the experts
    gate_proj, up_proj and down_proj, in ``block`` (llmcompressor) or in mlp (gptqmodel), whatever the family's own
    names are.

    Args:
        experts: an entry a layer. block, shared: the module that has router and experts on disk, and the one
            within it that is shared.
        parts: what "gate", "up" and "down" are called there.
    """
    layers = tuple(
        layer if moe is None else replace(layer, ffn=moe)
        for layer, moe in zip(spec.layers, experts, strict=True)
    )
    spec = replace(spec, layers=layers)
    table = {**names, "moe.router": f"{block}.gate", "moe.shared_gate": f"{block}.{shared}_gate"}
    for part, stored in parts.items():
        table[f"moe.shared.{part}"] = f"{block}.{shared}.{stored}"
        for expert in range(max((moe.num_experts for moe in experts if moe is not None), default=0)):
            table[f"moe.experts.{expert}.{part}"] = f"{block}.experts.{expert}.{stored}"
    weights = dict(weight_map(spec, table))
    for index, moe in enumerate(experts):
        if moe is not None:
            if moe.correction:
                place = WeightRef(name=f"model.layers.{index}.{block}.gate.e_score_correction_bias")
                weights[f"layers.{index}.moe.router.correction"] = place
            prefix, layer_name = f"layers.{index}.moe", f"model.layers.{index}"
            places = _in_one_tensor(prefix, f"{layer_name}.mlp", moe)
            if block != "mlp":
                for module in (f"{layer_name}.mlp", f"{layer_name}.{block}"):
                    places |= _taken_apart(prefix, module, moe, places)
            weights |= {name: replace(weights[name], otherwise=ref) for name, ref in places.items()}
    return ModelDefinition(spec=spec, weights=weights)


def _taken_apart(
    prefix: str, module: str, moe: MoESpec, otherwise: Mapping[str, WeightRef]
) -> dict[str, WeightRef]:
    """Experts that a quantizer took out of one tensor, under the names that most families have."""
    return {
        name: WeightRef(name=f"{module}.experts.{expert}.{stored}.weight", otherwise=otherwise[name])
        for expert in range(moe.num_experts)
        for part, stored in PARTS.items()
        for name in (f"{prefix}.experts.{expert}.{part}.weight",)
    }


def _in_one_tensor(prefix: str, module: str, moe: MoESpec) -> dict[str, WeightRef]:
    """Router and experts as transformers 5 holds them in memory."""
    inner = moe.expert.intermediate_size
    places = {f"{prefix}.router.weight": WeightRef(name=f"{module}.gate.weight")}
    fused, down = f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj"
    for expert in range(moe.num_experts):
        own = f"{prefix}.experts.{expert}"
        places[f"{own}.gate.weight"] = WeightRef(name=fused, index=expert, rows=(0, inner))
        places[f"{own}.up.weight"] = WeightRef(name=fused, index=expert, rows=(inner, 2 * inner))
        places[f"{own}.down.weight"] = WeightRef(name=down, index=expert)
    return places
