"""The tables that come with reshard: one folder of TOML files for each noun."""

import re
from difflib import get_close_matches
from pathlib import Path

from ..errors import PlaceError, ReshardError
from ..inputs import decode, limits

HOME = Path(__file__).parent.parent  # families/, formats/, wrappers/


class Shipped:
    """A folder of tables, each a file, or a folder with a file for each version of what it describes.

    `noun`: what one of them is called; `besides`: what else a user may name, in words.
    """

    def __init__(self, folder: str, noun: str, besides: str = "") -> None:
        self.folder, self.noun, self.besides = folder, noun, besides

    def names(self) -> tuple[str, ...]:
        home = HOME / self.folder
        alone, versioned = home.glob("*.toml"), home.glob("*/*.toml")
        return tuple(sorted({path.stem for path in alone} | {path.parent.name for path in versioned}))

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions that a table is there for, newest last; none where it has no versions."""
        found = [path.stem for path in (HOME / self.folder / name).glob("*.toml")]
        return tuple(sorted(found, key=lambda text: [int(part) for part in text.split(".")]))

    def text(self, name: str) -> str:
        """A table's TOML. Raises ReshardError, with similar names, where there is none."""
        named = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name)
        versions = self.versions(name) if named else ()
        path = HOME / self.folder / (f"{name}/{versions[-1]}.toml" if versions else f"{name}.toml")
        if not named or not path.is_file():
            raise ReshardError(f'no {self.noun} table "{name}"', self.nearest(name))
        return path.read_text(encoding="utf-8")

    def nearest(self, name: str) -> str:
        """The tables with the most similar names, in words."""
        names = self.names()
        if len(names) < 9:
            return f"there are {', '.join(names)}{self.besides}"
        close = get_close_matches(name.lower(), names, 5, 0.5) or [
            other for other in names if other in name or name in other
        ]
        similar = f", with such names: {', '.join(close[:5])}" if close else ", the README lists them"
        return f"there are {len(names)} {self.folder}{similar}"


def own(path: Path) -> str:
    """The TOML of a user's own table."""
    try:
        return decode.read(path, limits.TABLE).decode()
    except (PlaceError, UnicodeDecodeError) as error:
        raise ReshardError(f"{path}: cannot be read as a table: {error}") from None
