"""Choosing among records: deterministic, by name or in an order, and with a reason for each that was not taken."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kvpage.api.attention import AttentionBackend, AttentionNeed
from kvpage.api.decoder import DecoderBackend, Reasons
from kvpage.api.model import DecoderEnv, DecoderSpec
from kvpage.api.quant import LinearKernel
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
    Record,
)
from kvpage.errors import ConfigError, KvpageError, PluginError

if TYPE_CHECKING:
    from kvpage.api.model import CausalLM
    from kvpage.api.quant import WeightForm

Rejected: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""(name, reasons) of each that was asked before the one that was taken, in their order."""
Opinion: TypeAlias = Callable[[AttentionNeed, Sequence[str]], tuple[str | None, str, list[str]]]
"""(need, candidates) -> (one of them or ``None``, which plugin says so, answers that were ignored and why)."""

SAFETENSORS = "safetensors"
DUMMY = "dummy"


def load(record: Record) -> Any:
    """What a record's factory names.

    Raises:
        PluginError: something it needs is not installed, the module cannot be imported, or lacks the name.
    """
    needs = unavailable(record)
    if needs:
        raise PluginError(f"{record.name} {needs}")
    module, _, name = record.factory.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing foreign code may raise anything
        raise PluginError(f"{record.name}: {record.factory} cannot be imported: {error}") from error


def load_class(record: Record, base: type[Any]) -> Any:
    """The class that a record's factory names.

    Raises:
        PluginError: as ``load``; or it is no subclass of ``base``.
    """
    found = load(record)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"{record.name}: {record.factory} is no subclass of {base.__module__}.{base.__name__}"
        )
    return found


def unavailable(record: Record) -> str:
    """ "needs ..." where a module that the record needs is not installed, else "". Nothing is imported."""
    missing = [name for name in record.needs if not _is_installed(name)]
    if not missing:
        return ""
    return f"needs {record.install or ', '.join(missing) + ', which is not installed'}"


def _is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing the packages that it lies in."""
    if sys.modules.get(module) is not None:
        return True
    path: Sequence[str] | None = None
    parts = module.split(".")
    try:
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            spec = (
                importlib.util.find_spec(name)
                if end == 1
                else importlib.machinery.PathFinder.find_spec(name, path)
            )
            if spec is None:
                return False
            path = spec.submodule_search_locations
            if path is None and end < len(parts):
                return False
    except (ImportError, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The attention backend that was chosen, and why each one before it in the order was not.

    Attributes:
        why: "given", "by priority", "chosen by plugin ...".
        ignored: what plugins answered when asked which to take, and why that was not followed.
    """

    record: AttentionBackendRecord
    backend: type[AttentionBackend]
    block_size: int
    rejected: Rejected
    why: str = "given"
    ignored: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Its name and why it was chosen, in one line."""
        return with_reasons(self.record.name, self.why, self.rejected)

    def explain(self) -> str:
        """One line a backend."""
        chosen = f"{self.record.name}: chosen, {self.why} (priority {self.record.priority})"
        return "\n".join([*no_lines(self.rejected), *self.ignored, chosen])


@dataclass(frozen=True, slots=True)
class DecoderCandidate:
    """A decoder backend that may build the model."""

    record: DecoderBackendRecord
    backend: type[DecoderBackend]


@dataclass(frozen=True, slots=True)
class BuiltDecoder:
    """A model, the decoder backend that built it, and why; ``rejected`` has all that were asked before it."""

    model: CausalLM
    record: DecoderBackendRecord
    rejected: Rejected
    why: str

    @property
    def reason(self) -> str:
        """Its name and why it was chosen, in one line."""
        return with_reasons(self.record.name, self.why, self.rejected)


@dataclass(frozen=True, slots=True)
class DecoderChoice:
    """Decoder backends that may build a model, in order, all over the same attention backend.

    ``rejected``: those that cannot, known before a weight is read.
    """

    candidates: tuple[DecoderCandidate, ...]
    attention: BackendChoice
    rejected: Rejected
    why: str = "given"

    @property
    def record(self) -> DecoderBackendRecord:
        """The first to be asked."""
        return self.candidates[0].record

    @property
    def backend(self) -> type[DecoderBackend]:
        """The first to be asked."""
        return self.candidates[0].backend

    def explain(self) -> str:
        """One line a backend."""
        first, *others = [candidate.record for candidate in self.candidates]
        return "\n".join([
            *no_lines(self.rejected),
            f"{first.name}: chosen, {self.why} (priority {first.priority})",
            *(f"{other.name}: would follow if that declines the weights" for other in others),
        ])  # fmt: skip

    def build(self, spec: DecoderSpec, weights: Mapping[str, WeightForm], env: DecoderEnv) -> BuiltDecoder:
        """The model, by the first candidate that builds it.

        Raises:
            ConfigError: none does; the message has each one's reasons.
            KvpageError: what the last one raised, if that is one of kvpage's errors.
            PluginError: the last one raised anything else.
        """
        rejected = list(self.rejected)
        for candidate in self.candidates:
            last = candidate is self.candidates[-1]
            try:
                found = candidate.backend().build(spec, weights, env)
            except MemoryError:
                raise
            except Exception as error:  # foreign code; the next one may do
                if last and isinstance(error, KvpageError):
                    raise
                if last:
                    raise PluginError(
                        f"decoder backend {candidate.record.name!r} cannot build {spec.family} "
                        f"({type(error).__name__}: {error}): leave its plugin out or repair it"
                    ) from error
                reasons: tuple[str, ...] = (f"{type(error).__name__}: {error}",)
            else:
                if callable(getattr(found, "forward", None)) and not isinstance(found, Reasons):
                    return BuiltDecoder(found, candidate.record, tuple(rejected), self.why)
                reasons = (
                    found.texts
                    if isinstance(found, Reasons)
                    else (f"build() returned {found!r:.80}, no model",)
                )
            rejected.append((candidate.record.name, tuple(reasons) or ("it gave no reason",)))
        raise ConfigError(f"no decoder backend can run this model: {'; '.join(no_lines(tuple(rejected)))}")


@dataclass(frozen=True, slots=True)
class ReaderChoice:
    """The checkpoint reader that was chosen, and why each one before it in the order was not."""

    record: CheckpointReaderRecord
    rejected: Rejected
    why: str = "given"

    def explain(self) -> str:
        """One line a reader."""
        return "\n".join([*no_lines(self.rejected), f"{self.record.name}: chosen, {self.why}"])


def no_lines(rejected: Rejected) -> list[str]:
    """ "name: no: reasons" each."""
    return [f"{name}: no: {'; '.join(reasons)}" for name, reasons in rejected]


def with_reasons(name: str, why: str, rejected: Rejected) -> str:
    """ "name (why; other: no: reasons)"."""
    return f"{name} ({'; '.join([why, *no_lines(rejected)])})"


def choose_attention(
    records: Sequence[AttentionBackendRecord],
    need: AttentionNeed,
    explicit: str | None = None,
    opinion: Opinion | None = None,
) -> BackendChoice:
    """The backend named, or an error; else what ``opinion`` says of those that can serve ``need``; else the first
    in the order of ``records``.

    Raises:
        ConfigError: the named backend is unknown or lacks something, or no backend is left.
    """
    if explicit is not None:
        known = ", ".join(record.name for record in records)
        records = [record for record in records if record.name == explicit]
        if not records:
            raise ConfigError(f"attention_backend={explicit!r} is not registered; known: {known}")
    rejected: list[tuple[str, tuple[str, ...]]] = []
    fit: list[BackendChoice] = []
    for record in records:
        try:
            backend = load_class(record, AttentionBackend)
            reasons = backend.caps.missing(need)
            size = need.block_size or backend.caps.preferred_block_size
        except Exception as error:  # caps are foreign code
            reasons = [str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"]
        if reasons:
            rejected.append((record.name, tuple(reasons)))
            continue
        why = "by priority" if explicit is None else "given"
        fit.append(BackendChoice(record, backend, size, tuple(rejected), why))
        if explicit is not None or opinion is None:
            return fit[0]
    if not fit:
        lines = "; ".join(f"{name} lacks {', '.join(reasons)}" for name, reasons in rejected)
        raise ConfigError(f"no attention backend can serve this engine: {lines}")
    assert opinion is not None
    answer, plugin, ignored = opinion(need, tuple(choice.record.name for choice in fit))
    choice = _preferred(fit, answer, plugin)
    return replace(choice, rejected=tuple(rejected) + choice.rejected, ignored=tuple(ignored))


def _preferred(fit: Sequence[BackendChoice], answer: str | None, plugin: str) -> BackendChoice:
    """The one that ``plugin`` answered, else the first; ``rejected`` has those that it passed over."""
    if answer is None:
        return replace(fit[0], rejected=())
    taken = next(choice for choice in fit if choice.record.name == answer)
    reason = (f"plugin {plugin!r} chose {answer}",)
    passed = tuple((choice.record.name, reason) for choice in fit[: fit.index(taken)])
    return replace(taken, rejected=passed, why=f"by plugin {plugin!r}")


def choose_decoder(
    records: Sequence[DecoderBackendRecord],
    choose: Callable[[str | None], BackendChoice],
    spec: DecoderSpec,
    env: DecoderEnv,
    *,
    explicit: str | None = None,
    attention: str | None = None,
) -> DecoderChoice:
    """The decoder backends that may run ``spec``, in the order of ``records``, with the first one's attention
    backend; or the one that is named, or an error.

    Args:
        choose: chooses an attention backend, the one of that name or any.
        explicit, attention: the ``decoder_backend`` and ``attention_backend`` that the user named.

    Raises:
        ConfigError: the named decoder backend is unknown or refuses, or no attention backend can serve.
    """
    if explicit is not None:
        known = ", ".join(record.name for record in records)
        records = [record for record in records if record.name == explicit]
        if not records:
            raise ConfigError(f"decoder_backend={explicit!r} is not registered; known: {known}")
    rejected: list[tuple[str, tuple[str, ...]]] = []
    candidates: list[DecoderCandidate] = []
    chosen: BackendChoice | None = None
    for record in records:
        backend, reasons = _willing(record, spec, env)
        if backend is not None and not reasons:
            paired = backend.attention
            if paired is None:
                chosen = chosen or choose(attention)
            elif attention not in (None, paired):
                reasons = [f"it works with the attention backend {paired}, and {attention} is named"]
            elif chosen is not None and chosen.record.name != paired:
                reasons = [f"it works with the attention backend {paired}, and {chosen.record.name} is taken"]
            elif chosen is None:
                try:
                    chosen = choose(paired)
                except ConfigError as error:
                    reasons = [f"its attention backend {paired} does not serve: {error}"]
        if backend is None or reasons:
            rejected.append((record.name, tuple(reasons)))
        else:
            candidates.append(DecoderCandidate(record, backend))
    if chosen is None or not candidates:
        lines = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in rejected)
        raise ConfigError(
            f"no decoder backend can run this model: {lines}"
            if explicit is None
            else f"decoder_backend={explicit!r} cannot run this model: {lines}; leave it out to take another"
        )
    return DecoderChoice(
        tuple(candidates), chosen, tuple(rejected), "by priority" if explicit is None else "given"
    )


def _willing(
    record: DecoderBackendRecord, spec: DecoderSpec, env: DecoderEnv
) -> tuple[type[DecoderBackend] | None, list[str]]:
    """(the class, why it refuses ``spec``)."""
    try:
        backend = load_class(record, DecoderBackend)
        return backend, [str(reason) for reason in backend.refuses(spec, env)]
    except PluginError as error:
        return None, [str(error)]
    except Exception as error:  # foreign code
        return None, [f"refuses() raised {type(error).__name__}: {error}"]


def choose_reader(records: Sequence[CheckpointReaderRecord], load_format: str, path: Path) -> ReaderChoice:
    """The reader that ``load_format`` names; for "auto" and "dummy" the first whose files are at ``path``, a folder
    or a file, else the builtin one, which says what is missing.

    Raises:
        ConfigError: no reader has that name.
    """
    named = {record.name: record for record in records}
    if load_format not in {"auto", DUMMY}:
        check_load_format(load_format, named)
        return ReaderChoice(named[load_format], ())
    names = [path.name] if path.is_file() else sorted(file.name for file in path.iterdir() if file.is_file())
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for record in records:
        found = claimed(record, names)
        reason = f"no file like {', '.join(record.files)}" if found is None else unavailable(record)
        if found is not None and not reason:
            return ReaderChoice(record, tuple(rejected), f"for {found}")
        rejected.append((record.name, (reason,)))
    # A file that only a reader without its modules claims is named by these.
    needing = next((r for r in records if claimed(r, names) is not None), named[SAFETENSORS])
    others = tuple(entry for entry in rejected if entry[0] != needing.name)
    return ReaderChoice(needing, others, "as no reader's files are there")


def check_load_format(load_format: str, names: Collection[str]) -> None:
    """Raises ConfigError unless ``load_format`` is "auto", "dummy" or one of ``names``."""
    if load_format not in {"auto", DUMMY, *names}:
        known = ", ".join(map(repr, ["auto", DUMMY, *names]))
        raise ConfigError(f"load_format must be one of {known}, got {load_format!r}")


def claimed(record: CheckpointReaderRecord, names: Collection[str]) -> str | None:
    """The first of the file ``names`` that the reader is for."""
    return next((n for n in names for pattern in record.files if fnmatch.fnmatchcase(n, pattern)), None)


def choose_kernels(records: Sequence[LinearKernelRecord]) -> tuple[tuple[type[LinearKernel], ...], Rejected]:
    """(the classes of all linear kernels in the order of ``records``, those that cannot be had and why)."""
    kernels: list[type[LinearKernel]] = []
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for record in records:
        try:
            kernels.append(load_class(record, LinearKernel))
        except PluginError as error:
            rejected.append((record.name, (str(error),)))
    return tuple(kernels), tuple(rejected)
