"""The conformance suite of quantization schemes.

Subclass it in your tests, name your class, give it checkpoints, run pytest::

    from kvpage.testing.checkpoints import QuantSample, linear, read_folder
    from kvpage.testing.quantization import QuantSchemeConformance
    from mychip import MyFormat

    class TestMyFormat(QuantSchemeConformance):
        scheme = MyFormat

        def samples(self):
            config, tensors = read_folder("tests/data/my-format")
            yield "4-bit", QuantSample(config=config, tensors=tensors, oracle=..., linears=(
                linear("model.layers.0.self_attn.q_proj", 128, 64), linear("model.layers.0.mlp.down_proj", 64, 160),
            ))

A scheme that quantizes plain weights needs no samples. ``load`` does what the engine's loader does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from kvpage import CheckpointError
from kvpage.api.quant import CheckpointView, LinearSpec, QuantScheme, TensorSpec, WeightForm
from kvpage.testing.checkpoints import QuantSample, linear
from kvpage.testing.comparing import require, require_close, require_equal
from kvpage.testing.suite import ConformanceError, ConformanceSuite, not_claimed

MATRIX = ("output", "input")


class QuantSchemeConformance(ConformanceSuite):
    """Subclass it, set ``scheme``, and give ``samples`` unless it quantizes plain weights.

    Attributes:
        scheme: the class under test.
        plain_error: of a scheme that quantizes plain weights: largest error, as a share of its output's largest
            weight.
        ranks: tensor-parallel sizes whose slices must reassemble to the whole, where the format's blocks divide.
    """

    scheme: ClassVar[type[QuantScheme]]
    plain_error: ClassVar[float] = 1 / 32
    ranks: ClassVar[Sequence[int]] = (2, 4)

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        """(name, checkpoint) the scheme is proven on; by default plain weights of odd shapes and dtypes."""
        if not self.scheme.quantizes_plain:
            raise NotImplementedError("give samples() checkpoints of the scheme's format")
        yield from plain_samples().items()

    def axes(self) -> dict[str, Sequence[Any]]:
        return {"sample": [name for name, _ in self.samples()], "ranks": list(self.ranks)}

    def load(self, sample: QuantSample, spec: LinearSpec, view: CheckpointView | None = None) -> WeightForm:
        """The form of one matrix, by way of every check that the loader makes.

        Raises:
            CheckpointError: a tensor is missing or not what the scheme asks for, or the scheme refuses.
        """
        view = sample.view() if view is None else view
        scheme = self.scheme.from_checkpoint(sample.config, view)
        tensors = scheme.tensors(spec, view)
        require(
            bool(tensors),
            "tensors",
            f"tensors() of {spec.name!r} is empty: the matrix would be read as a plain one",
        )
        for suffix, expected in tensors.items():
            name = f"{spec.name}.{suffix}"
            if name not in view.names():
                raise CheckpointError(f"tensor {name!r} is missing")
            info = view.info(name)
            same = info.shape == tuple(expected.shape) and (
                scheme.quantizes_plain or info.dtype == expected.dtype
            )
            if not same:
                raise CheckpointError(f"tensor {name!r} should be {expected}, found {info}")
        return scheme.to_form(spec, {suffix: view.read(f"{spec.name}.{suffix}") for suffix in tensors})

    def test_samples_are_read(self, sample: str) -> None:
        """Every matrix becomes a form of shape (out, in), whose tensors are counted."""
        for spec, form in self._forms(sample):
            require(
                isinstance(form, WeightForm), "form", f"to_form() of {spec.name!r} gave {type(form).__name__}"
            )
            shape = (spec.out_features, spec.in_features)
            require(
                form.shape == shape,
                "shape",
                f"form of {spec.name!r} has shape {form.shape}, expected {shape}",
            )
            counted = sum(tensor.numel() * tensor.element_size() for tensor in form.tensors())
            require(
                form.nbytes == counted and counted > 0,
                "nbytes",
                f"{spec.name!r}: nbytes is {form.nbytes}, its tensors take {counted}",
            )

    def test_dequantize_is_exact(self, sample: str) -> None:
        """float32 of shape (out, in), bit for bit the oracle's; of plain weights within ``plain_error``."""
        given = self._sample(sample)
        for spec, form in self._forms(sample):
            values = form.dequantize()
            require(
                values.dtype == torch.float32,
                "dequantize",
                f"{spec.name!r}: dtype {values.dtype}, expected float32",
            )
            if spec.name in given.oracle:
                require_equal("dequantize is exact", values, given.oracle[spec.name], MATRIX, spec.name)
            elif self.scheme.quantizes_plain:
                weight = given.tensors[f"{spec.name}.weight"].float()
                allowed = self.plain_error * weight.abs().amax(1, keepdim=True)
                require_close("quantization error", values, weight, allowed, MATRIX, spec.name)
            else:
                require(tuple(values.shape) == form.shape, "dequantize", f"shape {list(values.shape)}")
                require(
                    bool(values.isfinite().all()),
                    "dequantize",
                    f"{spec.name!r} has values that are not finite",
                )

    def test_dequantize_gives_a_new_tensor(self, sample: str) -> None:
        """Writing into what it returned changes neither the form nor the next answer."""
        for spec, form in self._forms(sample):
            first = form.dequantize()
            kept = first.clone()
            first.zero_()
            require_equal("dequantize is a new tensor", form.dequantize(), kept, MATRIX, spec.name)

    def test_map_reaches_every_tensor(self, sample: str) -> None:
        """After ``map`` to clones nothing of the checkpoint or of the first form is needed: all of it may be gone."""
        given = self._sample(sample)
        for spec in given.linears:
            tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
            form = self.load(given, spec, given.view(**tensors))
            kept = form.dequantize()
            moved = form.map(torch.clone)
            require(type(moved) is type(form), "map", f"{spec.name!r}: map() gave {type(moved).__name__}")
            for tensor in (*form.tensors(), *tensors.values()):
                tensor.zero_()
            require_equal("map reaches every tensor", moved.dequantize(), kept, MATRIX, spec.name)

    def test_the_checkpoint_is_only_read(self, sample: str) -> None:
        """Tensors may be views of a file that is mapped read-only."""
        given = self._sample(sample)
        tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
        for spec in given.linears:
            self.load(given, spec, given.view(**tensors)).dequantize()
        for name, tensor in tensors.items():
            axes = [f"{name}, dimension {d}" for d in range(tensor.dim())]
            require_equal("the checkpoint is only read", tensor, given.tensors[name], axes)

    def test_take(self, sample: str) -> None:
        """``take(rows)`` is those outputs, in that order, repeated if they are; taking twice is taking once."""
        for spec, form in self._forms(sample):
            whole, outputs = form.dequantize(), form.shape[0]
            order = torch.randperm(
                outputs, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu"
            )
            choices = {
                "all": torch.arange(outputs, device="cpu"),
                "every other": torch.arange(0, outputs, 2, device="cpu"),
                "shuffled": order,
                "one twice": order[:1].repeat(2),
                "none": order[:0],
            }
            for name, rows in choices.items():
                with _blamed(f"take ({name})", spec.name):
                    part = form.take(rows)
                    values = part.dequantize()
                require(type(part) is type(form), "take", f"{spec.name!r}: take() gave {type(part).__name__}")
                require_equal(f"take ({name})", values, whole[rows], MATRIX, spec.name)
            twice = form.take(order).take(order)
            require_equal("take of a take", twice.dequantize(), whole[order[order]], MATRIX, spec.name)

    def test_join(self, sample: str) -> None:
        """Parts that lie one after another, as the loader puts q, k and v, are joined to the whole, or refused."""
        for spec, form in self._forms(sample):
            outputs = form.shape[0]
            first, second = _outputs(form, 0, outputs // 3), _outputs(form, outputs // 3, outputs)
            joined = first.join([second])
            if joined is not None:
                require_equal("join", joined.dequantize(), form.dequantize(), MATRIX, spec.name)
                require(
                    first.join([form]) is None,
                    "join",
                    f"{spec.name!r}: rows that do not follow were joined",
                )

    def test_missing_tensors_are_refused(self, sample: str) -> None:
        """Without any one of its tensors a matrix is refused with CheckpointError, never read as something else."""
        given = self._sample(sample)
        for spec in given.linears:
            for suffix in self._specs(given, spec):
                name = f"{spec.name}.{suffix}"
                self._refused("missing tensor", f"without {name!r}", given, spec, given.view(**{name: None}))

    def test_damaged_tensors_are_refused(self, sample: str) -> None:
        """A tensor that is shorter in any dimension, or of another dtype, is refused with CheckpointError."""
        given = self._sample(sample)
        for spec in given.linears:
            for suffix in self._specs(given, spec):
                name = f"{spec.name}.{suffix}"
                tensor = given.tensors[name]
                damaged = {
                    f"{name!r} shorter in dimension {d}": tensor.narrow(d, 0, tensor.shape[d] - 1)
                    for d in range(tensor.dim())
                    if tensor.shape[d] > 1
                }
                if not self.scheme.quantizes_plain:
                    damaged[f"{name!r} as complex64"] = torch.zeros(
                        tensor.shape, dtype=torch.complex64, device="cpu"
                    )
                for what, other in damaged.items():
                    self._refused("damaged tensor", what, given, spec, given.view(**{name: other}))

    def test_wrong_configs_are_refused(self, sample: str) -> None:
        """Each of the sample's ``wrong_configs`` is a CheckpointError, at once or with the first matrix."""
        given = self._sample(sample)
        for config in given.wrong_configs:
            other = QuantSample(config=config, tensors=given.tensors, linears=given.linears)
            self._refused(
                "wrong config", f"quantization_config {dict(config)}", other, given.linears[0], other.view()
            )

    def test_plain_modules_are_left_alone(self, sample: str) -> None:
        """Modules that the format leaves out have no tensors of the scheme's."""
        given = self._sample(sample)
        scheme = self.scheme.from_checkpoint(given.config, given.view())
        for spec in given.plain:
            found = scheme.tensors(spec, given.view())
            require(
                not found,
                "plain modules",
                f"{spec.name!r} is stored plain, tensors() asks for {sorted(found)}",
            )

    def test_tensor_parallel_slices(self, sample: str, ranks: int) -> None:
        """The form of each rank's slices, cut by ``shard_dim``, is that slice of the whole matrix.

        Where no tensor has a ``shard_dim`` it is the form that is cut. Matrices whose blocks (pack, group) the cut
        would divide are left out.
        """
        given = self._sample(sample)
        tried = 0
        for spec in given.linears:
            form, specs = self.load(given, spec), self._specs(given, spec)
            part: WeightForm | None
            by_outputs = spec.cut == "outputs"
            length = spec.out_features if by_outputs else spec.in_features
            if length % ranks:
                continue
            size = length // ranks
            whole = form.dequantize()
            by_file = any(tensor.shard_dim is not None for tensor in specs.values())
            sizes = [_cut_size(given.tensors[f"{spec.name}.{s}"], t, length) for s, t in specs.items()]
            if by_file and any(entries % ranks for entries in sizes):
                continue
            for rank in range(ranks):
                start, stop = rank * size, (rank + 1) * size
                note = f"{spec.name}: {spec.cut} {start} to {stop} of rank {rank} of {ranks}"
                with _blamed("tensor-parallel slice", note):
                    if by_file:
                        part = self._part(given, spec, specs, rank, ranks)
                    else:
                        part = (_outputs if by_outputs else type(form).inputs)(form, start, stop)
                    if part is None:
                        break  # what the ranks then cut is the dequantized matrix
                    got = part.dequantize()
                tried += 1
                expected = whole.narrow(0 if by_outputs else 1, start, size)
                if self.scheme.quantizes_plain and not by_outputs:
                    # Each rank quantizes its own inputs, with scales of its own.
                    weight = given.tensors[f"{spec.name}.weight"].float()
                    allowed = 2 * self.plain_error * weight.abs().amax(1, keepdim=True)
                    require_close("tensor-parallel slice", got, expected, allowed, MATRIX, note)
                else:
                    require_equal("tensor-parallel slice", got, expected, MATRIX, note)
        if not tried:
            not_claimed(f"no matrix of sample {sample} divides by {ranks}")

    def _part(
        self, given: QuantSample, spec: LinearSpec, specs: Mapping[str, TensorSpec], rank: int, ranks: int
    ) -> WeightForm:
        """The form of a rank's slices of the stored tensors."""
        cut = {
            suffix: _cut(given.tensors[f"{spec.name}.{suffix}"], expected, rank, ranks)
            for suffix, expected in specs.items()
        }
        by_outputs = spec.cut == "outputs"
        share = LinearSpec(
            name=spec.name,
            parameters=spec.parameters,
            in_features=spec.in_features if by_outputs else spec.in_features // ranks,
            out_features=spec.out_features // ranks if by_outputs else spec.out_features,
        )
        scheme = self.scheme.from_checkpoint(given.config, given.view())
        return scheme.to_form(share, cut)

    def _refused(
        self, property: str, what: str, sample: QuantSample, spec: LinearSpec, view: CheckpointView
    ) -> None:
        try:
            self.load(sample, spec, view)
        except CheckpointError:
            return
        except ConformanceError:
            raise
        except Exception as error:  # whatever a scheme raises instead is the finding
            raise ConformanceError(
                property, f"{what}: {type(error).__name__} ({error}) instead of CheckpointError"
            ) from error
        raise ConformanceError(property, f"{what}: {spec.name!r} was read, expected CheckpointError")

    def _sample(self, name: str) -> QuantSample:
        return dict(self.samples())[name]

    def _forms(self, name: str) -> list[tuple[LinearSpec, WeightForm]]:
        sample = self._sample(name)
        return [(spec, self.load(sample, spec)) for spec in sample.linears]

    def _specs(self, sample: QuantSample, spec: LinearSpec) -> Mapping[str, TensorSpec]:
        return self.scheme.from_checkpoint(sample.config, sample.view()).tensors(spec, sample.view())


@functools.cache
def plain_samples() -> Mapping[str, QuantSample]:
    """Plain weights for schemes that quantize them: odd shapes, small and large rows, a row of zeros."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    samples = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        specs = (
            linear("model.layers.0.self_attn.q_proj", 24, 40),
            linear("model.layers.0.self_attn.o_proj", 40, 24),
            linear("model.layers.0.mlp.up_proj", 33, 17),
            linear("model.layers.0.mlp.down_proj", 16, 1536),
        )
        tensors = {}
        for spec in specs:
            weight = torch.randn(spec.out_features, spec.in_features, generator=generator, device="cpu")
            weight[0], weight[1] = weight[0] * 1e-3, weight[1] * 100
            weight[2] = 0.0
            tensors[f"{spec.name}.weight"] = weight.to(dtype)
        name = str(dtype).removeprefix("torch.")
        samples[name] = QuantSample(config={}, tensors=tensors, linears=specs)
    return samples


@contextmanager
def _blamed(property: str, what: str) -> Iterator[None]:
    """Whatever a form raises is the finding."""
    try:
        yield
    except Exception as error:
        raise ConformanceError(property, f"{what}: {type(error).__name__}: {error}") from error


def _outputs(form: WeightForm, first: int, last: int) -> WeightForm:
    """Those outputs of a form, as views of its tensors where it gives them so."""
    return form.outputs(first, last) or form.take(torch.arange(first, last, device="cpu"))


def _cut_size(tensor: torch.Tensor, spec: TensorSpec, length: int) -> int:
    """Entries along the cut dimension, each for as many logical elements as the spec says; 0: it is not cut."""
    if spec.shard_dim is None:
        return 0
    entries = tensor.shape[spec.shard_dim]
    sizes = {-(-length // size) for size in (1, spec.pack, spec.group, spec.pack * spec.group)}
    require(
        entries in sizes,
        "TensorSpec",
        f"dimension {spec.shard_dim} has {entries} entries for {length} elements; pack {spec.pack} and group "
        f"{spec.group} allow {sorted(sizes)}",
    )
    return entries


def _cut(tensor: torch.Tensor, spec: TensorSpec, rank: int, ranks: int) -> torch.Tensor:
    if spec.shard_dim is None:
        return tensor
    size = tensor.shape[spec.shard_dim] // ranks
    return tensor.narrow(spec.shard_dim, rank * size, size)
