"""``kvpage plan`` answers from config and headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpage import Engine, KvpageError
from kvpage.cli.main import main
from kvpage.flags.engine import add_engine_flags, engine_options
from kvpage.flags.parser import CommandParser


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["plan", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_70b_on_two_80_gb_cards_leaves_about_4_gb(
    llama_2_70b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", llama_2_70b, "--gpu", "80GB", "-tp", "2", "--gpu-memory-utilization", "0.9"]) == 0
    assert "fits: about 4.0 GB left for KV" in capsys.readouterr().out


def test_70b_on_four_40_gb_cards_at_0_8_is_a_no(llama_2_70b: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["plan", llama_2_70b, "--gpu", "40GB", "-tp", "4", "--gpu-memory-utilization", "0.8"])
    assert status == 1
    out = capsys.readouterr().out
    assert "cannot load" in out
    assert all(flag in out for flag in ("--gpu-memory-utilization", "-tp 8", "--quantization awq"))


def test_gb_and_gib_are_kept_apart(llama_2_70b: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, decimal = plan(capsys, llama_2_70b, "--gpu", "80GB", "-tp", "2")
    _, binary = plan(capsys, llama_2_70b, "--gpu", "80GiB", "-tp", "2")
    assert decimal["devices"]["memory"] == 80 * 10**9
    assert binary["devices"]["memory"] == 80 * 2**30
    assert binary["tokens"] > decimal["tokens"]


def test_a_cpu_is_planned_for_too(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, data = plan(capsys, checkpoint, "--device", "cpu", "--memory", "16GiB", "--max-num-seqs", "4")
    assert status == 0
    assert data["devices"] == {"kind": "cpu", "memory": 16 * 2**30, "count": 1}
    assert data["sequences"] == {"256": 4}


def test_the_machine_it_runs_on_is_the_default(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, data = plan(capsys, checkpoint, "--device", "cpu")
    assert status == 0
    assert data["devices"]["memory"] > 2**28


def test_a_plan_says_what_this_version_cannot_run_yet(
    llama_2_70b: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, split = plan(capsys, llama_2_70b, "--gpu", "80GB", "-tp", "2", "--quantization", "awq")
    parts = ["GPUs (--gpu)", "tensor parallelism (-tp)"]
    assert split["cannot_run_yet"] == parts
    _, advised = plan(capsys, llama_2_70b, "--gpu", "40GB", "-tp", "4", "--gpu-memory-utilization", "0.8")
    assert (advised["quantization"], advised["cannot_run_yet"]) == (None, parts)
    _, here = plan(capsys, checkpoint, "--device", "cpu", "--memory", "16GiB")
    assert here["cannot_run_yet"] == []
    main(["plan", llama_2_70b, "--gpu", "80GB", "-tp", "2"])
    assert "cannot run yet: GPUs (--gpu), tensor parallelism (-tp)." in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"device": "cuda"}, {"tensor_parallel_size": 2}, {"quantization": "awq"}]
)
def test_what_a_plan_says_cannot_run_is_refused_by_the_engine(
    checkpoint: str, options: dict[str, Any]
) -> None:
    with pytest.raises(KvpageError):
        Engine(checkpoint, load_format="dummy", num_kv_blocks=8, **options)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--gpu", "80"], "give a unit, such as 80GB"),
        (["--gpu", "many"], "2GiB"),
        (["--gpu", "80GB", "--device", "cpu"], "contradict"),
        (["--gpu", "80GB", "-tp", "3"], "possible are 1, 2, 4, 8"),
        (["--gpu", "80GB", "-tp", "0"], "at least 1"),
        (["--gpu", "80GB", "--max-model-len", "8192"], "4096"),
    ],
)
def test_a_wrong_question_is_status_2_and_says_why(
    llama_2_70b: str, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", llama_2_70b, *arguments]) == 2
    assert word in capsys.readouterr().err


def test_sizes_come_from_the_headers_where_there_are_files(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, estimated = plan(capsys, checkpoint, "--gpu", "24GB")
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "I8", "shape": [vocabulary, 32], "data_offsets": [0, vocabulary * 32]},
         "__metadata__": {"format": "pt"}}
    ).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    _, read = plan(capsys, str(tmp_path), "--gpu", "24GB")
    assert read["weights"]["total"]["embedding"] * 4 == estimated["weights"]["total"]["embedding"]
    assert read["weights"]["total"]["mlp"] == estimated["weights"]["total"]["mlp"]


@pytest.mark.parametrize(
    "content", [b"", b"\x10\x00", b"\xff" * 40, (9).to_bytes(8, "little") + b"[1, 2, 3]", b"\x02" * 64]
)
def test_a_damaged_file_is_named(
    llama_2_70b: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(llama_2_70b) / "model.safetensors").write_bytes(content)
    assert main(["plan", llama_2_70b, "--gpu", "80GB"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_no_torch_is_loaded(llama_2_70b: str) -> None:
    program = (
        "import sys; from kvpage.cli.main import main; "
        f"main(['plan', {llama_2_70b!r}, '--gpu', '80GB', '-tp', '2']); "
        "print('loaded:', *[n for n in ('torch', 'transformers', 'numpy', 'tokenizers') if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.rstrip().endswith("loaded:")


def test_a_hub_id_is_found_in_the_local_cache(
    llama_2_70b: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "hub" / "models--some--llama"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((Path(llama_2_70b) / "config.json").read_bytes())
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    status, data = plan(
        capsys, "some/llama", "--gpu", "80GB", "-tp", "4", "--download-dir", str(cache.parent)
    )
    assert (status, data["model"]) == (0, "some/llama")


@pytest.mark.parametrize(
    "flags",
    [("--kv-cache-memory", "1MiB"), ("--num-kv-blocks", "10"), ("--max-num-seqs", "4", "--block-size", "8"),
     ("--max-num-seqs", "2", "--max-model-len", "100", "--dtype", "bfloat16")],
)  # fmt: skip
def test_the_plan_and_the_engine_choose_the_same_values(
    checkpoint: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    _, data = plan(capsys, checkpoint, "--device", "cpu", "--memory", "16GiB", *flags)
    parser = CommandParser("kvpage test", "")
    add_engine_flags(parser)
    options = engine_options(parser.parse_arguments(flags))
    with Engine(checkpoint, load_format="dummy", **options) as engine:
        run = engine.config
        for name in ("dtype", "kv_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
                     "kv_bytes"):  # fmt: skip
            assert data["resolved"][name] == getattr(run, name), name
        assert tuple(data["resolved"]["num_blocks"]) == run.num_blocks
