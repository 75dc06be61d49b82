"""The commands and snippets of the articles that kvpage was asked to implement, as typed: vllm is kvpage, and the
models are tiny local ones of the same names. Each command gets ``--port 0``, for 8000 may be taken."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer, answered, live_server, refused

from kvpage import LLM, AsyncEngine, AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from kvpage.cli.main import main
from kvpage.utils import random_uuid
from kvpage_server.command_line import read_flags
from kvpage_server.server_flags import engine_keywords, make_parser, settings_of
from tiny_checkpoint import write_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LLAMA = "meta-llama/Llama-2-7b-chat-hf"
MODELS = (LLAMA, "meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-2-7b", "model")
"""Folders of these names lie in the working directory of every test here."""
QUANTIZED = {
    "TheBloke/Llama-2-70B-AWQ": "awq-gemm-g32",
    "my-quantized-70b-model": "awq-gemm-g32",
    "meta-llama/Llama-2-70b-chat-hf-gptq": "gptq-4bit-g32-sym",
}
"""And these, whose weights AutoAWQ and auto-gptq wrote."""
MAX_BLOCKS = ("--port", "0", "--num-kv-blocks", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("articles")
    for name in MODELS:
        write_checkpoint(made / name, max_position_embeddings=4096)
    for name, written in QUANTIZED.items():
        write_checkpoint(made / name)  # for its tokenizer
        (made / name / "model.safetensors").unlink()
        for file in (ROOT / "tests" / "data" / "quant" / written).iterdir():
            shutil.copy(file, made / name)
    return made


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def named(engine: AsyncEngine) -> Iterator[LiveServer]:
    """A server at work, for what clients type."""
    with live_server(engine) as server:
        yield server


@contextmanager
def serving(command: str, *more: str) -> Iterator[LiveServer]:
    """What a server command comes to, in this process: its flags are read, its engine is made, a request served."""
    flags = read_flags(make_parser(), [*shlex.split(command)[2:], *more])
    settings = settings_of(flags, {})
    engine = AsyncEngine(settings.model_path, **engine_keywords(flags))
    try:
        with live_server(engine) as server:
            yield server
    finally:
        engine.close()


@contextmanager
def running(command: str, *more: str) -> Iterator[httpx.Client]:
    """A server command as a process; a client of it."""
    words = shlex.split(command)
    words = (
        [sys.executable, "-m", "kvpage", *words[1:]] if words[0] == "kvpage" else [sys.executable, *words[1:]]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*words, *MAX_BLOCKS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = next((line for line in process.stdout if line.startswith("kvpage serving")), "")
            assert line, process.stderr.read()
            url = "http://127.0.0.1:" + line.rpartition(":")[2].strip()
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                yield client
        finally:
            process.kill()


def refusal(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """What is said by a command that ends at once, with exit status 2."""
    words = shlex.split(command)
    arguments = ["serve", *words[3:]] if words[0] == "python" else words[1:]
    assert main([*arguments, *MAX_BLOCKS]) == 2
    return capsys.readouterr().err


def curl(server: LiveServer, command: str) -> dict[str, Any]:
    """A curl command as typed but for the address; by httpx where there is no curl."""
    words = shlex.split(command.replace("http://localhost:8000", server.url))
    assert words[0] == "curl"
    if shutil.which("curl"):
        done = subprocess.run([*words, "-s", "--noproxy", "*"], capture_output=True, timeout=30, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    return answered(
        httpx.post(
            words[1], content=words[words.index("-d") + 1], headers={"content-type": "application/json"}
        )
    )


def one_completion(client: httpx.Client) -> dict[str, Any]:
    return answered(client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}))


NO_TENSOR_PARALLEL = "tensor parallelism has not landed yet; use --tensor-parallel-size 1"


def test_C1_the_older_module_with_two_gpus_is_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = (
        f"python -m kvpage.entrypoints.api_server --model {LLAMA} --tensor-parallel-size 2 --dtype bfloat16 "
        "--max-num-seqs 1024 --gpu-memory-utilization 0.9"
    )
    assert f"--tensor-parallel-size 2: {NO_TENSOR_PARALLEL}" in refusal(capsys, command)
    with running(command.replace("size 2", "size 1")) as client:
        assert one_completion(client)["model"] == LLAMA


def test_C2_curl_of_a_completion(named: LiveServer) -> None:
    answer = curl(
        named,
        'curl http://localhost:8000/v1/completions -H "Content-Type: application/json" -d \'{"model": "org/tiny", '
        '"prompt": "What is the capital of France?", "max_tokens": 50, "temperature": 0.7}\'',
    )
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] <= 50


def test_C3_the_image_takes_bare_flags() -> None:
    for name in ("Dockerfile", "Dockerfile.cuda"):
        assert "ENTRYPOINT" in (ROOT / "docker" / name).read_text(encoding="utf-8")
    assert "KVPAGE_HOST" in (ROOT / "docker" / "entrypoint").read_text(encoding="utf-8")
    command = "kvpage serve --model meta-llama/Meta-Llama-3.1-8B-Instruct --tensor-parallel-size 1"
    with serving(command, *MAX_BLOCKS) as server:
        assert one_completion(server.client)["choices"]


def test_C4_curl_of_a_chat_with_messages_alone(named: LiveServer) -> None:
    answer = curl(
        named,
        'curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d \'{"model": "org/tiny", '
        '"messages": [{"role": "user", "content": "Explain PagedAttention"}]}\'',
    )
    assert answer["choices"][0]["message"]["role"] == "assistant"
    usage = answer["usage"]
    ends = answer["choices"][0]["finish_reason"]
    assert ends == "stop" or usage["total_tokens"] == 512  # max_model_len, unless the model ended before


def test_C5_the_wheel_needs_no_compiler_and_no_gpu() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["build-system"]["build-backend"] == "scikit_build_core.build"
    failed = [entry for entry in project["tool"]["scikit-build"]["overrides"] if entry["if"].get("failed")]
    assert [entry["wheel"]["cmake"] for entry in failed] == [False], "what does not compile is left out"
    assert [entry["if"]["env"] for entry in failed] == [{"KVPAGE_REQUIRE_NATIVE": False}]
    assert project["tool"]["scikit-build"]["wheel"]["py-api"] == "py3", "one wheel for every Python"
    assert "CUDA" not in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


def test_C6_the_module_with_four_gpus_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "python -m kvpage.entrypoints.openai.api_server --model meta-llama/Meta-Llama-3.1-8B-Instruct "
        "--tensor-parallel-size 4"
    )
    assert f"--tensor-parallel-size 4: {NO_TENSOR_PARALLEL}" in refusal(capsys, command)


def test_C7_a_checkpoint_of_autoawq_is_served() -> None:
    command = (
        "python -m kvpage.entrypoints.openai.api_server --model TheBloke/Llama-2-70B-AWQ --quantization awq"
    )
    with running(command) as client:
        assert one_completion(client)["model"] == "TheBloke/Llama-2-70B-AWQ"


def test_C8_every_interface_and_the_en_dash(capsys: pytest.CaptureFixture[str]) -> None:
    command = f'python -m kvpage.entrypoints.openai.api_server --model "{LLAMA}" --tensor-parallel-size 1 --host 0.0.0.0'
    with running(command) as client:
        assert client.get("/health").status_code == 200
    assert "you typed an en dash" in refusal(capsys, command.replace("--tensor", "\N{EN DASH}tensor"))


def test_C9_a_checkout_is_built_without_cuda() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert all(need.startswith("scikit-build-core") for need in project["build-system"]["requires"])
    assert not [need for need in project["project"]["dependencies"] if "cuda" in need or "nvidia" in need]


def test_C10_a_key_is_needed_and_a_wrong_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "python -m kvpage.entrypoints.openai.api_server --model meta-llama/Meta-Llama-3.1-8B-Instruct --port 8000 "
        "--api-key your-secret-key-here"
    )
    with running(command) as client:
        response = client.get("/v1/models")
        assert refused(response, 401)["type"] == "AuthenticationError"
        assert response.headers["www-authenticate"] == "Bearer"
        client.headers["authorization"] = "Bearer your-secret-key-here"
        assert one_completion(client)["choices"]
    said = refusal(capsys, command.replace("meta-llama/", "nous-research/"))
    assert "nous-research/Meta-Llama-3.1-8B-Instruct" in said
    assert "local folder" in said


def test_C11_collect_env_tells_what_nvidia_smi_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    said = capsys.readouterr().out
    assert "gpus:" in said
    assert "torch:" in said


def test_C12_an_editable_install_finds_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package in project["tool"]["scikit-build"]["wheel"]["packages"]:
        assert (ROOT / package / "__init__.py").is_file()
    assert project["project"]["scripts"]["kvpage"] == "kvpage.cli.main:main"


def test_C13_serve_with_two_gpus_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"kvpage serve {LLAMA} --host 0.0.0.0 --port 8000 --tensor-parallel-size 2"
    assert f"--tensor-parallel-size 2: {NO_TENSOR_PARALLEL}" in refusal(capsys, command)


def test_C14_a_context_beyond_the_models_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"kvpage serve {LLAMA} --host 0.0.0.0 --port 8000 --tensor-parallel-size 4 --gpu-memory-utilization 0.92 "
        "--max-model-len 8192 --enforce-eager --trust-remote-code"
    )
    assert NO_TENSOR_PARALLEL in refusal(capsys, command)
    said = refusal(capsys, command.replace("size 4", "size 1"))
    assert "--max-model-len 8192 is beyond the model's context of 4096 tokens" in said


def test_C15_curl_of_a_chat_with_max_tokens(named: LiveServer) -> None:
    answer = curl(
        named,
        'curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d \'{"model": "org/tiny", '
        '"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}\'',
    )
    assert answer["usage"]["completion_tokens"] <= 100


def test_C16_a_bare_name() -> None:
    command = "kvpage serve llama-2-7b --gpu-memory-utilization 0.9 --max-model-len 4096"
    with serving(command, "--num-kv-blocks", "512") as server:
        assert server.service.engine.options.model == "llama-2-7b"
        assert server.service.max_model_len == 4096
        assert one_completion(server.client)["choices"]


@pytest.mark.parametrize(("row", "size", "share"), [("C17", 2, 0.85), ("C18", 4, 0.8)])
def test_C17_C18_more_gpus_are_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], row: str, size: int, share: float
) -> None:
    name = {"C17": "llama-2-13b-chat-hf", "C18": "llama-2-70b-chat-hf"}[row]
    command = f"kvpage serve {name} --tensor-parallel-size {size} --gpu-memory-utilization {share}"
    assert f"--tensor-parallel-size {size}: {NO_TENSOR_PARALLEL}" in refusal(capsys, command)


def test_C19_a_checkpoint_of_auto_gptq_is_served_in_half() -> None:
    command = "kvpage serve meta-llama/Llama-2-70b-chat-hf-gptq --quantization gptq --dtype half"
    with serving(command, *MAX_BLOCKS) as server:
        assert server.service.engine.config.dtype == "float16"
        assert one_completion(server.client)["choices"]


def test_C20_a_local_folder_of_autoawq_is_served() -> None:
    with serving("kvpage serve my-quantized-70b-model --quantization awq", *MAX_BLOCKS) as server:
        assert server.service.engine.config.dtype == "bfloat16"
        assert one_completion(server.client)["choices"]


@pytest.mark.parametrize("flags", ["--gpu-memory-utilization 0.8", "--max-model-len 2048"])
def test_C21_what_to_do_when_memory_is_short(flags: str) -> None:
    with serving(f"kvpage serve model {flags}", "--num-kv-blocks", "256") as server:
        assert one_completion(server.client)["choices"]


def test_C22_without_a_model_the_bundled_one_is_served() -> None:
    with running("python -m kvpage.entrypoints.openai.api_server --enable-prefix-caching") as client:
        assert one_completion(client)["model"] == "demo"


@pytest.mark.parametrize("flags", ["--block-size 32", "--max-num-batched-tokens 8192"])
def test_C23_blocks_and_batches_are_tunable(flags: str) -> None:
    with serving(f"kvpage serve model {flags}", "--num-kv-blocks", "256") as server:
        assert one_completion(server.client)["choices"]
        plan = answered(server.client.get("/kvpage/plan"))
        values = {value["name"]: value["value"] for value in plan["values"]}
        name, value = flags[2:].replace("-", "_").split()
        assert values[name] == int(value)


def test_P1_generate_with_positional_arguments() -> None:
    llm = LLM(model="meta-llama/Meta-Llama-3.1-8B-Instruct", num_kv_blocks=64)
    params = SamplingParams(temperature=0.7, max_tokens=512)
    outputs = llm.generate(["Explain PagedAttention"], params)
    assert isinstance(outputs[0].outputs[0].text, str)


def test_P2_results_stand_in_the_order_of_the_prompts() -> None:
    prompts = ["The capital of France is", "Hello, my name is", "The future of AI is"]
    llm = LLM(model=LLAMA, num_kv_blocks=64)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=50))
    assert [output.prompt for output in outputs] == prompts
    assert all(isinstance(output.outputs[0].text, str) for output in outputs)


MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is PagedAttention?"},
]


def test_P3_any_key_is_taken_where_none_is_configured(named: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{named.url}/v1", api_key="not-needed")
    response = client.chat.completions.create(
        model="org/tiny", messages=MESSAGES, temperature=0.7, max_tokens=20
    )
    assert isinstance(response.choices[0].message.content, str)


def test_P4_every_chunk_of_a_stream_has_a_choice(named: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{named.url}/v1", api_key="not-needed")
    stream = client.chat.completions.create(
        model="org/tiny", messages=MESSAGES, temperature=0.7, max_tokens=20, stream=True
    )
    text = ""
    for chunk in stream:
        if chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
    assert text


def test_P5_the_key_EMPTY(named: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{named.url}/v1", api_key="EMPTY")
    response = client.chat.completions.create(model="org/tiny", messages=MESSAGES[1:], max_tokens=5)
    assert response.choices[0].message.content is not None


def test_P6_requests_of_the_asynchronous_engine_are_gathered() -> None:
    async def run() -> list[Any]:
        args = AsyncEngineArgs(
            model=LLAMA, max_model_len=4096, gpu_memory_utilization=0.9, disable_log_stats=False,
            kv_cache_memory_bytes=4_000_000,
        )  # fmt: skip
        llm = AsyncLLMEngine.from_engine_args(args)
        sampling = SamplingParams(temperature=0.7, max_tokens=8)
        tasks: list[Any] = [llm.generate(f"Prompt {i}", sampling, request_id=random_uuid()) for i in range(5)]
        results = await asyncio.gather(*tasks)
        llm.shutdown()
        return list(results)

    assert [len(result.outputs) for result in asyncio.run(run())] == [1] * 5
