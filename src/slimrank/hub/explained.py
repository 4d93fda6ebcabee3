"""Turn errors of the hub into slimrank's own, which say what to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from slimrank.errors import HubError, SlimrankError, first_line

_LOG_IN = "hf auth login, or set HF_TOKEN; the token needs the right to write"
_BY_STATUS = {
    401: _LOG_IN,
    403: "look whether the token may write to this user or organisation",
    404: "look whether the name is right, and whether the token may write there",
    429: "wait a few minutes: the hub got too many requests",
}


@contextmanager
def explained(repo: str, what: str) -> Iterator[None]:
    """Turn any error inside the context into a `HubError`.

    Args:
        repo: ORG/NAME.
        what: what is being done, as a verb in the passive: "uploaded".

    Raises:
        HubError: something was raised.
    """
    try:
        yield
    except SlimrankError:
        raise
    except Exception as error:  # the library below raises its own errors, those of its HTTP client, and ValueErrors
        found = _cause(error)
        raise HubError(f"'{repo}' cannot be {what}: {first_line(found)}", _hint(found)) from error


def _cause(error: BaseException) -> BaseException:
    """Return what the hub said, where the library wraps it in an error of its own."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _hint(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    if isinstance(error, LocalTokenNotFoundError):
        return _LOG_IN
    if isinstance(error, HfHubHTTPError):
        return _BY_STATUS.get(error.response.status_code, "try again later; the folder is complete on this disk")
    return f"look whether {constants.ENDPOINT} can be reached from here"
