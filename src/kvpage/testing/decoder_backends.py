"""The conformance suite of decoder backends.

Subclass it in your tests, name your classes, run pytest::

    from kvpage.testing.decoder_backends import DecoderBackendConformance
    from mychip import MyChipAttention, MyChipDecoder

    class TestMyChipDecoder(DecoderBackendConformance):
        decoder = MyChipDecoder
        attention_backend = MyChipAttention

The truth is a decoder in float64 without a cache. A model that the backend refuses is skipped, with its reasons.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch

from kvpage.api.attention import AttentionBackend, AttentionNeed
from kvpage.api.decoder import DecoderBackend, Reasons
from kvpage.api.model import CausalLM, DecoderEnv, DecoderSpec
from kvpage.api.quant import Dense, LinearEnv, LinearKernel, WeightForm
from kvpage.testing.comparing import require, require_close, require_equal
from kvpage.testing.decoder_models import Packing, sample_specs, sample_weights
from kvpage.testing.decoder_oracle import exact_hidden, exact_logits, exact_weights
from kvpage.testing.decoder_rig import DecoderRig, Row
from kvpage.testing.suite import ConformanceSuite, not_claimed

HIDDEN = ("token", "element")


class DecoderBackendConformance(ConformanceSuite):
    """Subclass it, set ``decoder`` and ``attention_backend``.

    Attributes:
        decoder: the class under test; it is made without arguments.
        attention_backend: the class of the attention backend that it works with (any, if its ``attention`` is
            ``None``).
        device: torch device string. dtypes: narrowed where a machine is slow.
        must_build: names of models (see ``specs``) that it may not refuse.
        tolerances: dtype -> difference of hidden states allowed; they are of order 1.
        batch_invariant: a row has the same bits whatever its batch mates are. ``False`` if the backend does not
            promise that; its documentation should then say so, since sampled text may depend on load.
    """

    decoder: ClassVar[type[DecoderBackend]]
    attention_backend: ClassVar[type[AttentionBackend]]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[Sequence[str]] = ("float32", "bfloat16")
    must_build: ClassVar[Collection[str]] = ()
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-4, "bfloat16": 1.5e-1, "float16": 3e-2}
    batch_invariant: ClassVar[bool] = True

    def specs(self) -> Mapping[str, DecoderSpec]:
        """Name -> model, small; together they use what a DecoderSpec can say."""
        dims = self.attention_backend.caps.head_dims
        return sample_specs(8 if dims is None or 8 in dims else min(dims))

    def axes(self) -> dict[str, Sequence[Any]]:
        return {"model": list(self.specs()), "dtype": list(self.dtypes), "packing": ["int8", "int4"]}

    def test_something_is_built(self) -> None:
        """At least one model is taken, and all of ``must_build``; what is refused is refused with reasons."""
        taken, refused = set(), {}
        for name, spec in self.specs().items():
            for dtype in self.dtypes:
                answer = self._build(spec, dtype)
                if isinstance(answer, Reasons):
                    good = bool(answer.texts) and all(isinstance(t, str) and t.strip() for t in answer.texts)
                    require(
                        good,
                        "reasons",
                        f"{name} in {dtype} was refused with {answer.texts!r}, expected sentences",
                    )
                    refused[name] = "; ".join(answer.texts)
                else:
                    taken.add(name)
        require(bool(taken), "builds a model", f"every model is refused: {refused}")
        for name in self.must_build:
            require(
                name in taken,
                "must_build",
                f"{name} is refused: {refused.get(name, 'there is no such model')}",
            )

    def test_whole_prompt(self, model: str, dtype: str) -> None:
        """Hidden states and logits of a prompt in one step, against float64."""
        rig, decoder, weights = self._rig(model, dtype, [21])
        (hidden,) = rig.step(decoder, [Row(0, 0, 21)])
        self._check("prompt", rig, weights, 0, 0, hidden)
        with torch.inference_mode():
            logits = decoder.logits(hidden)
        expected = exact_logits(rig.spec, exact_weights(weights), hidden.cpu().double())
        allowed = self.tolerances.get(dtype, 0.25) * (1 + expected.abs())
        require_close("logits", logits, expected, allowed, ("row", "token id"), f"{model}, {dtype}")

    def test_token_by_token(self, model: str, dtype: str) -> None:
        """A prompt, then one token a step, over block edges: against float64."""
        rig, decoder, weights = self._rig(model, dtype, [27])
        parts = [rig.step(decoder, [Row(0, 0, 6)])[0]]
        parts += [rig.step(decoder, [Row(0, at, at + 1)])[0] for at in range(6, 27)]
        self._check("decode", rig, weights, 0, 0, torch.cat(parts))

    def test_chunked_prompt(self, model: str) -> None:
        """A prompt in chunks, on and off block edges, each attending to those before: against float64."""
        for edges in ((0, 8, 16, 30), (0, 7, 8, 9, 30), (0, 1, 2, 19, 30)):
            rig, decoder, weights = self._rig(model, self.dtypes[0], [30])
            parts = [rig.step(decoder, [Row(0, a, b)])[0] for a, b in pairwise(edges)]
            self._check(f"chunks {edges}", rig, weights, 0, 0, torch.cat(parts))

    def test_mixed_batch(self, model: str, dtype: str) -> None:
        """Decode rows, a verify row and prompt chunks in one step: against float64."""
        lengths = [9, 17, 1, 12, 30, 8]
        rig, decoder, weights = self._rig(model, dtype, lengths)
        rig.step(decoder, [Row(0, 0, 8), Row(1, 0, 16), Row(3, 0, 9), Row(4, 0, 13)])
        rows = [Row(0, 8, 9), Row(1, 16, 17), Row(2, 0, 1), Row(3, 9, 12), Row(4, 13, 30), Row(5, 0, 8)]
        for row, hidden in zip(rows, rig.step(decoder, rows), strict=True):
            assert row.sequence is not None
            self._check("mixed batch", rig, weights, row.sequence, row.first, hidden)

    def test_row_has_the_same_bits_in_any_batch(self, model: str, dtype: str) -> None:
        """Alone, and beside others in any place. Not asked where ``batch_invariant = False``."""
        if not self.batch_invariant:
            not_claimed(f"{self.decoder.__name__} sets batch_invariant = False")
        lengths = [13, 5, 20, 11]
        alone = []
        for sequence, length in enumerate(lengths):
            rig, decoder, _ = self._rig(model, dtype, lengths)
            parts = [rig.step(decoder, [Row(sequence, 0, length - 1)])[0]]
            alone.append([*parts, rig.step(decoder, [Row(sequence, length - 1, length)])[0]])
        rig, decoder, _ = self._rig(model, dtype, lengths)
        prompts = rig.step(decoder, [Row(s, 0, length - 1) for s, length in enumerate(lengths)])
        order = [2, 0, 3, 1]
        last = rig.step(decoder, [Row(s, lengths[s] - 1, lengths[s]) for s in order])
        for sequence in range(len(lengths)):
            note = f"{model}, {dtype}: sequence {sequence} alone and beside 3 others"
            require_equal("batch invariance of a prompt", prompts[sequence], alone[sequence][0], HIDDEN, note)
            got = last[order.index(sequence)]
            require_equal("batch invariance of a decode row", got, alone[sequence][1], HIDDEN, note)

    def test_blocks_shared_within_a_step(self, model: str) -> None:
        """A row attends to blocks that another row fills in the same step: all K and V of a layer are written
        before any row attends, whatever the order of the rows."""
        size = self._block_size()
        blocks = max(1, 16 // size)
        shared = blocks * size
        rig, decoder, weights = self._rig(model, self.dtypes[0], [shared + 4, shared + 10])
        rig.share(0, 1, blocks)
        second, first = rig.step(decoder, [Row(1, shared, shared + 10), Row(0, 0, shared + 4)])
        self._check("owner of shared blocks", rig, weights, 0, 0, first)
        self._check("borrower of shared blocks", rig, weights, 1, shared, second)

    def test_states_that_are_wanted(self, model: str, dtype: str) -> None:
        """The last state of some rows only (``StepContext.wanted``): the same bits as when all are wanted."""
        lengths = [9, 17, 12, 8]
        rows = [Row(0, 8, 9), Row(1, 0, 17), Row(2, 4, 12), Row(3, 0, 8)]
        found: list[list[torch.Tensor]] = []
        for wanted in (None, [0, 1, 3]):
            rig, decoder, _ = self._rig(model, dtype, lengths)
            rig.step(decoder, [Row(0, 0, 8), Row(2, 0, 4)])
            found.append(rig.step(decoder, rows, wanted=wanted))
        for row in (0, 1, 3):
            expected, got = found[0][row][-1:], found[1][row][-1:]
            require_equal(
                "wanted states", got, expected, HIDDEN, f"{model}, {dtype}: row {row} of 4, not all wanted"
            )

    def test_padding_writes_nothing(self, model: str) -> None:
        """Padding rows and tokens have slot -1: no block that nobody owns changes, and no row notices."""
        rig, decoder, weights = self._rig(model, self.dtypes[0], [9, 6])
        before = rig.unowned_bytes()
        rows = [Row(0, 0, 9), Row(1, 0, 6), Row(None, 0, 1)]
        first, second, _ = rig.step(decoder, rows, trailing=3)
        self._check("a row before padding", rig, weights, 0, 0, first)
        self._check("a row before padding", rig, weights, 1, 0, second)
        for index, (now, then) in enumerate(zip(rig.unowned_bytes(), before, strict=True)):
            axes = [f"layer tensor {index}, unowned block", *["entry"] * (now.dim() - 1)]
            require_equal("padding writes nothing", now, then, axes, "slot -1 was written to")

    def test_weights_and_inputs_are_only_read(self, model: str) -> None:
        """Weights may be shared with a living model."""
        spec = self.specs()[model]
        rig, decoder, weights = self._rig(model, self.dtypes[0], [12])
        fresh = sample_weights(spec, getattr(torch, self.dtypes[0]), merged=True)
        rig.step(decoder, [Row(0, 0, 12)])
        for name, form in weights.items():
            axes = [f"{name}, dimension {d}" for d in range(len(form.shape))]
            require_equal("weights are only read", form.dequantize(), fresh[name].dequantize(), axes)

    def test_weights_apart_or_in_one_tensor(self, model: str) -> None:
        """q, k and v (gate and up) may lie in one tensor or in several."""
        rig, decoder, weights = self._rig(model, self.dtypes[0], [12], merged=False)
        (hidden,) = rig.step(decoder, [Row(0, 0, 12)])
        self._check("weights in tensors of their own", rig, weights, 0, 0, hidden)

    def test_packed_weights(self, model: str, dtype: str, packing: Packing) -> None:
        """Linear layers, head and embedding in 8 and in 4 bits, where they are taken: against float64 of the values
        that the codes stand for."""
        rig, decoder, weights = self._rig(model, dtype, [14], packing=packing)
        parts = [rig.step(decoder, [Row(0, 0, 13)])[0], rig.step(decoder, [Row(0, 13, 14)])[0]]
        hidden = torch.cat(parts)
        self._check(f"{packing} weights", rig, weights, 0, 0, hidden)
        with torch.inference_mode():
            logits = decoder.logits(hidden)
        expected = exact_logits(rig.spec, exact_weights(weights), hidden.cpu().double())
        allowed = self.tolerances.get(dtype, 0.25) * (1 + expected.abs())
        require_close(f"logits of {packing} weights", logits, expected, allowed, ("row", "token id"), model)

    def test_two_models_side_by_side(self) -> None:
        """Models built by one backend object, stepped in turns, over caches of their own."""
        names = [
            n for n, s in self.specs().items() if not isinstance(self._build(s, self.dtypes[0]), Reasons)
        ]
        made = [self._rig(name, self.dtypes[0], [14]) for name in (names[0], names[-1])]
        parts: list[list[torch.Tensor]] = [[], []]
        for first, last in ((0, 9), (9, 10), (10, 14)):
            for index, (rig, decoder, _) in enumerate(made):
                parts[index] += rig.step(decoder, [Row(0, first, last)])
        for (rig, _, weights), hidden in zip(made, parts, strict=True):
            self._check("two models", rig, weights, 0, 0, torch.cat(hidden))

    def _check(
        self,
        property: str,
        rig: DecoderRig,
        weights: Mapping[str, WeightForm],
        sequence: int,
        first: int,
        hidden: torch.Tensor,
    ) -> None:
        """Hidden states of a sequence from position ``first`` on, against the oracle."""
        __tracebackhide__ = True
        require(
            hidden.dtype in {torch.float32, getattr(torch, rig.dtype)},
            property,
            f"hidden states are {hidden.dtype}, neither {rig.dtype} nor float32",
        )
        last = first + hidden.shape[0]
        exact = exact_hidden(rig.spec, exact_weights(weights), rig.token_ids[sequence][:last])[first:]
        allowed = self.tolerances.get(rig.dtype, 0.25) * (1 + exact.abs())
        note = f"token 0 is position {first} of sequence {sequence}, block size {rig.block_size}, {rig.dtype}"
        require_close(property, hidden, exact, allowed, HIDDEN, note)

    def _block_size(self) -> int:
        sizes = self.attention_backend.caps.block_sizes
        return 8 if sizes is None or 8 in sizes else min(sizes)

    def _rig(
        self,
        name: str,
        dtype: str,
        lengths: Sequence[int],
        *,
        merged: bool = True,
        packing: Packing = "plain",
    ) -> tuple[DecoderRig, CausalLM, dict[str, WeightForm]]:
        """A cache, the built model and its weights; skips where decoder or attention backend refuse it."""
        spec, caps = self.specs()[name], self.attention_backend.caps
        if dtype != "float32" and "expert" in name:
            not_claimed("in a narrow dtype a token may be routed to another expert than in float64")
        size = self._block_size()
        layers = spec.attention
        wanted = {
            "window": any(m.window is not None for m in layers),
            "softcap": any(m.softcap is not None for m in layers),
            "sinks": any(m.sinks for m in layers),
        }
        need = AttentionNeed(
            device=torch.device(self.device).type,
            dtype=dtype,
            kv_dtype=dtype,
            head_dims=frozenset({layers[0].head_dim}),
            block_size=size,
            features=frozenset(feature for feature, needed in wanted.items() if needed),
        )
        reasons = caps.missing(need)
        if reasons:
            not_claimed(f"{self.attention_backend.__name__} does not claim {'; '.join(reasons)}")
        weights = self._weights(spec, dtype, merged=merged, packing=packing)
        model = self._build(spec, dtype, weights)
        if isinstance(model, Reasons):
            not_claimed(f"{self.decoder.__name__} refuses it: {'; '.join(model.texts)}")
        rig = DecoderRig(
            spec, self.attention_backend, device=self.device, dtype=dtype, block_size=size, lengths=lengths
        )
        return rig, model, weights

    def _build(
        self, spec: DecoderSpec, dtype: str, weights: Mapping[str, WeightForm] | None = None
    ) -> CausalLM | Reasons:
        env = DecoderEnv(device=self.device, dtype=dtype, linear_kernels=(PackedProduct,))
        refused = self.decoder.refuses(spec, env)
        if refused:
            return Reasons(tuple(refused))
        given = self._weights(spec, dtype, merged=True) if weights is None else weights
        return self.decoder().build(spec, given, env)

    def _weights(
        self, spec: DecoderSpec, dtype: str, *, merged: bool, packing: Packing = "plain"
    ) -> dict[str, WeightForm]:
        weights = sample_weights(spec, getattr(torch, dtype), merged=merged, packing=packing)
        if self.device == "cpu":
            return weights
        return {name: form.map(lambda tensor: tensor.to(self.device)) for name, form in weights.items()}


class PackedProduct(LinearKernel):
    """What a decoder may compute weights with that it has no kernel of its own for: their values, in float32."""

    name = "values"

    @classmethod
    def supports(cls, form: WeightForm, env: LinearEnv) -> list[str]:
        return ["plain weights"] if isinstance(form, Dense) else []

    def prepare(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        self._weight = form.dequantize()
        self._bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.float() @ self._weight.t()
        return (out if self._bias is None else out + self._bias).to(x.dtype)
