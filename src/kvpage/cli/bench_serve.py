"""``kvpage bench serve``: load on a running server, with vLLM's flags and result keys."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from kvpage.cli.collect_env import environment
from kvpage.cli.main import ERROR, OK
from kvpage.cli.remote import (
    RemoteError,
    checked_url,
    error_text,
    http_library,
    key_header,
    status_text,
    timeouts,
)
from kvpage.cli.serve_datasets import TextTokenizer, Words, make_samples
from kvpage.cli.serve_flags import BACKENDS, pairs, read_flags
from kvpage.cli.serve_load import Sample, Target, run_load, until_ready
from kvpage.cli.serve_metrics import DETAILS, as_text, result_of, series_of, spread_of
from kvpage.cli.signals import undivided
from kvpage.config import EngineOptions
from kvpage.errors import KvpageError
from kvpage.flags.parser import UsageError
from kvpage.loading.locate import find_folder

DESCRIPTION = """\
Requests, tokens and times that a running server delivers under load: kvpage's or any other that speaks OpenAI's API.
Prompts are random unless a data set is named; answers stream."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    namespace = read_flags(arguments, DESCRIPTION)
    http_library()
    load = _Load(namespace)
    result, text = asyncio.run(load.measure())
    path = load.result_path()
    if path is not None:
        _save(path, result, append=namespace.append_result)
    print(json.dumps(result, indent=2) if namespace.json else text)
    if path is not None:
        print(f"result: {path}", file=sys.stderr)
    return OK if result["completed"] else ERROR


class _Load:
    """One run: what the flags ask for, checked before anything is sent."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace
        self.backend = BACKENDS[namespace.backend]
        endpoint = namespace.endpoint or self.backend.endpoint
        if not endpoint.endswith(self.backend.suffix):
            raise UsageError(
                f"--backend {namespace.backend} asks .../{self.backend.suffix}, and --endpoint is {endpoint}: "
                "leave --endpoint out, or take the other backend"
            )
        host = f"[{namespace.host}]" if ":" in namespace.host else namespace.host
        self.base = checked_url(namespace.base_url or f"http://{host}:{namespace.port}")
        self.url = self.base + "/" + endpoint.lstrip("/")
        self.headers = {**key_header(None), **pairs("--header", namespace.header)}
        self.metadata = pairs("--metadata", namespace.metadata)
        self.metrics = namespace.percentile_metrics
        self.percents = namespace.metric_percentiles
        self.started = datetime.now().strftime("%Y%m%d-%H%M%S")
        self.model = namespace.model

    async def measure(self) -> tuple[dict[str, Any], str]:
        """Send everything; the result, and its text."""
        namespace = self.namespace
        limits = http_library().Limits(max_connections=None, max_keepalive_connections=None)
        verify = not namespace.insecure
        async with http_library().AsyncClient(timeout=timeouts(), limits=limits, verify=verify) as client:
            name, root = await self._model(client)
            self.model = namespace.model or root or name
            tokenizer, chat_text = _tokenizer(namespace, self.model)
            samples = make_samples(namespace, tokenizer, chat_text)
            target = self._target(namespace.served_model_name or name)
            await self._prepare(client, target, samples[0])
            due = namespace.arrivals.times(len(samples), random.Random(namespace.seed))
            progress = _Progress(len(samples), shown=sys.stderr.isatty() and not namespace.disable_tqdm)
            answers, seconds = await run_load(
                client,
                target,
                samples,
                due,
                max_concurrency=namespace.max_concurrency,
                request_id_prefix=namespace.request_id_prefix,
                on_answer=progress.count,
            )
        progress.end()

        def count(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False))

        result = result_of(answers, seconds, count=count, goodput=namespace.goodput)
        metrics = self._offered_metrics()
        result |= spread_of(series_of(answers, result["output_lens"]), metrics, self.percents)
        for error in [answer.error for answer in answers if answer.error][:10]:
            print(f"failed: {error}", file=sys.stderr)
        return self._described(result), as_text(result, metrics, self.percents, vars(namespace))

    def result_path(self) -> Path | None:
        """Where the result is to be written, if anywhere."""
        namespace = self.namespace
        if not (namespace.save_result or namespace.append_result):
            return None
        limit = f"-concurrency{namespace.max_concurrency}" if namespace.max_concurrency is not None else ""
        load = f"{namespace.request_rate}qps"
        if namespace.ramp_up_strategy is not None:
            load = f"ramp-up-{namespace.ramp_up_strategy}-{namespace.ramp_up_start_rps:g}qps-"
            load += f"{namespace.ramp_up_end_rps:g}qps"
        model = str(self.model).rstrip("/").rpartition("/")[2]
        name = f"{namespace.label or namespace.backend}-{load}{limit}-{model}-{self.started}.json"
        return Path(namespace.result_dir or ".") / (namespace.result_filename or name)

    async def _model(self, client: Any) -> tuple[str, str]:
        """Name and root of the model to ask for: as given, else the server's first."""
        if self.namespace.model is not None:
            return self.namespace.model, self.namespace.model
        url = f"{self.base}/v1/models"
        try:
            response = await client.get(url, headers=self.headers)
            if response.status_code != 200:
                raise RemoteError(f"{url}: {status_text(response.status_code, response.content)}")
            first = response.json()["data"][0]
            return str(first["id"]), str(first.get("root") or first["id"])
        except (ValueError, LookupError, TypeError):
            raise RemoteError(
                f"{url} names no model ({error_text(response.content)}): give --model"
            ) from None
        except http_library().HTTPError as error:
            raise RemoteError(
                f"{url}: {type(error).__name__}: {error}; is the server up? (kvpage serve MODEL)"
            ) from None

    def _target(self, model: str) -> Target:
        namespace = self.namespace
        names = ("top_p", "top_k", "min_p", "temperature", "frequency_penalty", "presence_penalty",
                 "repetition_penalty")  # fmt: skip
        sampling = {name: getattr(namespace, name) for name in names if getattr(namespace, name) is not None}
        return Target(
            url=self.url,
            chat=self.backend.chat,
            model=model,
            headers=self.headers,
            body={**sampling, **(namespace.extra_body or {})},
            # Random text may well make a model stop at once; vLLM asks it to go on as well.
            ignore_eos=namespace.ignore_eos or namespace.dataset_name == "random",
            logprobs=namespace.logprobs,
        )

    async def _prepare(self, client: Any, target: Target, sample: Sample) -> None:
        """The ready check and the warm-ups, with the first prompt."""
        namespace = self.namespace
        if namespace.ready_check_timeout_sec > 0:
            await until_ready(client, target, sample, namespace.ready_check_timeout_sec)
        if namespace.num_warmups:
            await run_load(
                client,
                target,
                [sample] * namespace.num_warmups,
                [0.0] * namespace.num_warmups,
                max_concurrency=namespace.max_concurrency,
                request_id_prefix=f"{namespace.request_id_prefix}warmup-",
            )

    def _offered_metrics(self) -> list[str]:
        """Without a limit of concurrency nothing waits in the client, so that there is nothing to tell of it."""
        held_back = self.namespace.max_concurrency is not None
        paced = held_back and not math.isinf(self.namespace.request_rate)
        left_out = {"client_queue_time": not held_back, "e2el_including_client_queue": not paced}
        return [name for name in self.metrics if not left_out.get(name, False)]

    def _described(self, result: dict[str, Any]) -> dict[str, Any]:
        namespace = self.namespace
        if not namespace.save_detailed:
            result = {key: value for key, value in result.items() if key not in DETAILS}
        ramp = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
        return {
            "date": self.started,
            "endpoint_type": namespace.backend,
            "backend": namespace.backend,
            "label": namespace.label,
            "model_id": self.model,
            "tokenizer_id": None if namespace.skip_tokenizer_init else (namespace.tokenizer or self.model),
            "num_prompts": namespace.num_prompts,
            **self.metadata,
            "request_rate": "inf" if math.isinf(namespace.request_rate) else namespace.request_rate,
            "burstiness": namespace.burstiness,
            "max_concurrency": namespace.max_concurrency,
            **({name: getattr(namespace, name) for name in ramp} if namespace.ramp_up_strategy else {}),
            **result,
            "environment": environment(),
        }


class _Progress:
    """How many requests are answered, on stderr."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total, self._shown, self._done = total, shown, 0

    def count(self) -> None:
        """One more."""
        self._done += 1
        if self._shown:
            print(f"\r{self._done}/{self._total} requests", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            print(file=sys.stderr)


def _tokenizer(namespace: argparse.Namespace, model: str) -> tuple[TextTokenizer, Callable[[str], str]]:
    """The tokenizer that prompts are made and counted with, and what writes a question as a chat."""
    if namespace.skip_tokenizer_init:
        return Words(), lambda text: text
    named = namespace.tokenizer or model
    with undivided():
        from kvpage.text.chat import ChatTemplate  # jinja2 and tokenizers, half a second
        from kvpage.text.tokenizer import load_tokenizer
    try:
        options = EngineOptions(model=named, trust_remote_code=namespace.trust_remote_code)
        tokenizer = load_tokenizer(
            find_folder(options, weights=False),
            mode="slow" if namespace.tokenizer_mode == "slow" else "auto",
            trust_remote_code=namespace.trust_remote_code,
        )
    except KvpageError as error:
        raise UsageError(
            f"prompts are made with the model's tokenizer, and that of {named!r} is not at hand ({error}): name one "
            "with --tokenizer FOLDER, or count words instead with --skip-tokenizer-init"
        ) from error

    def chat_text(text: str) -> str:
        if BACKENDS[namespace.backend].chat or tokenizer.chat_template is None:
            return text  # the server writes it out; a base model has nothing to write
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        return template.render([{"role": "user", "content": text}], **(namespace.chat_template_kwargs or {}))

    return tokenizer, chat_text


def _save(path: Path, result: dict[str, Any], *, append: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            if append and file.tell():
                file.write("\n")
            json.dump(result, file)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
