"""docs/engines.json: which engine loaded what of which family, with the digest of the table that was proven by it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from engines.jobs import label
from engines.tables import Outcome
from reshard.tables import families

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "engines.json"


def digest(text: str) -> str:
    """Of a table's text, as written."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write(
    engine: str,
    version: str,
    table: str,
    proven: Mapping[str, Sequence[Outcome]],
    refused: Mapping[str, str],
) -> None:
    """Put the record of one engine's version in the place of its last one."""
    known = json.loads(PATH.read_text()) if PATH.exists() else {}
    known[f"{engine} {version}"] = {
        "date": date.today().isoformat(),
        "table": digest(table),
        "families": {
            name: {
                "table": families.digest(name),
                "meshes": sorted({label(one.load.mesh) for one in outcomes if one.word == "held"}),
                "loads": dict(sorted(Counter(one.word for one in outcomes).items())),
                "refused": sorted({f"{one.load.name}: {one.why}"[:200] for one in outcomes if one.word == "refused"}),
            }
            for name, outcomes in sorted(proven.items())
        },
        "refused": dict(sorted(refused.items())),
    }
    PATH.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def refused(engine: str, version: str) -> dict[str, str]:
    """The families for which the last record has no table, and why."""
    known = json.loads(PATH.read_text()) if PATH.exists() else {}
    return dict(known.get(f"{engine} {version}", {}).get("refused", {}))
