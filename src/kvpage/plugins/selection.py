"""Choosing among records: deterministic, by name or in an order, and with a reason for each that was not taken."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kvpage.api.attention import AttentionBackend, AttentionCaps, AttentionNeed
from kvpage.api.decoder import DecoderBackend, Reasons
from kvpage.api.model import DecoderEnv, DecoderSpec
from kvpage.api.quant import LinearKernel
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
)
from kvpage.errors import ConfigError, KvpageError, PluginError
from kvpage.plugins.discovery import describe
from kvpage.plugins.factories import load_class, unavailable

if TYPE_CHECKING:
    from kvpage.api.model import CausalLM
    from kvpage.api.quant import WeightForm

Rejected: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""(name, reasons) of each that was asked before the one that was taken, in their order."""
Opinion: TypeAlias = Callable[[AttentionNeed, Sequence[str]], tuple[str | None, str, list[str]]]
"""(need, candidates) -> (one of them or ``None``, which plugin says so, answers that were ignored and why)."""
Trial: TypeAlias = Callable[[AttentionBackendRecord, type[AttentionBackend], int], None]
"""(record, its class, block size): makes it as an engine would, and raises PluginError where that fails."""

SAFETENSORS = "safetensors"
DUMMY = "dummy"


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The attention backend that was chosen, and why each one before it in the order was not.

    Attributes:
        why: "given", "by priority", "by plugin ...", "with decoder backend ...".
        ignored: what plugins answered when asked which to take, and why that was not followed.
        broken: those of ``rejected`` that are defective, where others merely lack what is needed.
    """

    record: AttentionBackendRecord
    backend: type[AttentionBackend]
    block_size: int
    rejected: Rejected
    why: str = "given"
    ignored: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()

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
    """A model, the decoder backend that built it, and why; ``rejected`` has all that were asked before it, and
    ``broken`` those of them that are defective."""

    model: CausalLM
    record: DecoderBackendRecord
    rejected: Rejected
    why: str
    broken: frozenset[str] = frozenset()

    @property
    def reason(self) -> str:
        """Its name and why it was chosen, in one line."""
        return with_reasons(self.record.name, self.why, self.rejected)


@dataclass(frozen=True, slots=True)
class DecoderChoice:
    """Decoder backends that may build a model, in order, all over the same attention backend.

    ``rejected``: those that cannot, known before a weight is read; ``broken``: which of these are defective.
    """

    candidates: tuple[DecoderCandidate, ...]
    attention: BackendChoice
    rejected: Rejected
    why: str = "given"
    broken: frozenset[str] = frozenset()

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
        rejected, broken = list(self.rejected), set(self.broken)
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
                        f"({describe(error)}): leave its plugin out or repair it"
                    ) from error
                reasons: tuple[str, ...] = (describe(error),)
            else:
                if isinstance(found, Reasons):
                    rejected.append((candidate.record.name, tuple(found.texts) or ("it gave no reason",)))
                    continue
                if callable(getattr(found, "forward", None)):
                    return BuiltDecoder(found, candidate.record, tuple(rejected), self.why, frozenset(broken))
                reasons = (f"build() returned {found!r:.80}, no model",)
            broken.add(candidate.record.name)
            rejected.append((candidate.record.name, reasons))
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
    trial: Trial | None = None,
) -> BackendChoice:
    """The backend named, or an error; else what ``opinion`` says of those that can serve ``need``; else the first
    in the order of ``records``. One that ``trial`` cannot make is passed over.

    Raises:
        ConfigError: the named backend is unknown or lacks something, or no backend is left.
        PluginError: the named backend is defective.
    """
    if explicit is not None:
        known = ", ".join(record.name for record in records)
        records = [record for record in records if record.name == explicit]
        if not records:
            raise ConfigError(f"attention_backend={explicit!r} is not registered; known: {known}")
    rejected: list[tuple[str, tuple[str, ...]]] = []
    broken: set[str] = set()
    fit: list[BackendChoice] = []
    for record in records:
        try:
            found, reasons = _attention_candidate(record, need, trial)
        except PluginError as error:
            reason = str(error).removeprefix(f"{record.name}: ")
            if explicit is not None:
                raise PluginError(
                    f"attention_backend={explicit!r} cannot be used: {reason}; leave it out to take another"
                ) from error
            found, reasons = None, [reason]
            # What says in kvpage's own terms why it cannot be made here is no defect: a library that was not built.
            if not unavailable(record) and not isinstance(error.__cause__, KvpageError):
                broken.add(record.name)
        if found is None or reasons:
            rejected.append((record.name, tuple(reasons)))
            continue
        why = "by priority" if explicit is None else "given"
        fit.append(replace(found, rejected=tuple(rejected), why=why, broken=frozenset(broken)))
        if explicit is not None or opinion is None:
            return fit[0]
    if not fit:
        who = (
            "no attention backend can serve this engine"
            if explicit is None
            else f"attention_backend={explicit!r} cannot serve this engine"
        )
        lines = "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in rejected)
        raise ConfigError(f"{who}:{lines}")
    assert opinion is not None
    answer, plugin, ignored = opinion(need, tuple(choice.record.name for choice in fit))
    choice = _preferred(fit, answer, plugin)
    return replace(
        choice,
        rejected=tuple(rejected) + choice.rejected,
        ignored=tuple(ignored),
        broken=frozenset(broken),
    )


def _attention_candidate(
    record: AttentionBackendRecord, need: AttentionNeed, trial: Trial | None
) -> tuple[BackendChoice | None, list[str]]:
    """(the choice of ``record``, why not).

    Raises:
        PluginError: it cannot be imported, states no proper caps, or cannot be made.
    """
    backend = load_class(record, AttentionBackend)
    caps = getattr(backend, "caps", None)
    if not isinstance(caps, AttentionCaps):
        raise PluginError(f"{record.name}: its caps are {caps!r:.80}, no kvpage.api.attention.AttentionCaps")
    try:
        reasons = caps.missing(need)
        size = need.block_size or caps.preferred_block_size
    except Exception as error:  # what foreign code put into its caps
        raise PluginError(f"{record.name}: its caps cannot be read ({describe(error)})") from error
    if reasons:
        return None, reasons
    if trial is not None:
        trial(record, backend, size)
    return BackendChoice(record, backend, size, ()), []


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
    broken: set[str] = set()
    candidates: list[DecoderCandidate] = []
    chosen: BackendChoice | None = None
    for record in records:
        backend, reasons = _willing(record, spec, env)
        if backend is None and not unavailable(record):
            broken.add(record.name)
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
                    if attention is None:
                        chosen = replace(chosen, why=f"with decoder backend {record.name}")
                except (ConfigError, PluginError) as error:
                    reasons = [
                        f"its attention backend {paired} does not serve: {' '.join(str(error).split())}"
                    ]
        if backend is None or reasons:
            rejected.append((record.name, tuple(reasons)))
        else:
            candidates.append(DecoderCandidate(record, backend))
    if chosen is None or not candidates:
        lines = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in rejected)
        raise (PluginError if explicit in broken else ConfigError)(
            f"no decoder backend can run this model: {lines}"
            if explicit is None
            else f"decoder_backend={explicit!r} cannot run this model: {lines}; leave it out to take another"
        )
    why = "by priority" if explicit is None else "given"
    return DecoderChoice(tuple(candidates), chosen, tuple(rejected), why, frozenset(broken))


def _willing(
    record: DecoderBackendRecord, spec: DecoderSpec, env: DecoderEnv
) -> tuple[type[DecoderBackend] | None, list[str]]:
    """(the class, why it refuses ``spec``); no class where it is defective."""
    try:
        backend = load_class(record, DecoderBackend)
        if inspect.isabstract(backend):
            return None, [f"{record.factory} is abstract: it lacks {_names(backend.__abstractmethods__)}"]
        return backend, [str(reason) for reason in backend.refuses(spec, env)]
    except PluginError as error:
        return None, [str(error)]
    except Exception as error:  # foreign code
        return None, [f"refuses() raised {describe(error)}"]


def _names(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


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


def choose_kernels(
    records: Sequence[LinearKernelRecord],
) -> tuple[dict[str, type[LinearKernel]], Rejected]:
    """(the classes of all linear kernels by name, in the order of ``records``; those that cannot be had and why)."""
    kernels: dict[str, type[LinearKernel]] = {}
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for record in records:
        try:
            kernel = load_class(record, LinearKernel)
            if inspect.isabstract(kernel):
                raise PluginError(
                    f"{record.factory} is abstract: it lacks {_names(kernel.__abstractmethods__)}"
                )
        except PluginError as error:
            rejected.append((record.name, (str(error),)))
        else:
            kernels[record.name] = kernel
    return kernels, tuple(rejected)
