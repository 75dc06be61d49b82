"""Prompts in the four shapes that OpenAI's clients send: text, texts, token ids, lists of token ids."""

from __future__ import annotations

from typing import Any

from kvpage_server.errors import bad_request
from kvpage_server.service import Service


def given_prompts(prompt: Any, service: Service, field: str) -> list[str | list[int]]:
    """The prompts in the order of the request; ``field`` is what the request calls them.

    Raises:
        ApiError: 400, they have none of these shapes, or are too many.
    """
    wrong = f"{field} must be text, a list of texts, a list of token ids or a list of such lists"
    if isinstance(prompt, str):
        return [prompt]
    if prompt is None or not isinstance(prompt, list):
        raise bad_request(wrong if prompt is not None else f"{field} is missing: " + wrong, field)
    if not prompt:
        raise bad_request(f"{field} is an empty list: " + wrong, field)
    if all(type(token) is int for token in prompt):
        return [prompt]
    if len(prompt) > service.settings.max_prompts:
        raise bad_request(
            f"{field} holds {len(prompt)} prompts, the limit is {service.settings.max_prompts}: "
            "send fewer at once",
            field,
        )
    if all(isinstance(text, str) for text in prompt):
        return prompt
    if all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in prompt):
        return prompt
    raise bad_request(wrong, field)
