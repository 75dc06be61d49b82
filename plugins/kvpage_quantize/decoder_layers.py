"""A transformers model on the CPU, driven one decoder layer at a time: what each layer is called with, and its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvpage import CheckpointError, KvpageError
from kvpage_quantize.source import Source

LOG = logging.getLogger("kvpage.quantize")


@dataclass(slots=True)
class LayerCall:
    """What a layer was called with besides the hidden state: positions, mask."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def run(self, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``hidden`` [1, tokens, hidden]."""
        return _hidden_of(layer(hidden, *self.arguments, **self.keywords))


def load_model(source: Source) -> Any:
    """The transformers model, on the CPU and in the checkpoint's dtype.

    Raises:
        KvpageError: transformers is not installed, or does not load it.
    """
    try:
        import transformers
    except ImportError as error:
        raise KvpageError(
            "gptq and awq run the model with transformers: pip install 'kvpage[transformers]'"
        ) from error
    with _quiet(transformers), torch.device("cpu"):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(source.folder), local_files_only=True, trust_remote_code=False
            )
        except (ValueError, ImportError, OSError, KeyError, RuntimeError) as error:
            raise KvpageError(f"{source.folder}: transformers cannot load this model: {error}") from error
    return model.eval()


def decoder_layers(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """(name, list) of the decoder layers, where each layer's linear modules are.

    Raises:
        CheckpointError: no list of the config's number of layers is found.
    """
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, torch.nn.Module) and linear_modules(layer) for layer in module)
    ]
    if not found:
        raise CheckpointError(
            f"{type(model).__name__}: no list of {count} decoder layers with linear modules is found in it; quantize it "
            "with --method int8 or fp8"
        )
    return min(found, key=lambda pair: pair[0].count("."))


def linear_modules(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear modules of ``layer`` by their names in it."""
    return {name: part for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}


def check_linear_modules(
    layers: Sequence[torch.nn.Module], prefix: str, *, group_size: int, inputs: int, outputs: int
) -> None:
    """Whether every linear module of ``layers`` can be packed.

    Args:
        group_size: of its inputs; -1 = all. inputs, outputs: what their numbers must be multiples of.

    Raises:
        KvpageError: one cannot; it is named.
    """
    for index, layer in enumerate(layers):
        stacked = next((name for name, weight in layer.named_parameters() if weight.dim() == 3), None)
        if stacked is not None:
            raise KvpageError(
                f"{prefix}.{index}.{stacked} holds all experts in one tensor: gptq and awq quantize dense models; "
                "--method int8 and fp8 take mixtures of experts whose files have a tensor an expert"
            )
        for name, module in linear_modules(layer).items():
            at = f"{prefix}.{index}.{name}"
            if group_size > 0 and module.in_features % group_size:
                fitting = [size for size in (128, 64, 32, 16) if module.in_features % size == 0]
                way_out = f"try --group-size {fitting[0]}" if fitting else "use --method int8 or fp8"
                raise KvpageError(f"--group-size {group_size} does not divide the {module.in_features} inputs of {at}: {way_out}")  # fmt: skip
            if module.in_features % inputs or module.out_features % outputs:
                raise KvpageError(
                    f"{at} has {module.in_features} inputs and {module.out_features} outputs: this format packs multiples "
                    f"of {inputs} and {outputs}; use --method int8 or fp8"
                )


def record_calls(
    model: Any, layers: Sequence[torch.nn.Module], tokens: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[list[LayerCall]]]:
    """(hidden state of each sequence as layer 0 gets it, [sequence][layer] what else the layer is called with).

    Nothing of the layers is computed but layer 0 once, to see how it answers.
    """
    hidden: list[torch.Tensor] = []
    calls: list[list[LayerCall]] = []
    with _stand_ins(layers, hidden, calls), torch.no_grad():
        for sequence in tokens:
            calls.append([])
            model.base_model(
                input_ids=torch.tensor([list(sequence)], dtype=torch.int64, device="cpu"), use_cache=False
            )
    return hidden, calls


def linear_groups(
    layer: torch.nn.Module, call: LayerCall, hidden: torch.Tensor, prefix: str
) -> list[list[str]]:
    """The linear modules of ``layer`` in the order they run; those that share their input (q, k, v) are one group.

    Raises:
        KvpageError: one of them does not run for this text.
    """
    seen: list[tuple[str, torch.Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, arguments: seen.append((name, arguments[0]))

    modules = linear_modules(layer)
    handles = [part.register_forward_pre_hook(note(name)) for name, part in modules.items()]
    try:
        call.run(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    idle = sorted(set(modules) - {name for name, _ in seen})
    if idle:
        raise KvpageError(
            f"{prefix}.{idle[0]} sees no token of the calibration text: gptq and awq quantize dense models; use --method "
            "int8 or fp8"
        )
    groups: list[list[str]] = []
    last: torch.Tensor | None = None
    for name, given in seen:
        if last is not None and given.data_ptr() == last.data_ptr() and given.shape == last.shape:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = given
    return groups


@contextmanager
def _stand_ins(
    layers: Sequence[torch.nn.Module], hidden: list[torch.Tensor], calls: list[list[LayerCall]]
) -> Iterator[None]:
    """While this holds, layers note what they are called with and hand the hidden state on as it is."""
    own = [layer.forward for layer in layers]
    in_tuple: list[bool] = []

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            state = arguments[0] if arguments else keywords.pop("hidden_states")
            if not in_tuple:
                in_tuple.append(not isinstance(own[0](state, *arguments[1:], **keywords), torch.Tensor))
            if index == 0:
                hidden.append(state.float())
            calls[-1].append(LayerCall(arguments[1:], keywords))
            return (state,) if in_tuple[0] else state

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def _hidden_of(answer: Any) -> torch.Tensor:
    """A layer answers with the hidden state, in transformers 4 as the first of several values."""
    state: torch.Tensor = answer if isinstance(answer, torch.Tensor) else answer[0]
    return state


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' own progress bars; as it was afterwards."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
