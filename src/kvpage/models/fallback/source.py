"""Where a fallback model comes from: its class and config, its weights from a folder, made up, or in memory.

transformers is imported here and nowhere else in kvpage but the tokenizers; only where a model needs it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvpage.errors import CheckpointError
from kvpage.models.fallback.attention import PAGED, Refused, register
from kvpage.models.fallback.probe import first_line, probe
from kvpage.models.fallback.spec import FallbackSpec, make_spec, stated_context
from kvpage.models.hf_config import HFConfig

Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]
_QUIET = threading.Lock()
OLDEST = 5
"""transformers' major version whose masks and loading this is written against."""


@dataclass(frozen=True, slots=True)
class FallbackDefinition:
    """What runs: the spec, transformers' class and config, and where the weights are.

    ``module``: a model in memory, whose weights are shared; else ``folder`` has them.
    """

    spec: FallbackSpec
    model_class: Any
    config: Any
    folder: Path | None
    module: Any


def define_fallback(
    config: HFConfig,
    *,
    folder: Path | None = None,
    module: Any = None,
    trust_remote_code: bool = False,
    max_model_len: int | None = None,
) -> FallbackDefinition:
    """A model of ``folder`` (a config is enough) or in memory, probed.

    Raises:
        Refused: it cannot run through the fallback; the message is why.
    """
    with quiet_transformers():
        model_class, own = _find(config, folder, module, trust_remote_code)
        if getattr(own, "is_encoder_decoder", False):
            raise Refused("it is an encoder-decoder")
        if not getattr(model_class, "_supports_attention_backend", False):
            raise Refused(_why_not(model_class, own))
        context = stated_context(config, max_model_len)
        probed = probe(model_class, own, context)
    return FallbackDefinition(
        make_spec(model_class.__name__, probed, context), model_class, own, folder, module
    )


def _why_not(model_class: Any, own: Any) -> str:
    """Why a class that transformers does not mark for other attention functions cannot run."""
    if not getattr(model_class, "_is_stateful", False):
        return "its attention does not go through transformers' attention-function registry"
    kinds = getattr(own, "layer_types", None) or getattr(own, "layers_block_type", None) or ()
    other = sorted({str(kind) for kind in kinds if "attention" not in str(kind) or "linear" in str(kind)})
    named = f" (of kind {', '.join(other)})" if other else ""
    return f"layers{named} keep a state of their own from token to token, and kvpage keeps K and V only"


def load_module(
    definition: FallbackDefinition, *, dtype: torch.dtype, device: str, dummy: bool, allocate: Allocate
) -> Any:
    """transformers' model of ``definition``, ready to attend through kvpage; the caller may change it.

    Weights of a folder, and made-up ones, lie in memory from ``allocate`` where ``device`` is the CPU. A model in
    memory is copied in structure only: its parameters are shared unless they have another dtype or device.

    Raises:
        CheckpointError: transformers cannot load the folder, or tensors are missing from it.
    """
    register()
    if definition.module is not None:
        model = _structural_copy(definition.module, dtype, device)
        _attend_as(model, PAGED)
        return model.eval()
    with quiet_transformers(), torch.device("cpu"):
        model = _made_up(definition, dtype) if dummy else _from_folder(definition, dtype)
    model = model.eval().to(device)
    if torch.device(device).type == "cpu":
        for tensor in [*model.parameters(), *model.buffers()]:
            own = allocate(tuple(tensor.shape), tensor.dtype)
            tensor.data = own.copy_(tensor.detach())
    return model


@contextmanager
def attending_as(model: Any, implementation: str) -> Iterator[None]:
    """``model`` (the engine's own) with another of transformers' attention functions, for a while."""
    _attend_as(model, implementation)
    try:
        yield
    finally:
        _attend_as(model, PAGED)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports on the host's stderr while transformers works for us; all is put back."""
    try:
        from transformers import __version__ as version
        from transformers.utils import logging
    except ImportError as error:
        raise Refused(
            "running it through transformers needs that package: pip install 'kvpage[transformers]'"
        ) from error
    if int(version.partition(".")[0]) < OLDEST:
        raise Refused(f"running it through transformers needs version {OLDEST} or newer, found {version}")
    with _QUIET:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            # Initialisers draw from torch's generator, even for weights that are then read.
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _find(config: HFConfig, folder: Path | None, module: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    """(transformers' class, its config object)."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if module is not None:
        if not isinstance(module, transformers.PreTrainedModel):
            raise Refused(f"{type(module).__name__} is not a transformers model")
        return type(module), copy.deepcopy(module.config)
    assert folder is not None, "a definition has a folder or a module"
    remote = config.get(dict, "auto_map", {}).get("AutoModelForCausalLM")
    names = config.architectures
    known = next((name for name in names if hasattr(transformers, name)), None)
    if known is None and remote is None and not names:
        raise Refused(
            "its config states no 'architectures', so that nobody knows what it is: add that key, such as "
            '"architectures": ["LlamaForCausalLM"]'
        )
    if known is None and remote is None:
        raise Refused(
            f"transformers {transformers.__version__} has no class of that name, and the checkpoint brings none"
        )
    if known is None and not trust_remote_code:
        raise Refused(
            "its code comes with the checkpoint: read it, then allow it with trust_remote_code=True"
        )
    try:
        own = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code if known is None else False, local_files_only=True
        )
        if known is None:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(str(remote), str(folder), local_files_only=True), own
    except Exception as error:  # whatever a config class, or the checkpoint's own code, raises
        raise Refused(
            f"transformers cannot read its config ({type(error).__name__}: {first_line(error)})"
        ) from error
    causal = {name for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(entry)}
    if known not in causal:
        raise Refused(f"{known} is not one of transformers' causal language models")
    model_class = getattr(transformers, known)
    wanted = getattr(model_class, "config_class", None)
    return model_class, own if wanted is None or isinstance(own, wanted) else own.get_text_config()


def _names(entry: object) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (str(entry),)


def _made_up(definition: FallbackDefinition, dtype: torch.dtype) -> Any:
    torch.default_generator.manual_seed(0)
    return definition.model_class._from_config(
        copy.deepcopy(definition.config), dtype=dtype, attn_implementation=PAGED
    )


def _from_folder(definition: FallbackDefinition, dtype: torch.dtype) -> Any:
    try:
        model, found = definition.model_class.from_pretrained(
            definition.folder,
            config=copy.deepcopy(definition.config),
            dtype=dtype,
            attn_implementation=PAGED,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, RuntimeError, and its readers their own
        raise CheckpointError(
            f"transformers cannot load {definition.folder} ({type(error).__name__}: {first_line(error)}): "
            "fetch the checkpoint again"
        ) from error
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"{definition.folder}: {len(lacking)} tensors are missing or have another shape than config.json says "
            f"({', '.join(lacking[:4])} ...): the checkpoint is incomplete, or its config belongs to another model"
        )
    return model


def _structural_copy(module: Any, dtype: torch.dtype, device: str) -> Any:
    """A copy whose modules, buffers and config are its own, and whose parameters are those of ``module``."""
    parameters = list(module.parameters())
    if module.dtype == dtype and all(p.device.type == torch.device(device).type for p in parameters):
        return copy.deepcopy(module, {id(parameter): parameter for parameter in parameters})
    return copy.deepcopy(module).to(device=device, dtype=dtype)


def _attend_as(model: Any, implementation: str) -> None:
    """Set the attention function by name, in the config of every module (parts of a model may have their own)."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = implementation
