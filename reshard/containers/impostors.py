"""Impostors: what a file probably is that is not of the container that its name promises, and what to do with it.

Knows nothing about how containers are read.
"""

import re

_RENAME = "rename it (.bin, .pt), or save it as safetensors"
_LOOK = "look into it, then download the file again"
_OTHER = "save its tensors as safetensors"

# The container it is of, if it is one that is read; how it begins; a remedy.
_ROWS: tuple[tuple[str, bytes, str], ...] = (
    ("", rb"version ", "this seems to be a git-lfs pointer: run `git lfs pull`, or download the file itself"),
    ("torch", rb"PK\x03\x04", f"this is a zip archive, as torch.save writes: {_RENAME}"),
    ("torch", rb"\x80\x02", f"this is a Python pickle, as old versions of torch.save wrote: {_RENAME}"),
    ("safetensors", rb".{8}\{", "this seems to be a safetensors file: give it the name .safetensors"),
    ("", rb"GGUF", f"this is a GGUF file, which is not read here: {_OTHER}"),
    ("", rb"\x93NUMPY", f"this is a numpy array, which is not read here: {_OTHER}"),
    ("", rb"\x89HDF", f"this is an HDF5 file, which is not read here: {_OTHER}"),
    ("", rb"\x1f\x8b", "this is gzip-compressed: unpack it first"),
    ("", rb"\0{8}", "the file begins with zeros, as a download that was never finished does: download it again"),
    ("", rb"(\xef\xbb\xbf)?\s*<[\x20-\x7e]", f"this is an HTML or XML page, such as a server's error page: {_LOOK}"),
)
_TEXT = re.compile(rb"[\t\r\n\x20-\x7e\xef\xbb\xbf]+")


def guess(head: bytes, container: str, otherwise: str, least: int = 1) -> str:
    """A hint from the first 8 bytes or more of a file that is not of `container`; `otherwise` if they do not tell.

    Magic numbers of fewer than `least` bytes are not asked for: they may as well be the low bytes of a length.
    """
    for of, start, hint in _ROWS:
        found = re.match(start, head, re.DOTALL)
        if of != container and found and len(found[0]) >= least:
            return hint
    if _TEXT.fullmatch(head[:8]):
        text = head[:8].decode(errors="replace").strip("\ufeff \t\r\n")
        return f"this is text that begins {text!r}, perhaps a server's message: {_LOOK}"
    return otherwise
