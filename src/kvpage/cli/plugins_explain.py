"""``kvpage plugins explain``: what an engine would take of what plugins offer, and why not each other one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvpage.api.records import Record
from kvpage.cli.main import OK
from kvpage.cli.signals import undivided
from kvpage.config import EngineOptions, resolve_dtype
from kvpage.flags.engine import add_engine_flags, add_model_argument, chosen_model, engine_options
from kvpage.flags.parser import CommandParser
from kvpage.plugins import PluginRegistry
from kvpage.plugins.discovery import describe
from kvpage.plugins.factories import lacking
from kvpage.plugins.selection import Rejected, choose_reader

if TYPE_CHECKING:
    from kvpage.api.attention import AttentionNeed
    from kvpage.engine.backends import Backends
    from kvpage.engine.quantization import SchemeChoice

EXPLAIN = """\
Which attention backend, decoder backend, checkpoint reader, quantization scheme, linear kernels and sampling kernel an
engine with these flags would take, why not each other one, and what plugins say of this machine."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One choice: ``chosen`` is "" where nothing of the kind is needed; ``others``: (name, why not) each."""

    kind: str
    chosen: str
    why: str
    others: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """A line a name, the chosen one first."""
        taken = f"{self.chosen}: chosen, {self.why}" if self.chosen else f"none: {self.why}"
        return [f"{self.kind}:", f"  {taken}", *(f"  {name}: no: {why}" for name, why in self.others)]


def explain(arguments: Sequence[str]) -> int:
    """``kvpage plugins explain``."""
    parser = CommandParser("kvpage plugins explain", EXPLAIN, "[MODEL]")
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_engine_flags(parser)
    namespace = parser.parse_arguments(arguments)
    options = EngineOptions(model=chosen_model(namespace), **engine_options(namespace))
    registry = PluginRegistry()

    with undivided():  # torch, as the backends themselves
        from kvpage.engine.attention import attention_need
        from kvpage.engine.backends import choose_backends, find_device
        from kvpage.engine.quantization import find_scheme
        from kvpage.engine.source import define_model, find_model
    source = find_model(options, registry, weights=False)
    definition, _ = define_model(options, source, registry)
    device = find_device(options.device)
    dtype = resolve_dtype(options, source.config.dtype or "float32", device.partition(":")[0])
    need = attention_need(options, definition.spec, device, dtype)
    scheme = find_scheme(options, source.config, registry)
    backends = choose_backends(options, registry, definition.spec, device, dtype)
    size = backends.attention.block_size
    with undivided():
        told = registry.descriptions()
    choices = [
        _attention(registry, backends),
        _decoder(registry, backends),
        _reader(options, registry, source.reader),
        _scheme(registry, scheme),
        *_kernels(registry, backends, scheme),
        _sampling(registry, backends),
    ]
    if namespace.json:
        facts = {"model": str(options.model), "need": _need(need), "block_size": size,
                 "choices": [asdict(choice) for choice in choices], "descriptions": told}  # fmt: skip
        print(json.dumps(facts, indent=2))
        return OK
    features = ", ".join(sorted(need.features)) or "none"
    dims = ", ".join(str(dim) for dim in sorted(need.head_dims))
    print(
        f"{options.model} needs: device {need.device}, {need.dtype}, KV in {need.kv_dtype}, head dim {dims}, "
        f"block size {need.block_size or 'any'}, features: {features}"
    )
    print("\n".join(line for choice in choices for line in choice.lines()))
    print("\n".join([*backends.attention.ignored, f"block size {size}"]))
    for name, lines in told.items():
        print("\n".join([f"{name} says:", *(f"  {line}" for line in lines)]))
    return OK


def _need(need: AttentionNeed) -> dict[str, Any]:
    return {**asdict(need), "head_dims": sorted(need.head_dims), "features": sorted(need.features)}


def _others(
    records: Iterable[Record], chosen: str, rejected: Rejected, otherwise: str
) -> tuple[tuple[str, str], ...]:
    """(name, why not) of all but ``chosen``: what was found against it, else that it was not needed."""
    known = {name: "; ".join(reasons) for name, reasons in rejected}
    return tuple((r.name, known.get(r.name, lacking(r) or otherwise)) for r in records if r.name != chosen)


def _attention(registry: PluginRegistry, backends: Backends) -> Explained:
    choice, decoder = backends.attention, backends.decoder
    if choice.why == "given":
        after = f"{choice.record.name} was named"
    elif decoder is not None and decoder.backend.attention is not None:
        after = f"decoder backend {decoder.record.name} works with {choice.record.name}"
    else:
        after = f"{choice.record.name} was found first"
    others = _others(registry.attention_backends(), choice.record.name, choice.rejected, after)
    return Explained(
        "attention backend", choice.record.name, f"{choice.why} (priority {choice.record.priority})", others
    )


def _decoder(registry: PluginRegistry, backends: Backends) -> Explained:
    records, choice = registry.decoder_backends(), backends.decoder
    if choice is None:
        why = "the model is computed by transformers' own code"
        return Explained("decoder backend", "", why, _others(records, "", (), why))
    after = (
        f"it follows if {choice.record.name} declines the weights"
        if choice.why != "given"
        else "another is named"
    )
    others = _others(records, choice.record.name, choice.rejected, after)
    return Explained(
        "decoder backend", choice.record.name, f"{choice.why} (priority {choice.record.priority})", others
    )


def _reader(options: EngineOptions, registry: PluginRegistry, reader: object) -> Explained:
    records = registry.checkpoint_readers()
    path = getattr(reader, "path", None)
    if path is None:
        return Explained(
            "checkpoint reader", "", "the model is in memory", _others(records, "", (), "not needed")
        )
    choice = choose_reader(records, options.load_format, path)
    others = _others(records, choice.record.name, choice.rejected, f"{choice.record.name} comes first")
    return Explained("checkpoint reader", choice.record.name, choice.why, others)


def _scheme(registry: PluginRegistry, scheme: SchemeChoice | None) -> Explained:
    records = registry.quantization_schemes()
    if scheme is None:
        why = "the checkpoint is plain, and --quantization names none"
        return Explained("quantization scheme", "", why, _others(records, "", (), "it is not asked for"))
    method = scheme.config.get("quant_method")
    why = "named by --quantization" if method is None else f"it reads the checkpoint's {method}"
    others = _others(records, scheme.record.name, (), f"{scheme.record.name} is taken")
    return Explained("quantization scheme", scheme.record.name, why, others)


def _sampling(registry: PluginRegistry, backends: Backends) -> Explained:
    choice = backends.sampling
    name = choice.record.name
    others = _others(registry.sampling_kernels(), name, choice.rejected, f"{name} was found first")
    return Explained("sampling kernel", name, f"by priority (priority {choice.record.priority})", others)


def _kernels(registry: PluginRegistry, backends: Backends, scheme: SchemeChoice | None) -> list[Explained]:
    """The kernel of plain weights; and, as far as it is known without weights, those of a scheme's forms."""
    import torch

    from kvpage.api.quant import Dense, LinearEnv
    from kvpage.plugins.selection import choose_kernels

    kind = "linear kernel for plain weights"
    records = registry.linear_kernels()
    if backends.decoder is None:
        why = "the model is computed by transformers' own code"
        return [Explained(kind, "", why, _others(records, "", (), why))]
    kernels, lost = choose_kernels(records)
    where = LinearEnv(device=torch.device(backends.env.device).type, dtype=backends.env.dtype)
    form = Dense(torch.empty((1, 1), dtype=getattr(torch, where.dtype), device=where.device))
    chosen, rejected = "", lost
    for name, kernel in kernels.items():
        try:
            reasons = tuple(kernel.supports(form, where))
        except Exception as error:  # foreign code
            reasons = (f"supports() raised {describe(error)}",)
        if not reasons:
            chosen = name
            break
        rejected += ((name, reasons),)
    others = _others(records, chosen, rejected, f"{chosen} comes first")
    plain = Explained(kind, chosen, "the first that supports plain weights", others)
    if scheme is None:
        return [plain]
    taken = scheme.record.name
    why = f"chosen when the weights are read: the first that supports their form, of {', '.join(kernels)}"
    unusable = tuple((name, "; ".join(reasons)) for name, reasons in lost)
    return [Explained(f"linear kernel for weights of scheme {taken}", "", why, unusable), plain]
