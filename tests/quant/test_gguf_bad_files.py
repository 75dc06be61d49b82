"""Damaged and hostile files: each is a CheckpointError that names file and field; nothing large is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import F32, Q8_0, Blob, gguf_bytes, text, value_bytes
from hypothesis import example, given
from hypothesis import strategies as st

from kvpage import CheckpointError
from kvpage_gguf.reader import GGUFReader

KEYS: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 3, "tokenizer.chat_template": "{{ messages }}",
}  # fmt: skip
TENSORS: dict[str, Blob] = {
    "token_embd.weight": (F32, (4, 32), bytes(4 * 32 * 4)),
    "blk.0.attn_q.weight": (Q8_0, (32, 32), bytes(32 * 34)),
    "blk.0.attn_k.weight": (Q8_0, (16, 32), bytes(16 * 34)),
    "output_norm.weight": (F32, (32,), bytes(32 * 4)),
    "rope_freqs.weight": (F32, (8,), struct.pack("<8f", *[1.0] * 8)),
}
GOOD = gguf_bytes(KEYS, TENSORS)
HEADER = len(GOOD) - sum(-(-len(data) // 32) * 32 for _, _, data in TENSORS.values())


def use(path: Path) -> None:
    """Everything that an engine asks of a file."""
    reader = GGUFReader(path)
    reader.config()
    view = reader.weights()
    for name in view.names():
        view.read(name)
    reader.tokenizer()
    reader.tokenizer_config()
    reader.generation_config()


def with_keys(**changes: Any) -> bytes:
    return gguf_bytes({**KEYS, **{key.replace("__", "."): value for key, value in changes.items()}}, TENSORS)


def without(key: str) -> bytes:
    return gguf_bytes({name: value for name, value in KEYS.items() if name != key}, TENSORS)


def with_tensor(name: str, kind: int, shape: tuple[int, ...], data: bytes = bytes(4096)) -> bytes:
    return gguf_bytes(KEYS, {**TENSORS, name: (kind, shape, data)})


def announced(tensors: int, keys: int) -> bytes:
    return GOOD[:8] + struct.pack("<QQ", tensors, keys) + GOOD[24:]


def test_the_file_that_the_others_are_made_of_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(GOOD)
    use(tmp_path / "model.gguf")
    use(tmp_path)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + data


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "another magic": (lambda: b"GGML" + GOOD[4:], "begins with b'GGML'"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "big-endian": (lambda: GOOD[:4] + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
    "version 1": (lambda: gguf_bytes(KEYS, TENSORS, version=1), "GGUF version 1"),
    "version 4": (lambda: gguf_bytes(KEYS, TENSORS, version=4), "GGUF version 4"),
    "absurdly many keys": (lambda: announced(5, 2**60), "announces 1152921504606846976 keys"),
    "absurdly many tensors": (lambda: announced(2**63, 15), "announces 9223372036854775808 tensors"),
    "more tensors than there are": (lambda: announced(9, 15), "truncated or damaged|type|dimensions|UTF-8"),
    "an absurd length of a key's name": (
        lambda: GOOD[:24] + struct.pack("<Q", 2**62) + GOOD[32:], "a key's name has 4611686018427387904 bytes"
    ),
    "an absurd length of a string": (
        lambda: with_keys(general__name=struct.pack("<IQ", 8, 2**40)), "'general.name' has 1099511627776 bytes"
    ),
    "an absurd length of an array of numbers": (
        lambda: with_keys(general__name=array(4, 2**50)), "'general.name' has 1125899906842624 elements"
    ),
    "an absurd length of an array of strings": (
        lambda: with_keys(general__name=array(8, 2**22)), "'general.name' takes|truncated"
    ),
    "an absurd length of an array's string": (
        lambda: with_keys(general__name=array(8, 1, struct.pack("<Q", 2**63))), "takes 9223372036854775808 bytes"
    ),
    "an array of arrays": (lambda: with_keys(general__name=array(9, 1)), "array of arrays"),
    "a value of an unknown type": (lambda: with_keys(general__name=struct.pack("<II", 13, 1)), "type 13"),
    "an array of an unknown type": (lambda: with_keys(general__name=array(77, 1)), "type 77"),
    "a key twice": (
        lambda: gguf_bytes([*KEYS.items(), ("llama.block_count", 1)], TENSORS), "'llama.block_count' comes twice"
    ),
    "a tensor twice": (
        lambda: gguf_bytes(KEYS, [*TENSORS.items(), *list(TENSORS.items())[:1]]), "'token_embd.weight' is described"
    ),
    "a key that is no text": (lambda: gguf_bytes({b"\xff\xfe": 1}, {}), "a key's name is no UTF-8"),  # type: ignore[dict-item]
    "a string that is no text": (lambda: with_keys(general__name=value_bytes("??").replace(b"??", b"\xff\xff")), "UTF-8"),
    "an alignment that is no power of two": (lambda: with_keys(general__alignment=24), "'general.alignment'.*24"),
    "an alignment of 0": (lambda: with_keys(general__alignment=0), "'general.alignment'.*0"),
    "an absurd alignment": (lambda: with_keys(general__alignment=2**31), "'general.alignment'.*2147483648"),
    "an alignment in words": (lambda: with_keys(general__alignment="32"), "'general.alignment' must be one finite int"),
    "a part of a model": (lambda: with_keys(split__count=3), "one of 3 parts.*llama-gguf-split --merge"),
    "an unaligned offset": (
        lambda: gguf_bytes(KEYS, TENSORS, offsets={"blk.0.attn_q.weight": 516}), "'blk.0.attn_q.weight'.*offset 516"
    ),
    "an offset beyond the end": (
        lambda: gguf_bytes(KEYS, TENSORS, offsets={"blk.0.attn_q.weight": 2**62}), "'blk.0.attn_q.weight'.*truncated"
    ),
    "overlapping tensors": (
        lambda: gguf_bytes(KEYS, TENSORS, offsets={"blk.0.attn_q.weight": 32}), "'token_embd.weight'.*attn_q.*overlap"
    ),
    "two tensors at one place": (
        lambda: gguf_bytes(KEYS, TENSORS, offsets={"blk.0.attn_q.weight": 0}), "overlap"
    ),
    "data that is cut off": (lambda: GOOD[:-96], "'rope_freqs.weight'.*truncated|'output_norm.weight'.*truncated"),
    "blocks that do not divide a row": (lambda: with_tensor("x", Q8_0, (4, 33)), "'x' is Q8_0 with 33 inputs.*32"),
    "a K-quant of 128 inputs": (lambda: with_tensor("x", 12, (4, 128)), "'x' is Q4_K with 128 inputs.*256"),
    "IQ2_XXS": (lambda: with_tensor("x", 16, (1, 256)), r"'x' has the type IQ2_XXS \(16\).*Q4_K_M"),
    "TQ1_0": (lambda: with_tensor("x", 34, (1, 256)), r"TQ1_0 \(34\)"),
    "MXFP4": (lambda: with_tensor("x", 39, (1, 32)), r"MXFP4 \(39\)"),
    "NVFP4": (lambda: with_tensor("x", 40, (1, 64)), r"NVFP4 \(40\)"),
    "an unknown type": (lambda: with_tensor("x", 999, (1, 32)), r"unknown \(999\)"),
    "no dimensions": (lambda: with_tensor("x", F32, ()), "'x' has 0 dimensions"),
    "five dimensions": (lambda: with_tensor("x", F32, (1,) * 5), "'x' has 5 dimensions"),
    "a dimension of 0": (lambda: with_tensor("x", F32, (0, 4)), r"'x' has the dimensions \[4, 0\]"),
    "absurd dimensions": (lambda: with_tensor("x", F32, (2**63, 2**63)), "'x' of shape .*truncated"),
    "a quantized norm": (
        lambda: with_tensor("blk.0.attn_norm.weight", Q8_0, (32,)), "'blk.0.attn_norm.weight' is Q8_0"
    ),
    "heads that do not divide": (
        lambda: with_tensor("blk.0.attn_q.weight", Q8_0, (30, 32)), "'blk.0.attn_q.weight' has 30 outputs"
    ),
    "rope factors of another type": (lambda: with_tensor("rope_freqs.weight", 1, (8,)), "'rope_freqs.weight' must be F32"),
    "rope factors of 0": (lambda: with_tensor("rope_freqs.weight", F32, (8,)), "not above 0"),
    "no architecture": (lambda: without("general.architecture"), "'general.architecture' is missing"),
    "an unknown architecture": (
        lambda: with_keys(general__architecture="rwkv7"), "'rwkv7'.*llama, qwen2, qwen3, gemma.*safetensors"
    ),
    "an architecture that is a number": (lambda: with_keys(general__architecture=7), "must be one finite str"),
    "no number of layers": (lambda: without("llama.block_count"), "'llama.block_count' is missing"),
    "heads of each layer": (
        lambda: with_keys(llama__attention__head_count=[2, 2]), "'llama.attention.head_count' is an array"
    ),
    "KV heads of each layer": (
        lambda: with_keys(llama__attention__head_count_kv=[1, 2]), "'llama.attention.head_count_kv' is an array"
    ),
    "no heads": (lambda: with_keys(llama__attention__head_count=0), "'llama.attention.head_count' must be 1 to"),
    "a negative size": (lambda: with_keys(llama__embedding_length=-32), "'llama.embedding_length' must be 1 to"),
    "a size in words": (lambda: with_keys(llama__embedding_length="32"), "'llama.embedding_length'.*found '32'"),
    "an epsilon that is no number": (
        lambda: with_keys(llama__attention__layer_norm_rms_epsilon=float("nan")), "epsilon' must be one finite float"
    ),
    "values of another size than keys": (
        lambda: with_keys(llama__attention__value_length=32), "key_length is 16 and value_length 32"
    ),
    "rope of a part of each head": (lambda: with_keys(llama__rope__dimension_count=8), "dimension_count' is 8"),
    "an unknown rope": (
        lambda: gguf_bytes({**KEYS, "llama.rope.scaling.type": "spiral"},
                           {k: v for k, v in TENSORS.items() if k != "rope_freqs.weight"}), "type' is 'spiral'"
    ),
    "a tokenizer of another kind": (lambda: with_keys(tokenizer__ggml__model="bert"), "'bert'.*reads gpt2 and llama"),
    "tokens that are numbers": (lambda: with_keys(tokenizer__ggml__tokens=[1, 2]), "must be an array of str, found int"),
    "one token instead of an array": (lambda: with_keys(tokenizer__ggml__tokens="a"), "must be an array, found 'a'"),
    "types of fewer tokens": (lambda: with_keys(tokenizer__ggml__token_type=[1]), "4 tokens and 1 values"),
    "a token that is no text": (
        lambda: with_keys(tokenizer__ggml__tokens=array(8, 4, text(b"\xff") * 4)), "element 0 is no UTF-8"
    ),
    "a merge of one token": (lambda: with_keys(tokenizer__ggml__merges=["ab"]), "merges: element 0 is 'ab'"),
    "a merge of strangers": (lambda: with_keys(tokenizer__ggml__merges=["a x"]), "makes no tokenizer"),
    "an end that is no token": (lambda: with_keys(tokenizer__ggml__eos_token_id=4), "eos_token_id' is 4; there are 4"),
    "fewer scores than pieces": (
        lambda: with_keys(tokenizer__ggml__model="llama", tokenizer__ggml__scores=[1.0]), "4 tokens and 1 .*scores"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as refused:
            use(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "model.gguf" in str(refused.value)


def test_a_folder_of_two_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\)"):
        GGUFReader(tmp_path).config()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in range(0, len(GOOD), 5):
        path.write_bytes(GOOD[:size])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            use(path)


def damaged(path: Path, content: bytes) -> None:
    """Reads ``content``: it is a good file still, or a CheckpointError."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        use(path)
    except CheckpointError as refused:
        assert str(path) in str(refused)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**22


@given(flips=st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_do_no_more_than_be_refused(
    flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(GOOD)
    for place, byte in flips:
        content[place] = byte
    damaged(tmp_path_factory.getbasetemp() / "flipped.gguf", bytes(content))


@given(
    place=st.integers(8, HEADER - 8),
    number=st.one_of(
        st.integers(0, 2**64 - 1), st.sampled_from([2**k for k in range(64)]), st.integers(0, 64)
    ),
)
@example(place=16, number=2**64 - 1)
def test_absurd_numbers_do_no_more_than_be_refused(
    place: int, number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = GOOD[:place] + struct.pack("<Q", number) + GOOD[place + 8 :]
    damaged(tmp_path_factory.getbasetemp() / "absurd.gguf", content)


@given(noise=st.binary(max_size=400))
def test_noise_after_the_magic_does_no_more_than_be_refused(
    noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged(tmp_path_factory.getbasetemp() / "noise.gguf", b"GGUF\3\0\0\0" + noise)
