"""What a quantization scheme holds of a checkpoint: its tensors, checked before any is read, and their forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from kvpage.api.model import WeightRef
from kvpage.api.parameters import Parameter
from kvpage.api.quant import CheckpointView, LinearSpec, QuantScheme, TensorSpec, WeightForm
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

    Attributes:
        packed: parameters that lie in tensors of the scheme's own, not in plain ones.
        tensor_names: those tensors.

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
    ) -> None:
        self._scheme, self._view, self._refs, self._read_plain = scheme, view, refs, read_plain
        self._matrices: dict[str, _Matrix] = {}
        self.packed: set[str] = set()
        self.tensor_names: set[str] = set()
        if scheme is None:
            return
        for linear in _linears(parameters, refs, by_parameter=scheme.quantizes_plain):
            with _blamed(scheme, linear):
                tensors = _stated(scheme.tensors(linear, view))
            if not tensors:
                continue
            if not scheme.quantizes_plain:
                self._check(linear, tensors)
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
        total = sum(part.shape[0] for part in held)
        rooms: dict[int, torch.Tensor] = {}
        forms: dict[str, WeightForm] = {}
        start = 0
        for part in held:
            rows = part.shape[0]
            indices = count()

            def house(
                tensor: torch.Tensor, start: int = start, rows: int = rows, indices: Iterator[int] = indices
            ) -> torch.Tensor:
                index = next(indices)
                if tensor.shape[:1] != (rows,):
                    return allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor)
                room = rooms.get(index)
                if room is None or room.dtype != tensor.dtype or room.shape[1:] != tensor.shape[1:]:
                    room = rooms[index] = allocate((total, *tensor.shape[1:]), tensor.dtype)
                return room[start : start + rows].copy_(tensor)

            form = self._form(part)
            with _blamed(self._scheme, self._matrices[part.name].linear):
                forms[part.name] = _a_form(form.map(house), "map()")
            start += rows
        return forms

    def _check(self, linear: LinearSpec, tensors: Mapping[str, TensorSpec]) -> None:
        """Every tensor is there as the scheme expects it, and the weight is not there a second time, plain."""
        names = self._view.names()
        for suffix, spec in tensors.items():
            name = f"{linear.name}.{suffix}"
            where = self._view.where(name)
            if name not in names:
                raise CheckpointError(
                    f"{where}: tensor {name!r} of shape {list(spec.shape)}, {spec.dtype}, is missing; the checkpoint is "
                    "incomplete, or its quantization_config belongs to another"
                )
            info = self._view.info(name)
            if (info.shape, info.dtype) != (tuple(spec.shape), spec.dtype):
                raise CheckpointError(
                    f"{where}: tensor {name!r} should have shape {list(spec.shape)}, {spec.dtype}, by config.json, "
                    f"found {list(info.shape)}, {info.dtype}; quantization_config and weights are not of one checkpoint"
                )
            self.tensor_names.add(name)
        plain = f"{linear.name}.weight"
        if "weight" not in tensors and plain in names:
            raise CheckpointError(
                f"{self._view.where(plain)}: {linear.name!r} is stored both quantized ({', '.join(tensors)}) and plain "
                "(weight); the checkpoint must hold one of them"
            )

    def _form(self, parameter: Parameter) -> WeightForm:
        """The form of one parameter; the matrix it lies in is read once, and forgotten with its last parameter."""
        assert self._scheme is not None, "without a scheme no parameter is asked for"
        matrix = self._matrices[parameter.name]
        linear = matrix.linear
        if matrix.form is None:
            with _blamed(self._scheme, linear):
                matrix.form = _a_form(
                    self._scheme.to_form(linear, self._tensors(parameter, matrix)), "to_form()"
                )
                shape = tuple(matrix.form.shape)
            expected = (linear.out_features, linear.in_features)
            if shape != expected:
                raise PluginError(
                    f"quantization scheme {type(self._scheme).__name__} made a form of shape {list(shape)} "
                    f"of {linear.name!r}, expected {list(expected)}"
                )
        form, ref = matrix.form, self._refs[parameter.name]
        matrix.waiting.discard(parameter.name)
        if not matrix.waiting:
            matrix.form = None
        if self._scheme.quantizes_plain or ref.rows is None:
            return form
        parts = [torch.arange(*outputs, device="cpu") for outputs in ranges(ref, linear.out_features)]
        with _blamed(self._scheme, linear):
            return _a_form(form.take(torch.cat(parts)), "take()")

    def _tensors(self, parameter: Parameter, matrix: _Matrix) -> dict[str, torch.Tensor]:
        assert self._scheme is not None
        if self._scheme.quantizes_plain:
            return {"weight": self._read_plain(parameter)}
        return {suffix: self._view.read(f"{matrix.linear.name}.{suffix}") for suffix in matrix.tensors}


def _linears(
    parameters: Sequence[Parameter], refs: Mapping[str, WeightRef], *, by_parameter: bool
) -> list[LinearSpec]:
    """The linear matrices of a model as they are stored, or with ``by_parameter`` one a parameter.

    Matrices that are entries of a larger tensor (all experts in one) have no tensors of their own that a format
    could have packed: such a parameter is left out unless ``by_parameter``.
    """
    stored: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        ref = refs[parameter.name]
        if parameter.kind == "linear" and (by_parameter or ref.index is None):
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
