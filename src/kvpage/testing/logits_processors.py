"""The conformance suite of logits processors.

Subclass it in your tests, name your class, run pytest::

    from kvpage.testing.logits_processors import LogitsProcessorConformance
    from mychip import Echo

    class TestEcho(LogitsProcessorConformance):
        processor = Echo
        params = {"extra_args": {"echo": 3}}
        bad_params = [{"extra_args": {"echo": "three"}}]

Its state is proven on made-up logits, slot by slot; then real requests run through it in engines of the bundled
model. The class must be importable by its module and name, as a plugin's is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kvpage import Engine, PluginRegistry, RequestError, SamplingParams, hookimpl
from kvpage.api.records import LogitsProcessorRecord
from kvpage.api.sampling import LogitsProcessor
from kvpage.testing.comparing import require, require_equal
from kvpage.testing.suite import ConformanceError, ConformanceSuite, not_claimed

NAME = "subject"
ROW = ("row", "token")
PROMPTS = ("Blocks are handed out", "The cache", "A sequence of tokens, and then some more of them")


@dataclass
class MadeUpSequence:
    """One made-up sequence: its slot, prompt, and the tokens it gained; logits depend on all of these but the slot."""

    slot: int
    seed: int
    params: SamplingParams
    prompt_ids: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)


class LogitsProcessorConformance(ConformanceSuite):
    """Subclass it, set ``processor``.

    Attributes:
        processor: the class under test; it is made without arguments.
        params: fields of SamplingParams of the requests that name it (``extra_args``, most often).
        other_params: those of a second kind of request, to stand beside the first.
        bad_params: each must be refused by ``admit`` with RequestError. An entry is laid over ``params``, key by key,
            so that it says only what is wrong about it; one that changes nothing asks for a good request, and is
            itself refused.
        vocab_size: tokens of the made-up logits.
        engine_options: of the engines that real requests run in ("model", if not the bundled one).
    """

    processor: ClassVar[type[LogitsProcessor]]
    params: ClassVar[Mapping[str, Any]] = {}
    other_params: ClassVar[Mapping[str, Any] | None] = None
    bad_params: ClassVar[Sequence[Mapping[str, Any]]] = ()
    vocab_size: ClassVar[int] = 512
    engine_options: ClassVar[Mapping[str, Any]] = {}

    def test_shape_dtype_and_device_are_kept(self) -> None:
        """float32 [N, V] in, float32 [N, V] out, for any N, in place or anew; no NaN, also of forbidden tokens."""
        made, rows = self.processor(), [self._sequence(slot) for slot in range(5)]
        for row in rows:
            self._admit(made, row)
        for count in (1, 2, 5):
            logits = self._logits(rows[:count])
            logits[:, 7] = -torch.inf
            out = made.apply(logits.clone(), [row.slot for row in rows[:count]])
            require(
                isinstance(out, torch.Tensor),
                "apply",
                f"apply() returned {type(out).__name__}, expected a tensor",
            )
            same = (out.shape, out.dtype, out.device) == (logits.shape, logits.dtype, logits.device)
            require(
                same,
                "shape, dtype and device",
                f"logits {list(logits.shape)} {logits.dtype} became {list(out.shape)} {out.dtype} on {out.device}",
            )
            nan = out.isnan().nonzero()
            require(
                not len(nan),
                "no NaN",
                f"{self.processor.__name__} wrote NaN; first NaN at row, token {nan[:1].tolist()}; token 7 was -inf in every row",
            )

    def test_only_the_given_rows_are_touched(self) -> None:
        """Logits may be a view of a larger tensor; what lies around them stays."""
        made, rows = self.processor(), [self._sequence(slot) for slot in (0, 1)]
        for row in rows:
            self._admit(made, row)
        wide = torch.zeros(6, self.vocab_size + 8, device="cpu")
        wide[2:4, 4:-4] = self._logits(rows)
        before = wide.clone()
        made.apply(wide[2:4, 4:-4], [0, 1])
        before[2:4, 4:-4] = wide[2:4, 4:-4]
        require_equal("only the given rows", wide, before, ("row of the larger tensor", "column"))

    def test_slots_are_independent(self) -> None:
        """A sequence's logits are the same alone and beside others, which come, go and gain other tokens."""
        alone = self._follow(self.processor(), self._sequence(0), 6)
        made, mine = self.processor(), self._sequence(0)
        others = [self._sequence(slot, other=slot % 2 == 1, seed=slot) for slot in (1, 2, 3)]
        self._admit(made, mine)
        for step, expected in enumerate(alone):
            if step < len(others):
                self._admit(made, others[step])
            if step == 4:
                made.release(others[1].slot)
            beside = [other for other in others[: step + 1] if step < 4 or other is not others[1]]
            out = self._apply(made, [mine, *beside])
            require_equal(
                "slots are independent", out[:1], expected, ROW, f"after {step} tokens, beside {len(beside)}"
            )
            for sequence in (mine, *beside):
                self._advance(made, sequence)

    def test_order_of_rows_does_not_matter(self) -> None:
        """``slots`` says which row belongs to whom: any order, any subset."""
        made, rows = self.processor(), [self._sequence(slot, other=slot == 1, seed=slot) for slot in range(4)]
        for row in rows:
            self._admit(made, row)
            self._advance(made, row)
        whole = self._apply(made, rows)
        for order in ([3, 1, 0, 2], [2, 0], [1], [3, 2, 1, 0]):
            out = self._apply(made, [rows[i] for i in order])
            require_equal("order of rows", out, whole[order], ROW, f"rows {order} against all in order")

    def test_apply_is_repeatable(self) -> None:
        """What ``apply`` does follows from the tokens known, not from how often it was called: after a preemption
        the calls of before are not made again."""
        made, row = self.processor(), self._sequence(0)
        self._admit(made, row)
        for step in range(4):
            first = self._apply(made, [row])
            for _ in range(2):
                require_equal(
                    "apply is repeatable", self._apply(made, [row]), first, ROW, f"after {step} tokens"
                )
            self._advance(made, row)

    def test_readmission_continues(self) -> None:
        """A preempted sequence is released, then admitted on another slot with its prompt and told of all its tokens
        at once: nothing changes for it."""
        expected = self._follow(self.processor(), self._sequence(0), 8)
        for when in (0, 1, 5):
            made, row = self.processor(), self._sequence(0)
            self._admit(made, row)
            for step, wanted in enumerate(expected):
                if step == when:
                    made.release(row.slot)
                    row.slot = 3
                    self._admit(made, row)
                note = f"after {step} tokens, preempted after {when}"
                require_equal("readmission", self._apply(made, [row]), wanted, ROW, note)
                self._advance(made, row)

    def test_rollback_undoes_advance(self) -> None:
        """Tokens told and taken back, in one call or several, leave no trace."""
        expected = self._follow(self.processor(), self._sequence(0), 8)
        for drafts, back in (([9], 1), ([5, 6, 7], 3), ([5, 6, 7], 2), ([4], 0)):
            made, row = self.processor(), self._sequence(0)
            self._admit(made, row)
            for step, wanted in enumerate(expected[:6]):
                note = f"after {step} tokens, {back} of {len(drafts)} drafts taken back each time"
                require_equal("rollback", self._apply(made, [row]), wanted, ROW, note)
                token = self._next(row)
                right = [token] if back < len(drafts) else []
                made.advance(
                    row.slot,
                    tuple(
                        right + [(token + d) % self.vocab_size for d in drafts[: len(drafts) - len(right)]]
                    ),
                )
                made.rollback(row.slot, len(drafts) - len(right))
                if not right:
                    made.advance(row.slot, (token,))
                row.token_ids.append(token)

    def test_release_forgets(self) -> None:
        """The next sequence on a slot finds nothing of the one before."""
        expected = self._follow(self.processor(), self._sequence(0, seed=5), 4)
        made, before = self.processor(), self._sequence(0, other=True, seed=2)
        self._admit(made, before)
        for _ in range(5):
            self._apply(made, [before])
            self._advance(made, before)
        made.release(before.slot)
        after = self._sequence(0, seed=5)
        self._admit(made, after)
        for step, wanted in enumerate(expected):
            require_equal("release forgets", self._apply(made, [after]), wanted, ROW, f"after {step} tokens")
            self._advance(made, after)

    def test_forks_share_the_past_only(self) -> None:
        """For n > 1 the child is admitted with the parent's prompt and tokens; from then on each has its own."""
        made, parent = self.processor(), self._sequence(0)
        self._admit(made, parent)
        for _ in range(3):
            self._advance(made, parent)
        child = self._sequence(1)
        child.token_ids = list(parent.token_ids)
        self._admit(made, child)
        both = self._apply(made, [parent, child])
        require_equal("fork", both[1:], both[:1], ROW, "the child's row against the parent's")
        kept = MadeUpSequence(0, parent.seed, parent.params, parent.prompt_ids, list(parent.token_ids))
        for token in (11, 12, 13):
            child.token_ids.append(token)
            made.advance(child.slot, (token,))
        require_equal(
            "fork", self._apply(made, [kept]), both[:1], ROW, "the parent after the child gained 3 tokens"
        )

    def test_keeps_argmax(self) -> None:
        """Where ``keeps_argmax`` is claimed: greedy rows skip the processor, so the likeliest token must stay."""
        if not self.processor.keeps_argmax:
            not_claimed(f"{self.processor.__name__} does not claim keeps_argmax")
        made, row = self.processor(), self._sequence(0)
        self._admit(made, row)
        for step in range(40):
            row.seed = step
            logits = self._logits([row])
            out = made.apply(logits.clone(), [row.slot])
            before, after = int(logits.argmax()), int(out.argmax())
            require(
                before == after,
                "keeps_argmax",
                f"after {step} tokens the likeliest token was {before} ({float(logits[0, before]):.6g}), and is "
                f"{after} ({float(out[0, after]):.6g}) of {float(out[0, before]):.6g} now",
            )
            self._advance(made, row)

    def test_needs_tokens(self) -> None:
        """Where ``needs_tokens`` is ``False``: what was generated makes no difference."""
        if self.processor.needs_tokens:
            not_claimed(f"{self.processor.__name__} needs tokens")
        made, told, untold = self.processor(), self._sequence(0), self._sequence(1)
        for row in (told, untold):
            self._admit(made, row)
        for step in range(8):
            out = self._apply(made, [told, untold])
            require_equal(
                "needs_tokens = False", out[:1], out[1:], ROW, f"with and without {step} tokens told"
            )
            made.advance(told.slot, (step * 37 % self.vocab_size,))

    def test_bad_params_are_request_errors(self) -> None:
        """``admit`` refuses wrong values with RequestError; the slot is as it was, and can be released."""
        if not self.bad_params:
            not_claimed("bad_params is empty")
        expected = self._follow(self.processor(), self._sequence(0), 2)
        made = self.processor()
        for bad in self.bad_params:
            params = self._bad(bad)
            try:
                made.admit(0, params, (1, 2, 3))
            except RequestError:
                made.release(0)
            except Exception as error:  # whatever it raises instead is the finding
                raise ConformanceError(
                    "bad params", f"{dict(bad)}: {type(error).__name__} ({error}) instead of RequestError"
                ) from error
            else:
                raise ConformanceError("bad params", f"{dict(bad)} was accepted, expected RequestError")
        row = self._sequence(0)
        self._admit(made, row)
        for wanted in expected:
            require_equal("after bad params", self._apply(made, [row]), wanted, ROW)
            self._advance(made, row)

    def test_engine_alone_and_in_a_batch(self) -> None:
        """A real request gives the same tokens alone and among others; those that do not name it do not notice."""
        with self._engine() as engine:
            mine = [self._real(max_tokens=10, temperature=t, seed=3) for t in (0.0, 1.0)]
            plain = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
            alone = [self._tokens(engine, [(PROMPTS[0], params)])[0] for params in (*mine, plain)]
            together = self._tokens(
                engine,
                [(PROMPTS[0], mine[0]), (PROMPTS[1], plain), (PROMPTS[0], mine[1]), (PROMPTS[0], plain)],
            )
        with Engine(**self._options()) as engine:
            without = self._tokens(engine, [(PROMPTS[0], plain)])[0]
        found = (together[0], together[2], together[3])
        kinds = (
            "greedy request alone and in a batch",
            "sampled request alone and in a batch",
            "a request without it",
        )
        for kind, got, expected in zip(kinds, found, (*alone[:2], without), strict=True):
            _require_tokens(kind, got, expected)
        _require_tokens("a request without it, beside nobody", alone[2], without)

    def test_engine_preemption(self) -> None:
        """Real requests that are preempted for lack of blocks give the tokens they give alone."""
        asked = [
            (prompt, self._real(max_tokens=24, temperature=1.0, seed=index))
            for index, prompt in enumerate(PROMPTS)
        ]
        with self._engine() as engine:
            expected = [self._tokens(engine, [request])[0] for request in asked]
        with self._engine(
            num_kv_blocks=14, block_size=4, max_model_len=48, enable_prefix_caching=False
        ) as engine:
            found = self._tokens(engine, asked)
            preemptions = engine.stats().preemptions
        require(
            preemptions > 0,
            "preemption",
            "no request was preempted: this model's prompts are too short for the test",
        )
        for index, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            _require_tokens(f"preemption, request {index}", got, wanted)

    def test_engine_choices(self) -> None:
        """n = 3: each choice is what a lone engine gives, and all end."""
        params = self._real(n=3, max_tokens=8, temperature=1.0, seed=1)
        runs = []
        for _ in range(2):
            with self._engine() as engine:
                (output,) = engine.generate([PROMPTS[0]], params)
                runs.append([list(choice.token_ids) for choice in output.outputs])
        for index, (got, expected) in enumerate(zip(*runs, strict=True)):
            _require_tokens(f"choice {index} in two engines", got, expected)

    # ---- made-up sequences ------------------------------------------------------------------------------

    def _sequence(self, slot: int, *, other: bool = False, seed: int = 0) -> MadeUpSequence:
        values = self.other_params if other and self.other_params is not None else self.params
        # Slots other than 0 hold other prompts, but a fork and a readmission keep theirs by seed.
        prompt = tuple((seed * 31 + i * 7 + 1 + 5 * other) % self.vocab_size for i in range(4 + seed))
        return MadeUpSequence(slot, seed, SamplingParams(**values, logits_processors=(NAME,)), prompt)

    def _admit(self, made: LogitsProcessor, row: MadeUpSequence) -> None:
        made.admit(row.slot, row.params, row.prompt_ids)
        if row.token_ids:
            made.advance(row.slot, tuple(row.token_ids))

    def _logits(self, rows: Sequence[MadeUpSequence]) -> torch.Tensor:
        drawn = []
        for row in rows:
            generator = torch.Generator(device="cpu").manual_seed(1000 * row.seed + len(row.token_ids))
            drawn.append(torch.randn(self.vocab_size, generator=generator, device="cpu") * 4.0)
        return torch.stack(drawn)

    def _apply(self, made: LogitsProcessor, rows: Sequence[MadeUpSequence]) -> torch.Tensor:
        out = made.apply(self._logits(rows), [row.slot for row in rows]).clone()
        nan = out.isnan().nonzero()
        if len(nan):
            row, token = (int(i) for i in nan[0])
            known = f"{self.processor.__name__} wrote NaN at row {row}, token {token}, after {len(rows[row].token_ids)} tokens"
            raise ConformanceError("no NaN", f"{known}; {len(nan)} of {out.numel()} logits are NaN")
        return out

    def _bad(self, entry: Mapping[str, Any]) -> SamplingParams:
        """``params`` with an entry of ``bad_params`` over them."""
        good = SamplingParams(**self.params, logits_processors=(NAME,))
        try:
            bad = SamplingParams(**{**self.params, **entry}, logits_processors=(NAME,))
        except RequestError as error:
            raise ConformanceError(
                "bad params",
                f"{dict(entry)} is refused by SamplingParams itself ({error}), so that admit never sees it: name values "
                "that only this processor refuses",
            ) from error
        require(
            bad != good,
            "bad params",
            f"{dict(entry)} changes nothing: an entry of bad_params is laid over params {dict(self.params)}, key by key; "
            "state what is wrong ({'extra_args': None} takes extra_args away)",
        )
        return bad

    def _next(self, row: MadeUpSequence) -> int:
        # Some tokens repeat, so that what counts or forbids repetition shows.
        return (row.seed * 13 + len(row.token_ids) // 2 * 17 + 3) % self.vocab_size

    def _advance(self, made: LogitsProcessor, row: MadeUpSequence) -> None:
        token = self._next(row)
        row.token_ids.append(token)
        made.advance(row.slot, (token,))

    def _follow(self, made: LogitsProcessor, row: MadeUpSequence, steps: int) -> list[torch.Tensor]:
        """What a sequence gets before each of its first tokens, with nobody beside it: [1, V] each."""
        self._admit(made, row)
        found = []
        for _ in range(steps):
            found.append(self._apply(made, [row]))
            self._advance(made, row)
        return found

    # ---- real requests ----------------------------------------------------------------------------------

    def _options(self, **changes: Any) -> dict[str, Any]:
        small = {"model": "demo", "dtype": "float32", "num_kv_blocks": 64, "max_num_seqs": 4, "seed": 0}
        return {**small, **self.engine_options, **changes}

    def _engine(self, **changes: Any) -> Engine:
        if "." in self.processor.__qualname__:
            not_claimed(f"{self.processor.__qualname__} cannot be imported by name, so no record can name it")
        registry = PluginRegistry(plugins=[_Plugin(self.processor)], entry_points=False, strict=True)
        return Engine(**self._options(**changes), plugins=registry)

    def _real(self, **values: Any) -> SamplingParams:
        return SamplingParams(**{"ignore_eos": True, **self.params, **values}, logits_processors=(NAME,))

    def _tokens(self, engine: Engine, asked: Sequence[tuple[str, SamplingParams]]) -> list[list[int]]:
        outputs = engine.generate([prompt for prompt, _ in asked], [params for _, params in asked])
        return [list(output.outputs[0].token_ids) for output in outputs]


class _Plugin:
    """Registers the class under test."""

    def __init__(self, processor: type[LogitsProcessor]) -> None:
        self._factory = f"{processor.__module__}:{processor.__name__}"

    @hookimpl
    def kvpage_logits_processors(self) -> Sequence[LogitsProcessorRecord]:
        """The class, by import string."""
        return [LogitsProcessorRecord(name=NAME, factory=self._factory)]


def _require_tokens(property: str, got: Sequence[int], expected: Sequence[int]) -> None:
    __tracebackhide__ = True
    wrong = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
        min(len(got), len(expected)),
    )
    require(
        list(got) == list(expected),
        property,
        f"token {wrong} is {list(got[wrong : wrong + 1])}, expected {list(expected[wrong : wrong + 1])}; {list(got)} against "
        f"{list(expected)}",
    )
