"""How the Hub and the way to it fail, in words, and which failures pass.

Knows the errors of huggingface_hub, whatever HTTP library it uses.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub import errors as hf

from ..errors import PlaceError, ReshardError, failed

PAUSES = (0.5, 2.0)  # seconds before the second and third attempt
BUSY = (408, 429, 500, 502, 503, 504)  # status codes that may be others in a moment

# What the HTTP library of huggingface_hub (httpx, httpx2 …) raises where a request fails: the errors of the Hub descend
# from it.
TRANSPORT: tuple[type[Exception], ...] = (
    ConnectionError,
    *(base for base in hf.HfHubHTTPError.__bases__ if issubclass(base, Exception) and base is not OSError),
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ref:
    """A model on the Hub, at a branch, tag or commit; None is the default branch."""

    id: str
    revision: str | None


def patiently(ask: Callable[[], T]) -> T:
    """Ask again, a little later each time, where the Hub or the way to it fails for a moment."""
    for pause in PAUSES:
        try:
            return ask()
        except TRANSPORT as error:
            response = getattr(error, "response", None)
            passes = (
                response.status_code in BUSY if response is not None else not isinstance(error, hf.OfflineModeIsEnabled)
            )
            if not passes:
                raise
            time.sleep(pause)
    return ask()


@contextmanager
def asking(where: Ref, what: str) -> Iterator[None]:
    """Whatever huggingface_hub raises, in words: its types differ from version to version, and some are those of its
    HTTP library.
    """
    try:
        yield
    except ReshardError:
        raise
    except Exception as error:
        raise _explained(error, where, what) from error


def _explained(error: BaseException, where: Ref, what: str) -> ReshardError:
    while isinstance(error, (hf.LocalEntryNotFoundError, hf.FileMetadataError)) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache", said where asking the Hub failed first
    hub, name = constants.ENDPOINT, where.id
    who = "this token (HF_TOKEN, or `hf auth login`)" if _logged_in() else "anyone who is not logged in"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__

    if isinstance(error, hf.GatedRepoError):
        return ReshardError(
            f"{name}: {what} is not open to {who}: the model is gated",
            f"accept its conditions at {hub}/{name}, and {log_in}",
        )
    if isinstance(error, hf.RepositoryNotFoundError):
        return ReshardError(
            f"{name}: there is no such path here, and no such model at {hub} that is open to {who}",
            f"check the spelling; if it is private, {log_in}",
        )
    if isinstance(error, hf.RevisionNotFoundError):
        return ReshardError(
            f"{name}: has no revision {where.revision or 'main'!r} at {hub}",
            f"a branch, tag or commit is needed; see {hub}/{name}/tree/main",
        )
    if isinstance(error, hf.EntryNotFoundError):
        return ReshardError(
            f"{name}: {what} is not there at revision {where.revision or 'main'}", "was it just removed? try again"
        )
    if isinstance(error, hf.HFValidationError):
        return ReshardError(f"{name}: no such path here, and it is not a Hub id: {said}", "a Hub id is org/name")
    if isinstance(error, hf.OfflineModeIsEnabled):
        return PlaceError(f"{name}: HF_HUB_OFFLINE is set, {what} cannot be fetched", "unset it")
    if status == 429:
        return PlaceError(
            f"{name}: {hub} refuses {what}: too many requests of {who} (429)",
            f"wait some minutes; or {log_in} for a higher limit",
        )
    if status in (401, 403):
        return ReshardError(
            f"{name}: {hub} refuses {what} to {who} ({status}): {said}",
            f"check the token and its permissions: {log_in}",
        )
    if status is not None:
        return PlaceError(f"{name}: {hub} failed to give {what} ({status}): {said}", "try again later")
    if "Timeout" in type(error).__name__ or isinstance(error, TimeoutError):
        return PlaceError(
            f"{name}: {hub} did not respond within {constants.HF_HUB_DOWNLOAD_TIMEOUT} s for {what}",
            "try again; HF_HUB_DOWNLOAD_TIMEOUT sets the limit in seconds",
        )
    if isinstance(error, TRANSPORT):
        return PlaceError(
            f"{name}: there is no such path here, and {hub} cannot be reached for {what}: {said}",
            "check the network, HTTPS_PROXY and HF_ENDPOINT; HF_HUB_OFFLINE=1 works with what is in the cache",
        )
    if isinstance(error, OSError) and error.errno:
        return failed(f"{name}: using HF_HOME for {what}:", Path(error.filename or constants.HF_HUB_CACHE), error)
    return PlaceError(
        f"{name}: {what} could not be fetched from {hub}: {type(error).__name__}: {said}",
        "does a Hub answer there (HF_ENDPOINT)?",
    )


def _logged_in() -> bool:
    try:
        return get_token() is not None
    except OSError:
        return False
