"""The flags of ``kvpage bench serve``: vLLM's, with its defaults, checked before anything is sent."""

from __future__ import annotations

import argparse
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpage.cli.serve_datasets import DATASETS, NOT_HERE
from kvpage.cli.serve_load import Arrivals
from kvpage.cli.serve_metrics import GOODPUT_METRICS, METRICS
from kvpage.flags.parser import CommandParser, UsageError, check_at_least, human_integer


@dataclass(frozen=True, slots=True)
class Backend:
    """An API to speak: where it is, and whether it takes messages."""

    endpoint: str
    chat: bool

    @property
    def suffix(self) -> str:
        """What the path of every such endpoint ends with."""
        return "chat/completions" if self.chat else "completions"


COMPLETIONS = Backend("/v1/completions", chat=False)
BACKENDS: Mapping[str, Backend] = {
    "openai": COMPLETIONS,
    "openai-chat": Backend("/v1/chat/completions", chat=True),
    "vllm": COMPLETIONS,
}


def read_flags(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """The flags as a namespace; ``arrivals`` and ``goodput`` of it are what they describe.

    Raises:
        UsageError: unknown, out of range, or contradicting another.
    """
    parser = CommandParser("kvpage bench serve", description)
    _add_server_flags(parser)
    _add_dataset_flags(parser)
    _add_load_flags(parser)
    _add_sampling_flags(parser)
    _add_result_flags(parser)
    namespace = parser.parse_arguments(arguments)
    check_at_least(1, namespace, "num_prompts", "random_output_len", "prefix_repetition_num_prefixes")
    check_at_least(
        0, namespace, "num_warmups", "random_input_len", "random_prefix_len", "ready_check_timeout_sec"
    )
    if not 0 <= namespace.random_range_ratio < 1:
        raise UsageError(f"--random-range-ratio must be in [0, 1), got {namespace.random_range_ratio}")
    if namespace.max_concurrency is not None:
        check_at_least(1, namespace, "max_concurrency")
    if namespace.dataset_name in NOT_HERE:
        raise UsageError(f"--dataset-name {namespace.dataset_name}: {NOT_HERE[namespace.dataset_name]}")
    if namespace.dataset_path is not None and namespace.dataset_name in ("random", "prefix_repetition"):
        raise UsageError(
            f"--dataset-name {namespace.dataset_name} makes its prompts and reads no file: leave --dataset-path out, "
            "or take sharegpt or custom"
        )
    if namespace.input_len is not None:
        namespace.random_input_len = namespace.input_len
    if namespace.output_len is not None:
        for name in ("random", "sharegpt", "custom", "prefix_repetition"):
            setattr(namespace, f"{name}_output_len", namespace.output_len)
    namespace.arrivals = _arrivals(namespace)
    namespace.goodput = _goodput(namespace.goodput or ())
    return namespace


def pairs(flag: str, words: Sequence[str] | None) -> dict[str, str]:
    """ "KEY=VALUE" words as a mapping.

    Raises:
        UsageError: one has no "=".
    """
    found = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{flag} {word}: write it as KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def _add_server_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--backend", choices=(*BACKENDS,), default="openai", help="API to speak [openai]")
    group.add_argument("--base-url", metavar="URL", help="in place of --host and --port")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="[127.0.0.1]")
    group.add_argument("--port", type=int, default=8000, metavar="PORT", help="[8000]")
    group.add_argument("--endpoint", metavar="PATH", help="[the backend's: /v1/completions]")
    group.add_argument("--header", nargs="*", metavar="KEY=VALUE", help="sent with every request")
    group.add_argument("--insecure", action="store_true", help="take any certificate")
    group.add_argument(
        "--model", metavar="MODEL", help="name, and where its tokenizer is [the server's first]"
    )
    group.add_argument("--served-model-name", metavar="NAME", help="what the server calls it [--model]")
    group.add_argument("--tokenizer", metavar="MODEL", help="folder or hub id [the model's]")
    group.add_argument("--tokenizer-mode", choices=("auto", "slow"), default="auto", help="[auto]")
    group.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    group.add_argument("--skip-tokenizer-init", action="store_true",
                       help="no tokenizer: lengths of prompts are in words")  # fmt: skip
    group.add_argument("--ready-check-timeout-sec", type=float, default=0, metavar="S",
                       help="wait so long for a first answer; 0 = do not check [0]")  # fmt: skip


def _add_dataset_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("prompts")

    def length(flag: str, default: int | None, text: str) -> None:
        shown = "" if default is None else f" [{default}]"
        group.add_argument(flag, type=human_integer, default=default, metavar="N", help=text + shown)

    group.add_argument("--dataset-name", choices=(*DATASETS, *NOT_HERE), default="random", metavar="NAME",
                       help=f"{', '.join(DATASETS)} [random]")  # fmt: skip
    group.add_argument("--dataset-path", metavar="FILE", help="of sharegpt (.json) and custom (.jsonl)")
    length("--num-prompts", 1000, "requests")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals [0]")
    length("--input-len", None, "tokens of a prompt, for every data set that makes them")
    length("--output-len", None, "tokens of an answer, for every data set")
    length("--random-input-len", 1024, "tokens of a prompt")
    length("--random-output-len", 128, "tokens of an answer")
    group.add_argument("--random-range-ratio", type=float, default=0.0, metavar="X",
                       help="lengths vary by this share around the middle, in [0, 1) [0.0]")  # fmt: skip
    length("--random-prefix-len", 0, "tokens that all prompts begin with, beside --random-input-len")
    length("--sharegpt-output-len", None, "in place of the lengths of the answers in the file")
    length("--custom-output-len", 256, '-1 = each line\'s "output_tokens"')
    length("--prefix-repetition-prefix-len", 256, "tokens of each prefix")
    length("--prefix-repetition-suffix-len", 256, "tokens after it")
    length("--prefix-repetition-num-prefixes", 10, "prefixes")
    length("--prefix-repetition-output-len", 128, "tokens of an answer")
    group.add_argument("--skip-chat-template", action="store_true", help="custom prompts as they stand")
    group.add_argument("--chat-template-kwargs", type=_json_object, metavar="JSON", help="for that template")
    group.add_argument("--disable-shuffle", action="store_true", help="the file's order")
    group.add_argument("--no-oversample", action="store_true",
                       help="fewer requests where the file has fewer prompts")  # fmt: skip


def _add_load_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--request-rate", type=float, default=math.inf, metavar="X",
                       help="requests a second; inf = all at once [inf]")  # fmt: skip
    group.add_argument("--burstiness", type=float, default=1.0, metavar="X",
                       help="1 = a Poisson process, less = in bursts, more = evenly [1.0]")  # fmt: skip
    group.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at most")
    group.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before [0]")
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="the rate grows")
    group.add_argument("--ramp-up-start-rps", type=float, metavar="X", help="from so many a second")
    group.add_argument("--ramp-up-end-rps", type=float, metavar="X", help="to so many")
    group.add_argument("--request-id-prefix", default=f"bench-{uuid.uuid4().hex[:8]}-", metavar="TEXT",
                       help="of the x-request-id header [a new one each run]")  # fmt: skip
    group.add_argument("--disable-tqdm", action="store_true", help="no progress on stderr")


def _add_sampling_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("sampling")
    for name in (
        "temperature",
        "top-p",
        "min-p",
        "frequency-penalty",
        "presence-penalty",
        "repetition-penalty",
    ):
        group.add_argument(f"--{name}", type=float, metavar="X", help="[the server's]")
    group.add_argument("--top-k", type=int, metavar="N", help="[the server's]")
    group.add_argument("--logprobs", type=int, metavar="N", help="log-probabilities a token [none]")
    group.add_argument("--ignore-eos", action="store_true", help="answers of full length; on for random")
    group.add_argument("--use-beam-search", action=_NotYet, help="not yet: refused")
    group.add_argument("--extra-body", type=_json_object, metavar="JSON", help="fields added to each request")


def _add_result_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("result")
    group.add_argument("--goodput", nargs="+", metavar="METRIC:MS",
                       help=f"what a good request keeps to, of {', '.join(GOODPUT_METRICS)}")  # fmt: skip
    group.add_argument("--percentile-metrics", type=_metrics, default=["ttft", "tpot", "itl"], metavar="NAMES",
                       help=f"of {', '.join(METRICS)} [ttft,tpot,itl]")  # fmt: skip
    group.add_argument("--metric-percentiles", type=_percents, default=[99.0], metavar="P,P", help="[99]")
    group.add_argument("--label", metavar="TEXT", help="of the result file [the backend]")
    group.add_argument("--metadata", nargs="*", metavar="KEY=VALUE", help="added to the result")
    group.add_argument("--save-result", action="store_true", help="write the result as JSON")
    group.add_argument("--append-result", action="store_true", help="append it to the file, a line a run")
    group.add_argument("--save-detailed", action="store_true", help="with values of each request")
    group.add_argument("--result-dir", metavar="FOLDER", help="[.]")
    group.add_argument("--result-filename", metavar="NAME", help="[label, rate, model and time]")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


class _NotYet(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **keywords)

    def __call__(self, parser: object, namespace: object, values: object, option: str | None = None) -> None:
        raise UsageError(f"{option}: beam search has not landed yet; leave it out")


def _arrivals(namespace: argparse.Namespace) -> Arrivals:
    strategy, rate = namespace.ramp_up_strategy, namespace.request_rate
    if not rate > 0 or not namespace.burstiness > 0:
        raise UsageError("--request-rate and --burstiness must be above 0 (inf = all requests at once)")
    if strategy is None:
        return Arrivals(rate=rate, burstiness=namespace.burstiness)
    start, end = namespace.ramp_up_start_rps, namespace.ramp_up_end_rps
    if not math.isinf(rate):
        raise UsageError("--ramp-up-strategy sets the rate itself: leave --request-rate out")
    if start is None or end is None or not 0 < start <= end < math.inf:
        raise UsageError(
            f"--ramp-up-strategy {strategy} needs --ramp-up-start-rps and --ramp-up-end-rps, above 0 and growing; "
            f"got {start} and {end}"
        )
    return Arrivals(burstiness=namespace.burstiness, ramp_up=strategy, start_rps=start, end_rps=end)


def _goodput(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in GOODPUT_METRICS or not found[name] >= 0:
            raise UsageError(
                f"--goodput {word}: write METRIC:MILLISECONDS with a metric of {', '.join(GOODPUT_METRICS)}, "
                "such as ttft:500"
            )
    return found


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: name some of {', '.join(METRICS)}")
    return names


def _percents(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percentiles such as 50,90,99")
    return values


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
