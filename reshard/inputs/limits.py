"""How much of a file that somebody else wrote is read into memory, and how a number in it is spelled. Every limit
stands here, once.

What is larger than its limit is either streamed in small pieces (weights, residues, files copied as they are) or
refused, naming the file, the limit and the size. Each limit is several times what any published checkpoint needs. The
worst that they let through takes 1.4 GB of memory for the headers of a checkpoint, 1.8 GB for a tensors.json, 0.4 GB
for any other file. Knows nothing about formats.
"""

import re

KIB, MIB = 1 << 10, 1 << 20

# Whole files, in bytes.
CONFIG = 16 * MIB  # config.json, generation_config.json, tokenizer_config.json
INDEX = 64 * MIB  # *.index.json: some 600,000 tensors
TOKENIZER = 64 * MIB  # tokenizer.json
TEMPLATE = 1 * MIB  # a chat template
MANIFEST = 16 * MIB  # manifest.json
FILES = 16 * MIB  # source/files.json, source/SHA256SUMS
TENSORS_JSON = 256 * MIB  # rank-*/tensors.json
SHARE = 16 * MIB  # a rank's share of a fingerprint
TABLE = 256 * KIB  # a table in TOML
COPIED = 64 * MIB  # a file that is copied as it is; larger ones stay behind

# JSON and TOML.
DEPTH = 100  # levels of nesting
KEYS = 8_200_000  # colons of one JSON text: an entry takes 10 bytes there and up to 300 in memory
VALUES = 12_000_000  # commas and opening brackets of one: `[],` takes 3 bytes there and 72 in memory
KEY_PARTS = 32  # of a dotted key in TOML, which takes time in the square of them
ROWS = 1000  # of a table
COMPOUNDS = 100  # entries of [axes]
ATOMS = 16  # axes that a compound axis stands for, written out to the end
DIGITS = 18  # of a number in text: it fits 64 bits

# Headers of all weights files of a checkpoint together. A single one may have 100,000,000 bytes, as safetensors has it.
NAMES = 200_000_000  # characters of tensors' names
NAME = 10_000  # characters of one of them
TENSORS = 1_000_000  # stored tensors, some 800 bytes of memory each
INDEX_KEYS = TENSORS + 200_000  # colons of an index
HEADER_KEYS = 4 * TENSORS + 200_000  # colons of one: a name and three keys per tensor, and metadata
DIMENSIONS = 64  # of a stored tensor, as in torch

# Chat templates, which are programs: what a process that renders them may take.
TEMPLATE_SECONDS = 10  # of CPU time
TEMPLATE_MEMORY = 512 * MIB
TEMPLATE_OUTPUT = 16 * MIB  # characters, besides those of the messages themselves

_NUMBER = re.compile(f"0|[1-9][0-9]{{0,{DIGITS - 1}}}")


def numeral(text: str) -> int | None:
    """The number that a text spells in the one plain way: digits 0 to 9, no sign, no leading zero, at most DIGITS of
    them; else None.
    """
    return int(text) if _NUMBER.fullmatch(text) else None
