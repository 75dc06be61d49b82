"""The tokenizer in a GGUF's metadata as a tokenizer.json and a tokenizer_config.json.

Two kinds: "gpt2" is byte-level BPE with its merges, cut into words by a pattern that the file names; "llama" is
SentencePiece's BPE, whose merges follow from the scores of its pieces. What the file leaves out is as in llama.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kvpage import CheckpointError
from kvpage_gguf.container import GGUFFile

LOG = logging.getLogger("kvpage")
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Values of token_type; 1 is an ordinary token."""

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TEMPLATE = "tokenizer.chat_template"
WAY_OUT = "give tokenizer=... (a folder that has one), or skip_tokenizer_init=True and prompts as token ids"
SPACE = "\u2581"
LONGEST_PIECE = 1024
"""Of SentencePiece's, in characters: each takes as many steps as it has pairs of parts."""
GEMMAS = ("gemma", "gemma2", "gemma3")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_REST_WITH_SLASH}"
GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_REST_WITH_SLASH}"

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo")
PATTERNS: Mapping[str, str] = {
    **dict.fromkeys((*LLAMA3_NAMES, "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(QWEN2_NAMES, QWEN2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), GPT4O),
}
"""tokenizer.ggml.pre -> what matches one word."""

GPT2 = ("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion")
"""Those of GPT-2's pattern, which `tokenizers` has built in."""
SINGLE_DIGITS = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
"""The same, digits one by one."""
WHOLE_WORDS = (*LLAMA3_NAMES, "tekken")
"""A word that is a token is taken whole, without merges; by default a text begins with BOS."""


def tokenizer_json(file: GGUFFile) -> str | None:
    """The text of a tokenizer.json; ``None`` where the file has no tokenizer.

    Raises:
        CheckpointError: a kind of tokenizer that kvpage does not read, or keys that contradict each other.
    """
    kind = file.get("tokenizer.ggml.model", str)
    if kind is None or TOKENS not in file:
        return None
    if kind not in ("gpt2", "llama"):
        raise file.error(
            f"key 'tokenizer.ggml.model' is {kind!r:.40}; kvpage reads gpt2 and llama: {WAY_OUT}"
        )
    tokens: list[str] = file.array(TOKENS, str)
    types: list[int] = file.array(TOKEN_TYPES, int) or [1] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise file.error(
            f"{len(tokens)} tokens and {len(types)} values of {TOKEN_TYPES}; they must be as many"
        )
    try:
        backend = (_byte_level if kind == "gpt2" else _sentencepiece)(file, tokens, types)
        _add_tokens(backend, tokens, types)
        _surround(file, backend, tokens)
        return str(backend.to_str())
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # the library raises plain Exception
        raise file.error(f"tokenizer.ggml.* makes no tokenizer ({error}): {WAY_OUT}") from error


def tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    """Special tokens and chat templates, under the keys of a tokenizer_config.json."""
    tokens: list[str] = file.array(TOKENS, str)
    config: dict[str, Any] = {}
    for key, name in SPECIAL.items():
        token = _stated_id(file, name, len(tokens))
        if token is not None:
            config[key] = tokens[token]
    templates = {"default": file.get(TEMPLATE, str)}
    for name in file.array("tokenizer.chat_templates", str):
        templates[name] = file.get(f"{TEMPLATE}.{name}", str)
    found = {name: text for name, text in templates.items() if text is not None}
    if found:
        config["chat_template"] = (
            found["default"]
            if list(found) == ["default"]
            else [{"name": name, "template": text} for name, text in found.items()]
        )
    return config


def _stated_id(file: GGUFFile, name: str, tokens: int) -> int | None:
    """The id under tokenizer.ggml.NAME_token_id; llama.cpp writes -1 or 2**32 - 1 for none."""
    key = f"tokenizer.ggml.{name}_token_id"
    found: int | None = file.get(key, int)
    if found is None or found in (-1, 2**32 - 1) or not tokens:
        return None
    if not 0 <= found < tokens:
        raise file.error(f"key {key!r} is {found}; there are {tokens} tokens: {WAY_OUT}")
    return found


def _byte_level(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """BPE over bytes, each spelled as a letter."""
    pre = file.get("tokenizer.ggml.pre", str)
    merges = [_pair(file, index, text) for index, text in enumerate(file.array("tokenizer.ggml.merges", str))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    steps: list[Any] = []
    if pre in PATTERNS:
        steps.append(pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated"))
    elif pre in SINGLE_DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif pre not in GPT2:
        LOG.warning(
            "%s: tokenizer.ggml.pre is %r, unknown to kvpage; text is cut into words as by GPT-2",
            file.path,
            pre,
        )
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in PATTERNS))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in QWEN2_NAMES:  # text is brought to Unicode's NFC first
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(file: GGUFFile, index: int, text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if not left or not right or " " in right:
        raise file.error(
            f"tokenizer.ggml.merges: element {index} is {text!r:.40}, expected two tokens: {WAY_OUT}"
        )
    return left, right


def _sentencepiece(file: GGUFFile, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    """BPE over characters with bytes for those that are no token."""
    gemma = file.get("general.architecture", str) in GEMMAS
    if gemma:  # runs of spaces are stored as such
        tokens[:] = [
            SPACE * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens
        ]
    scores: list[float] = file.array("tokenizer.ggml.scores", float)
    if (
        gemma or not scores
    ):  # pieces in the order in which they were found; Gemma's scores are not of that order
        scores = [-float(index) for index in range(len(tokens))]
    if len(scores) != len(tokens):
        raise file.error(
            f"{len(tokens)} tokens and {len(scores)} tokenizer.ggml.scores; they must be as many"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = _stated_id(file, "unknown", len(tokens))
    if unknown is None:
        unknown = next((index for index, kind in enumerate(types) if kind == UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list(_implied_merges(tokens, scores, types, vocabulary)),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = not gemma and file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend


def _implied_merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The merges that make each piece of any two: those of the best score first."""

    def merges() -> Iterator[tuple[float, int, str, str]]:
        for index, token in enumerate(tokens):
            if types[index] in (CONTROL, UNKNOWN, UNUSED, BYTE) or len(token) > LONGEST_PIECE:
                continue
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocabulary and right in vocabulary:
                    yield -scores[index], vocabulary[left], left, right

    return [(left, right) for _, _, left, right in sorted(merges(), key=lambda merge: merge[:2])]


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Those that are found in text before it is cut: control tokens, which decoding may leave out, and users' own."""
    added = [
        AddedToken(token, normalized=False, special=kind in (CONTROL, UNKNOWN))
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and token)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _surround(file: GGUFFile, backend: Tokenizer, tokens: Sequence[str]) -> None:
    """BOS before and EOS after a text, where the file (or its kind's default) says so."""
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    default = kind == "llama" or pre in WHOLE_WORDS
    around: dict[str, list[tuple[str, int]]] = {}
    for name, stated in (("bos", default), ("eos", False)):
        index = _stated_id(file, name, len(tokens))
        wanted = file.get(f"tokenizer.ggml.add_{name}_token", bool, stated)
        around[name] = [(tokens[index], index)] if wanted and index is not None else []
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
    if used := around["bos"] + around["eos"]:
        template = [*(token for token, _ in around["bos"]), "$A", *(token for token, _ in around["eos"])]
        steps.append(processors.TemplateProcessing(single=template, special_tokens=used))
    if steps:
        backend.post_processor = processors.Sequence(steps)
