"""What a quantization scheme holds of a checkpoint: its tensors, checked before any is read, and their forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from kvpage.api.model import WeightRef
from kvpage.api.parameters import Parameter
from kvpage.api.quant import CheckpointView, Dense, LinearSpec, QuantScheme, TensorSpec, WeightForm
from kvpage.errors import CheckpointError, KvpageError, PluginError
from kvpage.loading.places import ranges


@dataclass(slots=True)
class _Matrix:
    """One stored matrix: what the scheme says of it, the parameters still to be taken, its form while there are."""

    linear: LinearSpec
    tensors: Mapping[str, TensorSpec]
    waiting: set[str]
    form: WeightForm | None = None


class QuantizedWeights:
    """The linear weights that ``scheme`` holds; none where it is ``None``.

    Args:
        parameters, refs: all of the model, and where they lie.
        read_plain: a plain weight [out, in] in the checkpoint's dtype, for schemes that quantize those.
        plain_pieces: the same, a few outputs after another; each is valid until the next is taken.
        hold: the form that is held in place of one that was read; ``None``: its values in ``dtype`` are.

    Attributes:
        packed: parameters that lie in tensors of the scheme's own, not in plain ones.
        tensor_names: those tensors.
        dequantized: names of the matrices that no kernel computes packed.

    Raises:
        CheckpointError: one of its tensors is missing or has another shape or dtype.
        PluginError: the scheme itself fails.
    """

    def __init__(
        self,
        scheme: QuantScheme | None,
        view: CheckpointView,
        parameters: Sequence[Parameter],
        refs: Mapping[str, WeightRef],
        read_plain: Callable[[Parameter], torch.Tensor],
        plain_pieces: Callable[[Parameter], Iterator[torch.Tensor]],
        hold: Callable[[WeightForm], WeightForm | None],
        dtype: torch.dtype,
    ) -> None:
        self._scheme, self._view, self._refs = scheme, view, refs
        self._hold, self._dtype = hold, dtype
        self._read_plain, self._plain_pieces = read_plain, plain_pieces
        self._matrices: dict[str, _Matrix] = {}
        self.packed: set[str] = set()
        self.tensor_names: set[str] = set()
        self.dequantized: dict[str, None] = {}
        if scheme is None:
            return
        for linear in linears_of(scheme, parameters, refs):
            with _blamed(scheme, linear):
                tensors = _stated(scheme.tensors(linear, view))
            if not tensors:
                continue
            if not scheme.quantizes_plain:
                _check(view, linear, tensors)
                self.tensor_names.update(f"{linear.name}.{suffix}" for suffix in tensors)
                self.packed.update(linear.parameters)
            matrix = _Matrix(linear, tensors, set(linear.parameters))
            self._matrices.update(dict.fromkeys(linear.parameters, matrix))

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def load(
        self, block: Sequence[Parameter], allocate: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
    ) -> dict[str, WeightForm]:
        """The forms of those parameters of ``block`` that the scheme holds, in memory of ``allocate``.

        Tensors with one entry an output lie one after another, so that parts whose forms agree can be joined.
        """
        held = [part for part in block if part.name in self]
        rooms = _Rooms(sum(part.shape[0] for part in held), allocate)
        forms: dict[str, WeightForm] = {}
        start = 0
        for part in held:
            at = start
            matrix = self._matrices[part.name]
            for form in self._forms(part):
                with _blamed(self._scheme, matrix.linear):
                    housed = rooms.put(form, at, same=at > start)
                at += form.shape[0]
            if matrix.form is None:
                self._let_go(matrix)
            with _blamed(self._scheme, matrix.linear):
                forms[part.name] = rooms.get(housed, start, at) if self._by_rows else housed
            start += part.shape[0]
        return forms

    @property
    def _by_rows(self) -> bool:
        return self._scheme is not None and self._scheme.quantizes_plain and self._scheme.row_by_row

    def _forms(self, parameter: Parameter) -> Iterator[WeightForm]:
        """The form of one parameter, or those of its outputs a few at a time."""
        if not self._by_rows:
            yield self._form(parameter)
            return
        matrix = self._matrices[parameter.name]
        for piece in self._plain_pieces(parameter):
            linear = replace(matrix.linear, out_features=piece.shape[0])
            yield self._made(linear, {"weight": piece})

    def _let_go(self, matrix: _Matrix) -> None:
        """Its tensors were used: a view of files gives their pages back."""
        release: Callable[[str], None] | None = getattr(self._view, "release", None)
        if release is not None and self._scheme is not None and not self._scheme.quantizes_plain:
            for suffix in matrix.tensors:
                release(f"{matrix.linear.name}.{suffix}")

    def _form(self, parameter: Parameter) -> WeightForm:
        """The form of one parameter; the matrix it lies in is read once, and forgotten with its last parameter."""
        assert self._scheme is not None, "without a scheme no parameter is asked for"
        matrix = self._matrices[parameter.name]
        linear = matrix.linear
        if matrix.form is None:
            matrix.form = self._made(linear, self._tensors(parameter, matrix))
        form, ref = matrix.form, self._refs[parameter.name]
        matrix.waiting.discard(parameter.name)
        if not matrix.waiting:
            matrix.form = None
        if self._scheme.quantizes_plain or ref.rows is None:
            return form
        parts = [torch.arange(*outputs, device="cpu") for outputs in ranges(ref, linear.out_features)]
        with _blamed(self._scheme, linear):
            return _a_form(form.take(torch.cat(parts)), "take()")

    def _made(self, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
        """What the scheme makes of ``tensors``, as it is held: packed, or its values in the model's dtype."""
        assert self._scheme is not None
        form = _made(self._scheme, linear, tensors)
        if isinstance(form, Dense):
            return Dense(form.tensor.to(self._dtype))
        held = self._hold(form)
        if held is not None:
            return held
        self.dequantized[linear.name] = None
        with _blamed(self._scheme, linear):
            return Dense(form.dequantize().to(self._dtype))

    def _tensors(self, parameter: Parameter, matrix: _Matrix) -> dict[str, torch.Tensor]:
        assert self._scheme is not None
        if self._scheme.quantizes_plain:
            return {"weight": self._read_plain(parameter)}
        return {suffix: self._view.read(f"{matrix.linear.name}.{suffix}") for suffix in matrix.tensors}


class _Rooms:
    """Memory of a block's forms: for each of their tensors, in the order of ``map``, that of all outputs."""

    __slots__ = ("_allocate", "_rooms", "_total")

    def __init__(self, total: int, allocate: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> None:
        self._total, self._allocate = total, allocate
        self._rooms: dict[int, torch.Tensor] = {}

    def put(self, form: WeightForm, start: int, *, same: bool) -> WeightForm:
        """``form`` of the outputs from ``start`` on, its tensors copied to their place.

        ``same``: it continues the form that was put before; every tensor has one entry an output.
        """
        rows, index = form.shape[0], -1

        def house(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal index
            index += 1
            if tensor.shape[:1] != (rows,):
                return self._allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor)
            room = self._rooms.get(index)
            if room is None or room.dtype != tensor.dtype or room.shape[1:] != tensor.shape[1:]:
                if same:
                    raise TypeError("row_by_row, and its forms of some outputs differ from those of others")
                room = self._allocate((self._total, *tensor.shape[1:]), tensor.dtype)
                self._rooms[index] = room
            return room[start : start + rows].copy_(tensor)

        return _a_form(form.map(house), "map()")

    def get(self, form: WeightForm, start: int, stop: int) -> WeightForm:
        """The form of the outputs [start, stop), which were put; ``form`` is one of its parts."""
        rows, index = form.shape[0], -1

        def whole(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal index
            index += 1
            if tensor.shape[:1] != (rows,):
                raise TypeError(
                    f"row_by_row, and a tensor of its form of {rows} outputs has shape {list(tensor.shape)}"
                )
            return self._rooms[index][start:stop]

        return _a_form(form.map(whole), "map()")


def linears_of(
    scheme: QuantScheme, parameters: Sequence[Parameter], refs: Mapping[str, WeightRef]
) -> list[LinearSpec]:
    """The matrices that ``scheme`` is asked about: as they are stored, or plain ones one a parameter.

    Matrices that are entries of a larger tensor (all experts in one) have no tensors of their own that a format
    could have packed: such a parameter is left out unless plain ones are meant.
    """
    by_parameter = scheme.quantizes_plain
    stored: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        ref = refs[parameter.name]
        whole = by_parameter or ref.index is None
        asked = parameter.kind == "linear" or (scheme.quantizes_tables and parameter.name == "embed.weight")
        if asked and whole:
            stored.setdefault(parameter.name if by_parameter else ref.name, []).append(parameter)
    return [
        LinearSpec(
            name=refs[members[0].name].name.removesuffix(".weight"),
            parameters=tuple(part.name for part in members),
            in_features=members[0].shape[1],
            out_features=sum(part.shape[0] for part in members),
        )
        for members in stored.values()
    ]


def packed_names(view: CheckpointView) -> set[str]:
    """The view's names, and for each module that holds tensors the name that its plain weight would have."""
    return {*view.names(), *(f"{name.rpartition('.')[0]}.weight" for name in view.names())}


def sketch(scheme: QuantScheme, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
    """The form that ``scheme`` will make of ``linear``, of meta tensors; ``None`` where it cannot say, or stores it plain.

    Raises:
        CheckpointError: the files' headers do not hold what the scheme expects.
        PluginError: the scheme itself fails.
    """
    with _blamed(scheme, linear):
        tensors = _stated(scheme.tensors(linear, view))
    if not tensors:
        return None
    _check(view, linear, tensors)
    with _blamed(scheme, linear):
        form = scheme.sketch(linear, view)
    if form is not None:
        return form
    empty = {
        suffix: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        for suffix, spec in tensors.items()
    }
    try:
        return _made(scheme, linear, empty)
    except PluginError:  # a number was asked for, which a meta tensor does not have
        return None


def read_form(scheme: QuantScheme, linear: LinearSpec, view: CheckpointView) -> WeightForm | None:
    """The form of ``linear`` as ``scheme`` reads it, checked as for an engine; ``None``: it is stored plain.

    Raises:
        CheckpointError: one of its tensors is missing or not what it should be.
        PluginError: the scheme itself fails.
    """
    with _blamed(scheme, linear):
        stated = _stated(scheme.tensors(linear, view))
    if not stated:
        return None
    _check(view, linear, stated)
    return _made(scheme, linear, {suffix: view.read(f"{linear.name}.{suffix}") for suffix in stated})


def _check(view: CheckpointView, linear: LinearSpec, tensors: Mapping[str, TensorSpec]) -> None:
    """Every tensor is there as the scheme expects it, and the weight is not there a second time, plain."""
    names = view.names()
    for suffix, spec in tensors.items():
        name = f"{linear.name}.{suffix}"
        where = view.where(name)
        if name not in names:
            raise CheckpointError(
                f"{where}: tensor {name!r} of shape {list(spec.shape)}, {spec.dtype}, is missing; the checkpoint is "
                "incomplete, or its quantization_config belongs to another"
            )
        info = view.info(name)
        if (info.shape, info.dtype) != (tuple(spec.shape), spec.dtype):
            raise CheckpointError(
                f"{where}: tensor {name!r} should have shape {list(spec.shape)}, {spec.dtype}, by config.json, "
                f"found {list(info.shape)}, {info.dtype}; quantization_config and weights are not of one checkpoint"
            )
    plain = f"{linear.name}.weight"
    if "weight" not in tensors and plain in names:
        raise CheckpointError(
            f"{view.where(plain)}: {linear.name!r} is stored both quantized ({', '.join(tensors)}) and plain "
            "(weight); the checkpoint must hold one of them"
        )


def _made(scheme: QuantScheme, linear: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> WeightForm:
    """What the scheme makes of ``tensors``, of the shape that ``linear`` says."""
    with _blamed(scheme, linear):
        form = _a_form(scheme.to_form(linear, tensors), "to_form()")
        shape = tuple(form.shape)
    expected = (linear.out_features, linear.in_features)
    if shape != expected:
        raise PluginError(
            f"quantization scheme {type(scheme).__name__} made a form of shape {list(shape)} "
            f"of {linear.name!r}, expected {list(expected)}"
        )
    return form


def _stated(answer: object) -> dict[str, TensorSpec]:
    """What ``tensors()`` answered, if it is what it must be."""
    if not isinstance(answer, Mapping):
        raise TypeError(f"tensors() returned {answer!r:.80}, expected a mapping of names to TensorSpec")
    for suffix, spec in answer.items():
        if not isinstance(suffix, str) or not isinstance(spec, TensorSpec):
            raise TypeError(
                f"tensors() has the entry {suffix!r:.40}: {spec!r:.40}, expected a name and a TensorSpec"
            )
        if not isinstance(getattr(torch, str(spec.dtype), None), torch.dtype):
            raise ValueError(
                f"tensors() states the dtype {spec.dtype!r:.40} of {suffix!r}, which torch does not have"
            )
    return dict(answer)


def _a_form(found: object, method: str) -> WeightForm:
    if not isinstance(found, WeightForm):
        raise TypeError(f"{method} returned {found!r:.80}, which is no kvpage.api.quant.WeightForm")
    return found


@contextmanager
def _blamed(scheme: QuantScheme | None, linear: LinearSpec) -> Iterator[None]:
    """Faults of a scheme's own code name the scheme and what it was given."""
    try:
        yield
    except (KvpageError, MemoryError, OSError):
        raise
    except Exception as error:  # a plugin's code may raise anything
        raise PluginError(
            f"quantization scheme {type(scheme).__name__} failed on {linear.name!r} "
            f"({type(error).__name__}: {error}): repair its plugin, or use the unquantized checkpoint"
        ) from error
