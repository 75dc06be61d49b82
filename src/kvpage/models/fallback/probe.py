"""What a transformers model asks of attention, found by running it without weights.

The model is built on torch's meta device (shapes only) and given a few tokens, then many. Every call of the attention
function is recorded, with the rule its mask would be made by. A model that asks for anything that paged attention
does not do is refused, with the reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpage.models.fallback.attention import PROBE, STEP, Refused, register

SHORT, LONG = 8, 4099
"""Tokens of the two runs: many models attend in another way (compressed, sparse, chunked) beyond some length."""

IGNORED = frozenset({
    "dropout", "position_ids", "cache_position", "use_cache", "is_causal", "sliding_window", "scaling", "softcap",
    "s_aux", "return_dict", "output_router_logits", "output_hidden_states",
})  # fmt: skip
"""Keywords of the attention function that are read here, or that say nothing about its result."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention layer: the path of its module, its sizes, and how it weighs.

    ``window``: tokens a query sees, itself included; ``None`` = all before it.
    """

    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool


@dataclass(frozen=True, slots=True)
class ProbedParameter:
    """A parameter: its name and shape, and the part of a memory plan that it counts to."""

    name: str
    shape: tuple[int, ...]
    part: str


@dataclass(frozen=True, slots=True)
class Probed:
    """What a run found: attention layers in the order of their calls, width of hidden states and logits, parameters."""

    attention: tuple[AttentionCall, ...]
    hidden_size: int
    vocab_size: int
    parameters: tuple[ProbedParameter, ...]


class _Choices(TorchDispatchMode):
    """Gives an answer where a value is asked for on the meta device, which has none.

    Numbers are 1 and conditions true; a list of indices is empty, so that no expert of a mixture is visited.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if first.dtype is torch.bool else 1.0 if first.is_floating_point() else 1
            if func is torch.ops.aten.nonzero.default:
                return torch.empty((0, first.dim()), dtype=torch.int64, device="meta")
        return func(*args, **(kwargs or {}))


@dataclass
class _Recorder:
    """An ``AttendingStep`` that notes what it is asked."""

    names: Mapping[torch.nn.Module, str]
    tokens: int
    max_position: int
    calls: list[AttentionCall] = field(default_factory=list)

    def attend_module(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        keywords: Mapping[str, Any],
    ) -> torch.Tensor:
        name = self.names[module]
        if any(call.module == name for call in self.calls):
            raise Refused(f"{name} attends more than once in one pass, so that its K and V are not one cache")
        heads, kv_heads, dim, v_dim = _sizes(name, self.tokens, query, key, value)
        other = sorted(
            key for key, given in keywords.items() if key not in IGNORED and _says_something(given)
        )
        if other:
            raise Refused(
                f"{name} gives its attention {', '.join(other)}, which paged attention does not know"
            )
        dropout = keywords.get("dropout")
        if dropout:
            raise Refused(f"{name} drops out attention ({dropout}) outside training")
        scale = keywords.get("scaling")
        self.calls.append(
            AttentionCall(
                module=name,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                v_head_dim=v_dim,
                scale=dim**-0.5 if scale is None else _number(name, "scaling", scale),
                window=_window(name, mask, module, keywords, self.max_position),
                softcap=_softcap(name, keywords.get("softcap")),
                sinks=keywords.get("s_aux") is not None,
            )
        )
        return query.new_empty((1, query.shape[2], heads, v_dim))


def probe(model_class: Any, config: Any, max_position: int) -> Probed:
    """Run ``model_class(config)`` without weights. ``config`` is not changed.

    Args:
        max_position: positions the model has; a window that long is none.

    Raises:
        Refused: it asks for what paged attention does not do, or cannot be run in this way.
    """
    register()
    config = copy.deepcopy(config)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # it asks which experts are hit, and _Choices says none
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    try:
        # No values: torch's generators are not drawn from. Conditions on values are _Choices, which a host's
        # inference mode would pass by.
        with torch.inference_mode(False), torch.device("meta"), torch.no_grad(), _Choices():  # type: ignore[no-untyped-call]
            model = model_class._from_config(config, attn_implementation=PROBE).eval()
            base, head = split(model)
            takes_positions(base)
            short, hidden = _run(base, layers, min(SHORT, max_position), max_position)
            logits = head(inputs_embeds=hidden, use_cache=False)[0]
            long, _ = _run(base, layers, min(LONG, max_position), max_position)
    except Refused:
        raise
    except Exception as error:  # someone else's code, run in a way its author may not have thought of
        raise Refused(
            f"it cannot be run without weights ({type(error).__name__}: {first_line(error)})"
        ) from error
    if long != short:
        raise Refused("its attention depends on how many tokens run at once")
    if logits.shape[:2] != hidden.shape[:2]:
        raise Refused(f"its logits for {hidden.shape[1]} tokens have shape {list(logits.shape)}")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < logits.shape[-1]:
        raise Refused(f"it has logits for {logits.shape[-1]} tokens and embeddings of {rows}")
    return Probed(tuple(short), hidden.shape[-1], logits.shape[-1], tuple(_parameters(model, short)))


def _run(
    base: Any, layers: int | None, tokens: int, max_position: int
) -> tuple[list[AttentionCall], torch.Tensor]:
    """(the calls of attention for ``tokens`` tokens, hidden states)."""
    recorder = _Recorder({module: name for name, module in base.named_modules()}, tokens, max_position)
    hidden = base(
        input_ids=torch.zeros((1, tokens), dtype=torch.int64),
        position_ids=torch.arange(tokens).unsqueeze(0),
        use_cache=False,
        **{STEP: recorder},
    )[0]
    if len(recorder.calls) != layers:
        raise Refused(
            f"{len(recorder.calls)} of its {layers} layers attend through the attention-function registry; the "
            "others mix tokens in another way"
        )
    return recorder.calls, hidden


class BodyOutput:
    """What a model's body returns, as far as a head needs it: hidden states; whatever else it asks for is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class Passthrough(torch.nn.Module):
    """Stands where a model's body was: "last hidden states" are the embeddings it is given."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> BodyOutput:
        return BodyOutput(inputs_embeds)


def split(model: Any) -> tuple[Any, Any]:
    """(the body, ids to hidden states; the head, hidden states as ``inputs_embeds`` to logits).

    The head is the model's own class and forward, with all that it does after its body; both share its modules.
    """
    embedding = model.get_input_embeddings()
    places = [name for name, part in model.named_children() if any(m is embedding for m in part.modules())]
    if len(places) != 1 or model._modules[places[0]] is embedding:
        raise Refused("it has no body of its own, apart from its head")
    head = copy.copy(model)
    head._modules = {**model._modules, places[0]: Passthrough()}
    return model._modules[places[0]], head


def takes_positions(base: Any) -> None:
    """Refuse a body that counts positions by itself: a step holds pieces of several sequences."""
    taken = inspect.signature(base.forward).parameters
    if "position_ids" not in taken:
        raise Refused("it takes no position_ids: a token's position would be its place in the batch")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise Refused("it does not take further keyword arguments for its attention")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def _sizes(
    name: str, tokens: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[int, int, int, int]:
    """(query heads, KV heads, elements of a head of K, of V)."""
    if query.dim() != 4 or query.shape[0] != 1 or query.shape[2] != tokens:
        raise Refused(
            f"{name} attends with queries of shape {list(query.shape)}, which are not those of its tokens"
        )
    if key.shape[2] != tokens:
        raise Refused(f"{name} attends to {key.shape[2]} keys for {tokens} tokens: not to the same sequence")
    heads, kv_heads, dim, v_dim = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
    if dim != v_dim:
        raise Refused(f"a head of K has {dim} elements and one of V {v_dim} in {name}; they must be equal")
    if query.shape[3] != dim or value.shape[1] != kv_heads or heads % kv_heads:
        shapes = f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        raise Refused(f"{name} attends with q, k, v of shapes {shapes}")
    return heads, kv_heads, dim, v_dim


def _says_something(given: object) -> bool:
    return given is not None and given is not False


def _number(name: str, keyword: str, given: object) -> float:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    raise Refused(
        f"{name} gives its attention {keyword} as {type(given).__name__}; only a number is one for all"
    )


def _softcap(name: str, given: object) -> float | None:
    return _number(name, "softcap", given) if given else None


def _window(
    name: str, mask: object, module: torch.nn.Module, keywords: Mapping[str, Any], max_position: int
) -> int | None:
    """Tokens that a query sees by the mask's rule; ``None`` = all up to itself."""
    if mask is None:
        stated = keywords.get("is_causal")
        if not (getattr(module, "is_causal", False) if stated is None else stated):
            raise Refused(f"{name} also attends to later tokens: it is not causal")
        if keywords.get("sliding_window") is not None and keywords["sliding_window"] < max_position:
            raise Refused(f"{name} states a sliding window, but has no mask for it")
        return None
    # A layer may use a part of the mask, which then is a view of it.
    rule = getattr(mask, "kvpage_rule", None) or getattr(getattr(mask, "_base", None), "kvpage_rule", None)
    if rule is None:
        raise Refused(f"{name} has a mask of its own, or a bias on its scores (such as ALiBi)")
    return _window_of(name, rule, max_position)


def _window_of(name: str, rule: Any, max_position: int) -> int | None:
    last = max_position - 1
    keys = torch.arange(max_position, device="cpu")
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    window = max_position
    for query in sorted({last, last // 2, last // 3, last // 7, *range(min(4, max_position))}, reverse=True):
        try:
            seen = rule(zero, zero, torch.tensor(query, device="cpu"), keys).expand(max_position)
            visible = seen.nonzero().flatten().tolist() if query < 64 else _ends(seen)
        except Exception as error:  # a rule of the model's own
            raise Refused(
                f"the mask of {name} is neither causal nor a sliding window (chunked attention?)"
            ) from error
        if not visible or visible[-1] != query:
            raise Refused(
                f"{name} also attends to later tokens, or not to the token itself: it is not causal"
            )
        if query == last:
            window = query - visible[0] + 1
        lowest = max(0, query - window + 1)
        if visible[0] != lowest or (query < 64 and visible != list(range(lowest, query + 1))):
            raise Refused(
                f"{name} attends neither to all tokens before nor to a sliding window of them (chunked attention?)"
            )
    return None if window >= max_position else window


def _ends(seen: torch.Tensor) -> list[int]:
    """First and last of the true entries, where they are in one piece."""
    found = seen.nonzero().flatten()
    whole = len(found) > 0 and int(found[-1] - found[0]) + 1 == len(found)
    return [int(found[0]), int(found[-1])] if whole else []


def _parameters(model: Any, calls: list[AttentionCall]) -> list[ProbedParameter]:
    """Every parameter, by the part of the model that its place or its name tells."""
    attention = tuple(f".{call.module}." for call in calls)
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    places: dict[int, str] = {}
    for module, place in ((outside, "head"), (inside, "embedding")):
        places.update(
            (id(parameter), place) for parameter in (module.parameters() if module is not None else ())
        )

    def part_of(name: str, parameter: torch.Tensor) -> str:
        if id(parameter) in places:
            return places[id(parameter)]
        if "norm" in name.rpartition(".")[0].rpartition(".")[2] or ".ln_" in name:
            return "norms"
        if any(place in f".{name}" for place in attention):
            return "attention"
        if "embed" in name or ".wpe." in name:
            return "embedding"
        return "moe" if "expert" in name or "router" in name else "mlp"

    return [ProbedParameter(name, tuple(p.shape), part_of(name, p)) for name, p in model.named_parameters()]
