"""One tokenizer object for the engine, whatever it is read from: tokenizer.json itself, or transformers."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from kvpage.errors import CheckpointError, RequestError
from kvpage.text.pieces import PieceTable, read_pieces

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model", "tekken.json")
WAY_OUT = "give tokenizer=... (a folder that has one), or skip_tokenizer_init=True and prompts as token ids"


class Tokenizer(ABC):
    """Text to token ids and back. Every method may be called from several threads.

    Attributes:
        vocab_size: number of tokens, added ones included.
        bos_token_id, eos_token_id: ``None`` where the tokenizer names none.
        all_special_ids: ids that ``skip_special_tokens`` leaves out.
        special_tokens: "bos_token", "eos_token" ... -> text, as chat templates want them.
        chat_templates: template sources by name; "default" is the usual one, "tool_use" for requests with tools.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, or the only one there is."""
        if len(self.chat_templates) == 1:
            return next(iter(self.chat_templates.values()))
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    def chat_template_for(self, *, tools: bool) -> str | None:
        """The template for a request with or without tools, as transformers picks it: "tool_use" where there is one."""
        return self.chat_templates.get(TOOL_TEMPLATE, self.chat_template) if tools else self.chat_template

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, never truncated or padded.

        Args:
            text: any text; special tokens written out in it are recognised.
            add_special_tokens: put BOS / EOS around it where the tokenizer says so.

        Raises:
            RequestError: not a string, or it holds a lone surrogate (``param="prompt"``).
        """

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` of each text.

        One after the other on purpose: the batch call of `tokenizers` starts a thread pool for the whole process,
        which outlives the call and makes the host's next fork warn or hang.
        """
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    @abstractmethod
    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of token ids, as transformers' ``decode``; ids without a token are left out."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """What one token adds in the middle of a text, special tokens shown; for logprobs.

        So " hello" for Llama 2's "▁hello", where ``decode([id])`` would drop the space. Bytes that are no code
        point by themselves read as U+FFFD.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes that one token adds in the middle of a text; ``None`` where that is not known."""

    def pieces(self, *, skip_special_tokens: bool) -> PieceTable | None:
        """Per-token pieces for incremental decoding; ``None`` where the tokenizer cannot be taken apart."""
        return None


class FastTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        backend: used as it is and never changed. Truncation or padding that its owner switches on is kept out by
            a private copy.
        special_tokens, chat_templates: see ``Tokenizer``.
    """

    def __init__(
        self, backend: Backend, *, special_tokens: Mapping[str, str], chat_templates: Mapping[str, str]
    ) -> None:
        self._backend = backend
        self._untruncated: Backend | None = None
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        self.bos_token_id = self._token_id("bos_token")
        self.eos_token_id = self._token_id("eos_token")
        special = {
            index: token.content
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.all_special_ids = frozenset(special)
        self._shown = read_pieces(backend, frozenset())
        self._skipping = read_pieces(backend, frozenset(special.values()))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        backend = self._backend
        if backend.truncation is not None or backend.padding is not None:
            backend = self._without_limits()
        try:
            return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise unreadable_text(text) from error

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        if self._shown is None:
            return str(self._backend.decode([token_id], skip_special_tokens=False))
        piece = self._shown[token_id]
        return piece.decode("utf-8", "replace") if isinstance(piece, bytes) else piece or ""

    def token_bytes(self, token_id: int) -> bytes | None:
        if self._shown is None:
            return None
        piece = self._shown[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def pieces(self, *, skip_special_tokens: bool) -> PieceTable | None:
        return self._skipping if skip_special_tokens else self._shown

    def _token_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _without_limits(self) -> Backend:
        if self._untruncated is None:
            backend = copy.deepcopy(self._backend)
            backend.no_truncation()
            backend.no_padding()
            self._untruncated = backend
        return self._untruncated


class SlowTokenizer(Tokenizer):
    """A tokenizer object of transformers that has no `tokenizers` backend, used through its methods."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.all_special_ids = frozenset(tokenizer.all_special_ids)
        self.special_tokens = _special_tokens_of(tokenizer)
        self.chat_templates = named_templates(tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str) or _surrogate(text) is not None:
            raise unreadable_text(text)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        return str(
            self._tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        )

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes | None:
        return None


def load_tokenizer(
    path: str | PathLike[str],
    *,
    mode: Literal["auto", "slow"] = "auto",
    trust_remote_code: bool = False,
    tokenizer_json: str | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer of a model folder.

    tokenizer.json is the truth: its normalizer, pre-tokenizer, post-processor and decoder are used as they stand,
    whatever class tokenizer_config.json names, and as in transformers 5 its post-processor decides about BOS and
    EOS, not ``add_bos_token`` / ``add_eos_token``. Stored truncation and padding are switched off.

    Args:
        path: a folder, or a tokenizer.json file.
        mode: "slow" goes through transformers even where there is a tokenizer.json.
        trust_remote_code: let transformers run the folder's own tokenizer code.
        tokenizer_json: what stands in for the folder's tokenizer.json, whatever ``mode`` is.
        tokenizer_config: what then stands in for its tokenizer_config.json and template files.

    Raises:
        CheckpointError: no tokenizer there, or one that cannot be read.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise CheckpointError(f"no tokenizer: {folder} is not a folder: {WAY_OUT}")
    if tokenizer_json is not None and tokenizer_config is not None:
        return _load_own(tokenizer_json, tokenizer_config)
    config = _read_json(folder / CONFIG_FILE)
    if tokenizer_json is not None or (mode == "auto" and (folder / TOKENIZER_FILE).is_file()):
        return _load_fast(folder, config, tokenizer_json)
    return _load_slow(folder, config, trust_remote_code)


def wrap_tokenizer(transformers_tokenizer: Any) -> Tokenizer:
    """A tokenizer object of transformers as kvpage's; a fast one shares its backend, which is not changed."""
    if isinstance(transformers_tokenizer, Tokenizer):
        return transformers_tokenizer
    backend = getattr(transformers_tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        return SlowTokenizer(transformers_tokenizer)
    return FastTokenizer(
        backend,
        special_tokens=_special_tokens_of(transformers_tokenizer),
        chat_templates=named_templates(transformers_tokenizer.chat_template),
    )


def _load_own(text: str, config: Mapping[str, Any]) -> Tokenizer:
    """From what a checkpoint's own file holds."""
    backend = _read_backend("the tokenizer that the checkpoint holds", text)
    found = {name: _special_token(name, value) for name, value in config.items()}
    special_tokens = {name: token for name, token in found.items() if token}
    _add_missing_tokens(backend, config, special_tokens)
    return FastTokenizer(
        backend, special_tokens=special_tokens, chat_templates=named_templates(config.get("chat_template"))
    )


def _read_backend(file: Path | str, text: str | None) -> Backend:
    """From ``text`` or, where that is ``None``, from ``file``."""
    try:
        backend = Backend.from_file(str(file)) if text is None else Backend.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} cannot be read ({error}): fetch it again, or {WAY_OUT}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load_fast(folder: Path, config: Mapping[str, Any], text: str | None) -> Tokenizer:
    """From ``text`` or, where that is ``None``, the folder's tokenizer.json."""
    file = folder / TOKENIZER_FILE if text is None else "the tokenizer that the checkpoint holds"
    backend = _read_backend(file, text)
    try:
        return _configured(backend, folder, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} holds an entry of the wrong form ({type(error).__name__}: {error}): "
            f"fetch it again, or {WAY_OUT}"
        ) from error


def _configured(backend: Backend, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with what tokenizer_config.json says about special tokens and templates."""
    if "added_tokens_decoder" not in config:
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
    special_tokens = {name: text for name, value in config.items() if (text := _special_token(name, value))}
    _add_missing_tokens(backend, config, special_tokens)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return FastTokenizer(
        backend, special_tokens=special_tokens, chat_templates=_chat_templates(folder, config)
    )


def _special_token(name: str, value: Any) -> str | None:
    """The text of a ``*_token`` entry, a string or a serialised AddedToken."""
    if not name.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _add_missing_tokens(
    backend: Backend, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Tokens that only the configuration knows, in transformers' order: by id, then named, then extra ones."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda entry: int(entry[0]))
    for _, fields in listed:
        if fields["content"] not in known:
            token = AddedToken(**{name: value for name, value in fields.items() if name != "__type"})
            known[token.content] = token.special
            backend.add_tokens([token])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    entries = extra.values() if isinstance(extra, Mapping) else extra
    texts = [
        *special_tokens.values(),
        *(text for entry in entries if (text := _special_token("_token", entry))),
    ]
    backend.add_special_tokens([text for text in dict.fromkeys(texts) if not known.get(text)])


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files go before tokenizer_config.json's entry, as in transformers."""
    templates: dict[str, str] = {}
    for name, file in _template_files(folder):
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): fetch it again or remove it") from error
    return templates or named_templates(config.get("chat_template"))


def _template_files(folder: Path) -> Iterator[tuple[str, Path]]:
    if (folder / "chat_template.jinja").is_file():
        yield DEFAULT_TEMPLATE, folder / "chat_template.jinja"
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield file.stem, file


def _load_slow(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> Tokenizer:
    own_code = "AutoTokenizer" in (config.get("auto_map") or {})
    if own_code and not trust_remote_code:
        raise CheckpointError(
            f"the tokenizer in {folder} is Python code of its own: set trust_remote_code=True to run it, or {WAY_OUT}"
        )
    if not own_code and not any((folder / name).is_file() for name in (TOKENIZER_FILE, *SLOW_FILES)):
        looked_for = ", ".join((TOKENIZER_FILE, *SLOW_FILES))
        raise CheckpointError(f"no tokenizer in {folder} (looked for {looked_for}): {WAY_OUT}")
    try:
        from transformers import AutoTokenizer  # costs about a second, so only here

        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), use_fast=False, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # anything may be raised: optional packages, damaged files, remote code
        raise CheckpointError(
            f"transformers cannot read the tokenizer in {folder} ({error}): {WAY_OUT}"
        ) from error
    return wrap_tokenizer(tokenizer)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that may be missing (then empty)."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file} must hold a JSON object, holds a {type(content).__name__}: fetch it again"
        )
    return content


def named_templates(template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None) -> dict[str, str]:
    """A ``chat_template`` value in any of transformers' shapes: one source, name -> source, or a list of both."""
    if not template:
        return {}
    if isinstance(template, str):
        return {DEFAULT_TEMPLATE: template}
    if isinstance(template, Mapping):
        return dict(template)
    return {entry["name"]: entry["template"] for entry in template}


def unreadable_text(text: object) -> RequestError:
    """The error for a prompt that no tokenizer can read."""
    if not isinstance(text, str):
        return RequestError(
            f"the prompt must be a string, got {type(text).__name__}: {text!r:.80}", param="prompt"
        )
    index = _surrogate(text)
    if index is None:
        return RequestError(f"the prompt cannot be tokenized: {text!r:.80}", param="prompt")
    return RequestError(
        f"the prompt holds a lone surrogate, {text[index]!r} at character {index}, which is no Unicode text: "
        "remove it, or decode the bytes it came from with errors='replace'",
        param="prompt",
    )


def _surrogate(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _special_tokens_of(transformers_tokenizer: Any) -> dict[str, str]:
    entries = transformers_tokenizer.special_tokens_map.items()
    return {name: str(value) for name, value in entries if not isinstance(value, (list, tuple))}
