"""Text: prompts to token ids and back, by a model's tokenizer.json and chat template. Knows nothing about tensors."""

from functools import cached_property
from pathlib import Path
from typing import Any

from reshard.errors import ReshardError
from reshard.inputs import decode, limits

from .template import PLAIN, Message, render

NEEDS = "pip install 'reshard[runtime]'"


def generation_config(root: Path) -> dict[str, Any]:
    """generation_config.json of a model, {} if there is none."""
    return _json(root / "generation_config.json")


def stop_tokens(
    said: dict[str, Any], config: dict[str, Any], root: Path = Path(), vocab: int | None = None
) -> frozenset[int]:
    """The ids that end a text: `eos_token_id`, one or several, from generation_config.json, else from config.json.

    Raises ReshardError for what is not an id of a vocabulary of `vocab`.
    """
    file, found = "generation_config.json", said.get("eos_token_id")
    if found is None:
        file, found = "config.json", config.get("eos_token_id")
    if found is None:
        found = (config.get("text_config") or {}).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if type(token) is not int or token < 0 or (vocab is not None and token >= vocab):
            most = "" if vocab is None else f" to {vocab - 1}"
            raise ReshardError(f"{root / file}: eos_token_id has {token!r}, token ids are 0{most}", "correct the file")
    return frozenset(ids)


class Tokenizer:
    """The tokenizer of a model directory. Raises ReshardError if there is none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / "tokenizer.json"
        if not path.is_file():
            raise ReshardError(
                f"{path}: no such file: text cannot be converted to tokens",
                '--tokens "1 2 3" takes token ids instead of text',
            )
        try:
            import tokenizers
        except ImportError:
            raise ReshardError("text needs the package `tokenizers`, which is not installed", NEEDS) from None
        try:
            # From a buffer: a path may be any bytes.
            self._tokenizer = tokenizers.Tokenizer.from_buffer(decode.read(path, limits.TOKENIZER))
        except ReshardError:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise ReshardError(f"{path}: cannot be read: {error}", "fetch the file again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._said = _json(root / "tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """A text, with the special tokens that the tokenizer puts in front."""
        ids = list(self._tokenizer.encode(text).ids)
        bos = self.special("bos_token")
        first = None if bos is None else self._tokenizer.token_to_id(bos)
        if self._said.get("add_bos_token") and first is not None and ids[:1] != [first]:
            ids.insert(0, first)
        return ids or ([] if first is None else [first])

    def chat(self, messages: list[Message]) -> list[int]:
        """A conversation, rendered up to where the answer starts."""
        return self.chats([messages])[0]

    def chats(self, conversations: list[list[Message]], seconds: float = 60.0) -> list[list[int]]:
        """Many conversations; rendering them may take `seconds`."""
        try:
            return [
                list(self._tokenizer.encode(text, add_special_tokens=False).ids)
                for text in self._rendered(conversations, seconds)
            ]
        except (TypeError, ValueError) as error:  # half a surrogate pair
            raise ReshardError(f"{self.root}: its chat template produced invalid text: {error}", PLAIN) from None

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def special(self, name: str) -> str | None:
        """A special token such as `bos_token`, None if the model has none."""
        value = self._said.get(name)
        return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None

    @cached_property
    def template(self) -> str | None:
        """The chat template, None if there is none."""
        path = self.root / "chat_template.jinja"
        if path.is_file():
            try:
                return decode.read(path, limits.TEMPLATE).decode()
            except UnicodeDecodeError as error:
                raise ReshardError(f"{path}: not UTF-8: {error.reason} at byte {error.start}", PLAIN) from None
        found = self._said.get("chat_template") or _json(self.root / "chat_template.json").get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    def render(self, messages: list[Message]) -> str:
        """A conversation as a text for the model."""
        return self._rendered([messages], 60.0)[0]

    def _rendered(self, conversations: list[list[Message]], seconds: float) -> list[str]:
        if self.template is None:
            raise ReshardError(f"{self.root}: no chat template", PLAIN)
        special = {
            name: value for name in self._said if name.endswith("_token") and (value := self.special(name)) is not None
        }
        return render(self.template, conversations, special, str(self.root), seconds)


class Stream:
    """Text of tokens as they arrive: incomplete characters are held back until they are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = self._shown = 0  # decoded from here; returned up to `_shown`

    def put(self, token: int) -> str:
        """The text that this token adds."""
        self._ids.append(token)
        return self._new(hold=True)

    def end(self) -> str:
        """The text held back."""
        return self._new(hold=False)

    def _new(self, hold: bool) -> str:
        # A token's text depends on those before it (a space, say): some that were returned are decoded again with it.
        shown = self._tokenizer.decode(self._ids[self._from : self._shown])
        text = self._tokenizer.decode(self._ids[self._from :])
        if len(text) <= len(shown) or (hold and text.endswith("�")):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file."""
    found = decode.json_file(path, limits.CONFIG, hint="fetch the file again") if path.exists() else {}
    return found if isinstance(found, dict) else {}
