"""The command line of ``kvpage serve``: what is typed, what a file says, what the environment says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpage.flags.parser import UsageError
from kvpage_server.command_line import read_flags
from kvpage_server.server_flags import engine_keywords, listening_of, make_parser, settings_of
from kvpage_server.vllm_flag_table import IMPLEMENTED


def read(*words: str) -> Any:
    return read_flags(make_parser(), words)


def test_a_command_line_of_vllm_is_understood() -> None:
    flags = read(
        "org/model", "--host", "0.0.0.0", "--port", "9000", "--api_key", "a", "b", "--served-model-name", "x", "y",
        "--max-model-len", "4k", "--gpu-memory-utilization", "0.9", "--enforce-eager", "--trust-remote-code",
        "--tensor-parallel-size", "1", "--dtype", "half", "--no-enable-prefix-caching",
    )  # fmt: skip
    settings, listening = settings_of(flags, {}), listening_of(flags, {})
    assert settings.model_names == ("x", "y")
    assert settings.model_path == "org/model"
    assert settings.api_keys == ("a", "b")
    assert (listening.host, listening.port, listening.open_to_all) == ("0.0.0.0", 9000, True)
    assert engine_keywords(flags) == {
        "max_model_len": 4000, "gpu_memory_utilization": 0.9, "enforce_eager": True, "trust_remote_code": True,
        "tensor_parallel_size": 1, "dtype": "half", "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip


def test_the_server_is_local_and_serves_the_demo_unless_told_otherwise() -> None:
    flags = read()
    listening = listening_of(flags, {})
    assert (listening.host, listening.port, listening.open_to_all) == ("127.0.0.1", 8000, False)
    assert settings_of(flags, {}).model_names == ("demo",)


def test_the_environment_gives_host_port_and_key_where_no_flag_does() -> None:
    environment = {"KVPAGE_HOST": "::", "KVPAGE_PORT": "81", "KVPAGE_API_KEY": "k"}
    assert listening_of(read(), environment).host == "::"
    assert listening_of(read(), environment).port == 81
    assert listening_of(read("--port", "82"), environment).port == 82
    assert settings_of(read(), environment).api_keys == ("k",)
    assert settings_of(read("--api-key", "typed"), environment).api_keys == ("typed",)
    assert settings_of(read(), {"KVPAGE_API_KEY": ""}).api_keys == ()


@pytest.mark.parametrize("group", IMPLEMENTED)
def test_every_flag_that_the_table_calls_implemented_is_there(group: Any) -> None:
    known = make_parser().actions_by_flag()
    assert [name for name in group.names() if name not in known and name != "--log-level"] == []


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: from-file\nport: 81\nmax_model_len: 2k\napi-key: [a, b]\nenable_prefix_caching: false\n"
        "enforce-eager: true\nallowed-origins: ['*']\nswap_space: 4\nhost: null\n",
        encoding="utf-8",
    )
    flags = read("--config", str(file), "--port", "82")
    assert settings_of(flags, {}).model_path == "from-file"
    assert settings_of(flags, {}).api_keys == ("a", "b")
    assert settings_of(flags, {}).allowed_origins == ("*",)
    assert listening_of(flags, {}).port == 82
    assert engine_keywords(flags)["enable_prefix_caching"] is False
    assert engine_keywords(flags)["max_model_len"] == 2000
    assert settings_of(read("typed", f"--config={file}"), {}).model_path == "typed"
    assert settings_of(read("--config", str(file), "--api-key", "c"), {}).api_keys == ("c",)


@pytest.mark.parametrize(
    ("content", "text"),
    [("prot: 8000", "did you mean port?"), ("- port", "one flag and its value"), ("a: [", "cannot be read"),
     ("config: other.yaml", "cannot name another"), ("pipeline-parallel-size: 2", "pipeline parallelism")],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=text):
        read("--config", str(file))


def test_flags_that_mean_nothing_here_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    flags = read(
        "--swap-space", "4", "demo", "--enable-prompt-tokens-details", "--stream-interval=1", "--port", "81"
    )
    assert settings_of(flags, {}).model_path == "demo"
    assert listening_of(flags, {}).port == 81
    assert [record.args[0] for record in caplog.records if record.args] == [
        "--swap-space", "--enable-prompt-tokens-details", "--stream-interval",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--pipeline-parallel-size", "2"], "pipeline parallelism has not landed yet"),
        (["--prot", "81"], "did you mean --port"),
        (["\u2013port", "81"], "en dash"),
        (["--port", "99999"], "0 to 65535"),
        (["--api-key", ""], "--api-key is empty"),
        (["--enable-admin"], "--enable-admin needs --api-key"),
        (["--enable-auto-tool-choice"], "needs --tool-call-parser"),
        (["--ssl-keyfile", "a"], "belong together"),
        (["--shutdown-timeout", "-1"], "at least 0"),
        (["--max-body-bytes", "0"], "at least 1"),
        (["a", "--model", "b"], "two models"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_way_out(words: list[str], text: str) -> None:
    def read_all() -> None:
        flags = read(*words)
        settings_of(flags, {})
        listening_of(flags, {})

    with pytest.raises(UsageError, match=text):
        read_all()
