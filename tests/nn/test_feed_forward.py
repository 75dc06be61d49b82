"""MLPs and mixtures of experts against their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kvpage.api.model import DecoderEnv, MLPSpec, MoESpec
from kvpage.api.quant import Dense, WeightForm
from kvpage.nn.mlp import MLP
from kvpage.nn.moe import MoE

ENV = DecoderEnv(device="cpu", dtype="float32")
HIDDEN, INNER = 12, 20
Activation = Callable[[torch.Tensor], torch.Tensor]
FORMULAS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp_weights(prefix: str, seed: int, *, bias: bool = False) -> dict[str, torch.Tensor]:
    weights = {
        f"{prefix}.gate.weight": random(INNER, HIDDEN, seed=seed),
        f"{prefix}.up.weight": random(INNER, HIDDEN, seed=seed + 1),
        f"{prefix}.down.weight": random(HIDDEN, INNER, seed=seed + 2),
    }
    if bias:
        weights |= {
            f"{prefix}.{part}.bias": random(HIDDEN if part == "down" else INNER, seed=seed + 5 + i)
            for i, part in enumerate(("gate", "up", "down"))
        }
    return weights


def forms(weights: dict[str, torch.Tensor]) -> dict[str, WeightForm]:
    return {name: Dense(tensor) for name, tensor in weights.items()}


def formula(x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str, act: Activation) -> torch.Tensor:
    def linear(x: torch.Tensor, part: str) -> torch.Tensor:
        return F.linear(x, weights[f"{prefix}.{part}.weight"], weights.get(f"{prefix}.{part}.bias"))

    if f"{prefix}.gate.weight" not in weights:
        return linear(act(linear(x, "up")), "down")
    return linear(act(linear(x, "gate")) * linear(x, "up"), "down")


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
@torch.inference_mode()
def test_an_mlp_computes_its_formula_for_every_activation(activation: str, gated: bool) -> None:
    weights = mlp_weights("mlp", 1, bias=True)
    if not gated:
        weights = {name: tensor for name, tensor in weights.items() if ".gate." not in name}
    spec = MLPSpec(intermediate_size=INNER, activation=activation, gated=gated, bias=True)
    x = random(5, HIDDEN)
    torch.testing.assert_close(
        MLP(spec, forms(weights), "mlp", ENV)(x), formula(x, weights, "mlp", FORMULAS[activation])
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
@torch.inference_mode()
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(
    score: str, renormalise: bool, shared: str
) -> None:
    mlp = MLPSpec(intermediate_size=INNER, activation="silu")
    weights = {
        "moe.router.weight": random(4, HIDDEN, seed=9),
        "moe.shared_gate.weight": random(1, HIDDEN, seed=8),
    }
    for expert in range(4):
        weights |= mlp_weights(f"moe.experts.{expert}", 10 * expert)
    weights |= mlp_weights("moe.shared", 77)
    spec = MoESpec(
        expert=mlp,
        num_experts=4,
        top_k=2,
        score=score,
        renormalise=renormalise,
        scale=1.7,
        shared=None if shared == "none" else mlp,
        shared_gate=shared == "gated",
    )
    x = random(7, HIDDEN)
    logits = F.linear(x, weights["moe.router.weight"])
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expected = torch.zeros_like(x)
    for row in range(7):
        top = scores[row].topk(2)
        share = top.values / top.values.sum() if renormalise else top.values
        for weight, expert in zip(share, top.indices.tolist(), strict=True):
            expected[row] += 1.7 * weight * formula(x[row], weights, f"moe.experts.{expert}", F.silu)
    if shared != "none":
        gate = F.linear(x, weights["moe.shared_gate.weight"]).sigmoid() if shared == "gated" else 1.0
        expected += gate * formula(x, weights, "moe.shared", F.silu)
    torch.testing.assert_close(MoE(spec, forms(weights), "moe", ENV)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@torch.inference_mode()
def test_a_token_gets_the_same_from_a_mixture_whatever_is_beside_it(activation: str) -> None:
    mlp = MLPSpec(intermediate_size=INNER, activation=activation)
    weights: dict[str, WeightForm] = {"moe.router.weight": Dense(random(4, HIDDEN, seed=9))}
    for expert in range(4):
        gate, up = random(2 * INNER, HIDDEN, seed=10 * expert).split(INNER)
        down = random(HIDDEN, INNER, seed=10 * expert + 1)
        for part, tensor in (("gate", gate), ("up", up), ("down", down)):
            weights[f"moe.experts.{expert}.{part}.weight"] = Dense(tensor)
    moe = MoE(MoESpec(expert=mlp, num_experts=4, top_k=3), weights, "moe", ENV)
    x = random(16, HIDDEN)
    together = moe(x)
    for row in range(16):
        assert torch.equal(moe(x[row : row + 1]), together[row : row + 1])
