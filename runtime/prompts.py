"""Prompts: read from a file, and turned into token ids by a model's tokenizer and chat template.

Knows nothing about ranks.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import ReshardError

from .text import Tokenizer


class Prompt(NamedTuple):
    """`text`: as given, None for token ids and conversations; `echo`: what the printed text begins with."""

    text: str | None
    echo: str
    ids: list[int]


def encoded(
    given: Sequence[Any], tokenizer: Callable[[], Tokenizer], chat: bool | None, seconds: float
) -> tuple[Prompt, ...]:
    """The token ids of every prompt: a text, or a list of token ids or of messages.

    `chat`: whether texts are conversations (None: if there is a chat template). Rendering them may take `seconds`.
    """
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if chat is None:
        chat = bool(texts) and tokenizer().template is not None
    conversations: dict[int, list[dict[str, Any]]] = {}  # by the number of the prompt
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            if chat:
                conversations[number] = [{"role": "user", "content": prompt}]
        elif any(isinstance(part, dict) for part in prompt):
            conversations[number] = prompt
    rendered = iter(tokenizer().chats([*conversations.values()], seconds) if conversations else ())
    found = []
    for number, prompt in enumerate(given):
        text = prompt if isinstance(prompt, str) else None
        if number in conversations:
            found.append(Prompt(text, "", next(rendered)))
        elif text is None:
            found.append(Prompt(None, "", prompt))
        else:
            found.append(Prompt(text, text, tokenizer().encode(text)))
    return tuple(found)


def read_prompts(file: str) -> tuple[Any, ...]:
    """The prompts in a file, one per line, or on stdin for `-`.

    A line that starts with `{` is JSON: {"prompt": …}, {"tokens": […]} or {"messages": […]}.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ReshardError(f"{file}: {error.strerror}", "pass a file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise ReshardError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None
    found: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found.append(_from_json(line, f"{file}: line {number}") if line.startswith("{") else line)
    if not found:
        raise ReshardError(f"{file}: no prompts", "write one per line")
    return tuple(found)


def _from_json(line: str, where: str) -> Any:
    hint = (
        'a JSON line is {"prompt": "…"}, {"tokens": [1, 2, …]} or {"messages": [{"role": "user", "content": "…"}, …]}'
    )
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReshardError(f"{where}: invalid JSON: {error}", hint) from None
    for key, fits in _FORMS.items():
        if key in data:
            if not fits(data[key]):
                raise ReshardError(f"{where}: invalid {key}: {json.dumps(data[key])[:100]}", hint)
            return data[key]
    raise ReshardError(f"{where}: has none of {', '.join(_FORMS)}", hint)


def _every(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(kind, value))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "tokens": _every(lambda token: type(token) is int),
    "messages": _every(lambda message: isinstance(message, dict) and "role" in message and "content" in message),
}
