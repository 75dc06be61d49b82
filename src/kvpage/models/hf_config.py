"""A typed reader of config.json and generation_config.json: stdlib only, and no one else's config classes.

It reads what transformers 4 and 5 write: ``rope_theta`` + ``rope_scaling`` or ``rope_parameters``, ``torch_dtype``
or ``dtype``, and the text part of a multimodal config under ``text_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from kvpage.api.checkpoint import read_config, read_json_object
from kvpage.errors import CheckpointError

T = TypeVar("T")
D = TypeVar("D")

LARGEST = 2**62
MAX_LAYERS = 10_000


class _Required:
    """The type of ``get``'s default where a key must be there."""


_REQUIRED = _Required()


class HFConfig:
    """One checkpoint's config; every read says what type it expects.

    ``source`` names the file (or object) in error messages. A key that holds null counts as absent, except to
    ``in``.
    """

    def __init__(
        self, data: Mapping[str, Any], *, source: str = "config", own_names: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self._own_names = own_names or {}
        text = data.get("text_config")
        merged = dict(data)
        if isinstance(text, Mapping):
            merged.update(text)
            if "architectures" in data:
                merged["architectures"] = data["architectures"]
        self._data = merged

    @classmethod
    def from_folder(cls, folder: Path) -> HFConfig:
        """Read ``folder``/config.json, and what older tools wrote beside it (``read_config``).

        Raises:
            CheckpointError: no such file, not JSON, not an object.
        """
        return cls(read_config(folder), source=str(folder / "config.json"))

    @classmethod
    def from_object(cls, config: Any) -> HFConfig:
        """Read a transformers config object."""
        return cls(config.to_dict(), source=type(config).__name__)

    def with_defaults(self, defaults: Mapping[str, Any]) -> HFConfig:
        """The same config, where the keys that it leaves out have a family's own values."""
        return HFConfig({**defaults, **self._data}, source=self.source, own_names=self._own_names)

    def renamed(self, own_names: Mapping[str, str]) -> HFConfig:
        """The same config by the usual keys, of which a family has its own name ({"hidden_size": "n_embd"})."""
        found = {key: self._data[own] for key, own in own_names.items() if own in self._data}
        stated = {key: own for key, own in own_names.items() if own in self._data}
        return HFConfig({**self._data, **found}, source=self.source, own_names=stated)

    def with_values(self, **values: Any) -> HFConfig:
        """The same config, with other values for these keys."""
        other = HFConfig({}, source=self.source)
        other._data = {**self._data, **values}
        return other

    def __contains__(self, key: str) -> bool:
        return key in self._data

    @overload
    def get(self, kind: type[T], key: str) -> T: ...

    @overload
    def get(self, kind: type[T], key: str, default: D) -> T | D: ...

    def get(self, kind: type[Any], key: str, default: Any = _REQUIRED) -> Any:
        """The value of ``key`` as ``kind`` (int, float, bool, str, list, dict).

        An int is also a float, and a whole float an int; a bool is neither.

        Raises:
            CheckpointError: the key is absent and has no default, or holds another type.
        """
        value = self._data.get(key)
        if value is None:
            if isinstance(default, _Required):
                raise CheckpointError(f"{self.source}: key {key!r} is missing; expected: {kind.__name__}")
            return default
        return self.typed(kind, key, value)

    def typed(self, kind: type[Any], key: str, value: Any) -> Any:
        """``value`` as ``kind``; ``key`` is where it was found, for the message."""
        key = self._own_names.get(key, key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if kind is float and number:
            return float(value)
        if kind is int and number and value == int(value):
            return int(value)
        if kind not in (int, float) and isinstance(value, kind):
            return value
        raise CheckpointError(
            f"{self.source}: key {key!r} must be of type {kind.__name__}, found {value!r:.80}"
        )

    def count(self, key: str, default: int | None = None, *, at_most: int = 2**31) -> int:
        """A whole number from 1 to ``at_most`` (a size); absent with ``default=None`` is an error."""
        value = self.get(int, key) if default is None else self.get(int, key, default)
        if not 1 <= value <= at_most:
            limit = "at least 1" if value < 1 else f"at most {at_most}"
            name = self._own_names.get(key, key)
            raise CheckpointError(f"{self.source}: key {name!r} must be {limit}, found {value}")
        return value

    @property
    def num_layers(self) -> int:
        """``num_hidden_layers``."""
        return self.count("num_hidden_layers", at_most=MAX_LAYERS)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names the checkpoint states ("LlamaForCausalLM"); may be empty."""
        return tuple(self.typed(str, "architectures", name) for name in self.get(list, "architectures", []))

    @property
    def model_type(self) -> str | None:
        """transformers' model_type ("llama")."""
        return self.get(str, "model_type", None)

    @property
    def dtype(self) -> str | None:
        """The dtype the checkpoint was saved in ("bfloat16"), from ``dtype`` or ``torch_dtype``."""
        value = self.get(str, "dtype", None) or self.get(str, "torch_dtype", None)
        return None if value is None else value.removeprefix("torch.")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, by config.json; generation_config.json may say otherwise."""
        return token_ids(self._data.get("eos_token_id"))

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        ids = token_ids(self._data.get("bos_token_id"))
        return ids[0] if ids else None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """``quantization_config`` as it stands; ``None`` for plain weights."""
        found = self.get(dict, "quantization_config", None)
        return None if found is None else dict(found)

    def rope_parameters(
        self, layer_type: str | None = None, *, default_theta: float = 10000.0
    ) -> dict[str, Any]:
        """What the checkpoint says about rope, in transformers 5's form, at least rope_type and rope_theta.

        Args:
            layer_type: which entry to read where there is one a layer type ("full_attention").
            default_theta: the family's own where the checkpoint does not say.
        """
        found = self.get(dict, "rope_parameters", None) or self.get(dict, "rope_scaling", None) or {}
        nested = {key: value for key, value in found.items() if isinstance(value, Mapping)}
        if nested:
            if layer_type not in nested:
                raise CheckpointError(
                    f"{self.source}: rope_parameters has {', '.join(sorted(nested))}, not {layer_type!r}"
                )
            found = dict(nested[layer_type])
        values = {key: value for key, value in found.items() if value is not None}
        values["rope_type"] = self.typed(
            str, "rope_type", values.get("rope_type", values.get("type", "default"))
        )
        values.pop("type", None)
        theta = values.get("rope_theta")
        values["rope_theta"] = (
            self.get(float, "rope_theta", default_theta)
            if theta is None
            else self.typed(float, "rope_theta", theta)
        )
        partial = self.get(float, "partial_rotary_factor", None)
        if partial is not None:
            values.setdefault("partial_rotary_factor", partial)
        trained = self.get(int, "original_max_position_embeddings", None)
        if trained is not None:
            values["original_max_position_embeddings"] = trained
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """Sampling defaults that a checkpoint states in generation_config.json; ``None`` = it does not say."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read ``folder``/generation_config.json; a missing or unreadable file states nothing."""
        try:
            return cls.from_dict(read_json_object(folder / "generation_config.json"))
        except CheckpointError:
            return cls()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationDefaults:
        """Read the keys above; a value of another type states nothing."""

        def number(key: str) -> float | None:
            value = data.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
                return float(value)
            return None

        def whole(key: str) -> int | None:
            value = number(key)
            return int(value) if value is not None and value.is_integer() else None

        return cls(
            temperature=number("temperature"),
            top_k=whole("top_k"),
            top_p=number("top_p"),
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty"),
            eos_token_ids=token_ids(data.get("eos_token_id")),
        )


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids of a config value that may be one id, a list of ids, null or junk; junk gives ()."""
    values = value if isinstance(value, list) else [value]
    return tuple(
        item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0
    )
