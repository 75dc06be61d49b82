"""``kvpage quantize`` with the real auto-gptq and autoawq: what they make is loaded here, bit for bit, and is good."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvpage import Engine, SamplingParams, demo
from kvpage.demo.corpus import documents
from kvpage.testing import dequantize_checkpoint
from kvpage_quantize import gptq
from kvpage_quantize.command import run
from kvpage_quantize.decoder_layers import load_model
from kvpage_quantize.gptq_package import load_package
from kvpage_quantize.report import StepBar
from kvpage_quantize.settings import GptqSettings
from kvpage_quantize.source import open_source
from tiny_checkpoint import write_checkpoint

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FEW = ["--calibration-samples", "8", "--sequence-length", "64"]
GPTQ = {
    "4 bit": ["--group-size", "32"],
    "4 bit asymmetric act-order": ["--group-size", "32", "--desc-act", "--no-sym"],
    "2 bit": ["--bits", "2", "--group-size", "32"],
    "3 bit asymmetric": ["--bits", "3", "--group-size", "64", "--no-sym"],
    "8 bit a whole row": ["--bits", "8", "--group-size", "-1"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", seed=5, **SIZES)


def quantized(source: object, out: Path, *flags: str) -> Path:
    assert run([str(source), "--out", str(out), *flags]) == 0
    return out


def gptq_modules(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight [out, in]) by the package's own module: its forward of the identity."""
    config = json.loads((folder / "quantize_config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    packer = load_package().packer
    for name in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        inputs, outputs = len(tensors[f"{name}.g_idx"]), tensors[f"{name}.qweight"].shape[1]
        module = packer(config["bits"], config["group_size"], inputs, outputs, False)
        for key in ("qweight", "qzeros", "g_idx"):
            setattr(module, key, tensors[f"{name}.{key}"])
        module.scales = tensors[f"{name}.scales"].float()
        yield f"{name}.weight", module(torch.eye(inputs)).t()


def awq_modules(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight [out, in]) by the package's own unpacker."""
    packing = importlib.import_module("awq.utils.packing_utils")
    size = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    tensors = load_file(folder / "model.safetensors")
    for name in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        codes = packing.unpack_awq(tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"], 4)
        weight, zeros = (part & 15 for part in packing.reverse_awq_order(*codes, 4))
        scales = tensors[f"{name}.scales"].float().repeat_interleave(size, 0)
        yield f"{name}.weight", ((weight - zeros.repeat_interleave(size, 0)).float() * scales).t()


def model_of(folder: Path) -> Any:
    """transformers' model with what the checkpoint's tensors stand for, in float32."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    ).float()
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    state = {**tensors, **dict(dequantize_checkpoint(folder))}
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, strict=False)
    model.tie_weights()
    return model.eval()


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    with Engine(str(folder), dtype="float32") as engine:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        return list(engine.generate([prompt], params)[0].outputs[0].token_ids)


def assert_same_answers(folder: Path) -> None:
    prompt = [1, 40, 77, 123, 9]
    with torch.no_grad():
        expected = model_of(folder).generate(
            torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
        )
    assert greedy(folder, prompt, 20) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("flags", GPTQ.values(), ids=GPTQ)
def test_gptq_checkpoints_stand_for_what_the_package_reads_in_them(
    flags: list[str], plain: Path, tmp_path: Path
) -> None:
    folder = quantized(plain, tmp_path / "out", "--method", "gptq", *flags, *FEW)
    found = dict(dequantize_checkpoint(folder))
    own = dict(gptq_modules(folder))
    assert len(own) == 14
    for name, weight in own.items():
        assert found[name].equal(weight), name
    assert_same_answers(folder)


def test_awq_checkpoints_stand_for_what_the_package_reads_in_them(plain: Path, tmp_path: Path) -> None:
    folder = quantized(plain, tmp_path / "out", "--method", "awq", "--group-size", "32", *FEW)
    found = dict(dequantize_checkpoint(folder))
    own = dict(awq_modules(folder))
    assert len(own) == 14
    for name, weight in own.items():
        assert found[name].equal(weight), name
    assert_same_answers(folder)


def test_awq_keeps_the_model_but_for_rounding(plain: Path, tmp_path: Path) -> None:
    """Scales that are folded into one layer are taken out of the next: autoawq's own search forgets it on a CPU."""
    folder = quantized(plain, tmp_path / "out", "--method", "awq", "--group-size", "32", *FEW)
    before, after = load_file(plain / "model.safetensors"), load_file(folder / "model.safetensors")
    found = dict(dequantize_checkpoint(folder))
    for layer in range(2):
        up, down = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("up", "down"))
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        folded = after[norm].float() / before[norm]
        rows = ((found[up] * folded) * before[up]).sum(1) / before[up].square().sum(1)
        columns = (found[down] * before[down]).sum(0) / before[down].square().sum(0)
        torch.testing.assert_close(rows * columns, torch.ones_like(rows), rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore")  # of packages that are not developed any further
def test_the_driver_solves_what_auto_gptqs_own_solves(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's own rounding of scales, every tensor is that of its own ``quantize()``."""
    modeling = importlib.import_module("auto_gptq.modeling._base")
    llama = importlib.import_module("auto_gptq.modeling.llama")
    monkeypatch.setattr(modeling, "CUDA_0", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *unused: None)
    monkeypatch.setattr(gptq, "stored_quantizer", lambda base: base)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 300, (8, 64), generator=generator).tolist()
    source = open_source(str(plain))
    with StepBar() as bar:
        ours = gptq.quantize_gptq(source, GptqSettings(group_size=32), tokens, load_package(), bar)
    config = modeling.BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    theirs = llama.LlamaGPTQForCausalLM(load_model(source).float(), False, config)
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    theirs.quantize(examples, cache_examples_on_gpu=False)
    state = theirs.model.state_dict()
    for name, tensors in ours.modules.items():
        for key in ("qweight", "qzeros", "g_idx"):
            assert state[f"{name}.{key}"].equal(tensors[key]), f"{name}.{key}"
        assert state[f"{name}.scales"].half().equal(tensors["scales"])


def test_a_group_of_positive_weights_survives_asymmetric_gptq(plain: Path, tmp_path: Path) -> None:
    """Its zero point would be 0, which the format cannot hold, and the package's packer smears over its neighbours."""
    source = write_checkpoint(tmp_path / "source", seed=5, **SIZES)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3] = tensors[name][3].abs() + 0.01
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    folder = quantized(source, tmp_path / "out", "--method", "gptq", "--group-size", "32", "--no-sym", *FEW)
    found = dict(dequantize_checkpoint(folder))[name]
    assert (found - tensors[name]).norm() < 0.15 * tensors[name].norm()


@pytest.fixture(scope="module")
def loss_of() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    texts = []
    for segments, _ in zip(documents(1000), range(1000), strict=False):
        pieces = [(tokenizer.encode(s.text, add_special_tokens=False).ids, s.weight > 0) for s in segments]
        texts.append(([i for ids, _ in pieces for i in ids], [c for ids, c in pieces for _ in ids]))

    def loss(model: Any) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for ids, counted in texts:
                logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                nats = -logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                total += float(nats[torch.tensor(counted[1:])].sum())
                count += sum(counted[1:])
        return total / count

    return loss


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_bundled_model_is_nearer_than_rounding_to_nearest_and_within_five_percent(
    method: str, loss_of: Any, tmp_path: Path
) -> None:
    nearest = importlib.import_module("quantization_quality").round_to_nearest
    folder = quantized("demo", tmp_path / "out", "--method", method, "--group-size", "32")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.path()).float().eval()
    plain = loss_of(model)
    rounded = {
        name: nearest(tensor, 4, 32, method == "gptq") if ".layers." in name and tensor.dim() == 2 else tensor
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(rounded)
    found, bar = loss_of(model_of(folder)), loss_of(model)
    assert found < bar, f"plain {plain:.5f}, quantized {found:.5f}, nearest {bar:.5f} nats"
    assert found - plain < 0.0488  # a perplexity 5 % above
