"""Text for people, parts of which may be untrusted: control characters are escaped. Prints nothing.

A name in a checkpoint may hold what moves a terminal's cursor, sets its title, or turns the order of the text around
it.
"""

import re

# C0 but tab and newline; delete; C1; marks, embeddings, overrides, isolates of direction; line and paragraph
# separators; surrogates alone.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The same text with `\\x1b` for an escape character, `\\u202e` for an override; newlines are ours, and stay."""
    return _CONTROLS.sub(lambda found: _escape(found[0]), text)


def in_line(text: str) -> str:
    """The same for what must not begin a line of its own: a name that is a part of a line."""
    return visible(text).replace("\n", "\\n")


def in_json(text: str) -> str:
    """JSON or TOML that says the same with escapes of its own: in both such characters occur in strings alone."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if character < "\u0100" else f"\\u{ord(character):04x}"


def clip(text: str) -> str:
    """A text of a stranger's, for a message: printable, and of 200 characters at most."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}…"
