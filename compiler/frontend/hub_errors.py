"""What a failure of the hub, of its storage or of the network means for the user, in one line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tintc.compiler.frontend.messages import first_line
from tintc.ir.errors import SourceError

EXPECTED = (
    "tiny-opt, smollm2-135m, shape:NAME, a directory, a .gguf file or a hub id such as "
    "facebook/opt-125m"
)
_SECONDS = re.compile(r"Retry after (\d+) seconds")  # as the client reads other headers
_LENGTHS = re.compile(r"should be of size (\d+) but has size (\d+)")


@dataclass(frozen=True)
class Repository:
    """What is asked for. kind: `model` or `dataset`, as the hub calls them."""

    name: str
    kind: str = "model"
    revision: str | None = None
    cache_dir: str | None = None

    @property
    def called(self) -> str:
        return "data set" if self.kind == "dataset" else self.kind

    @property
    def cache(self) -> str:
        return self.cache_dir or constants.HF_HUB_CACHE


class UnreachableError(Exception):
    """The hub gave no answer that can be used.

    answered: whether something answered: a hub that fails or has had enough, a login page; else
    there is no network.
    """

    def __init__(self, reason: str, *, answered: bool = False) -> None:
        super().__init__(reason)
        self.answered = answered


def unreachable(error: Exception) -> UnreachableError:
    """What an error says that is no refusal."""
    status = _status(error)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return UnreachableError(_rate_limit(error), answered=True)
    if status is not None:
        return UnreachableError(f"the hub fails with HTTP {_named(status)}", answered=True)
    if isinstance(error, (json.JSONDecodeError, FileMetadataError)):
        return UnreachableError(
            "something else answers in its place: a proxy, or a network that wants a login first",
            answered=True,
        )
    return UnreachableError(first_line(error))


def refusal(error: Exception, asked: Repository) -> SourceError | None:
    """What a refusal of the hub means; None for anything else."""
    name = asked.name
    if isinstance(error, HFValidationError):
        return SourceError(f"{name!r} is neither a directory nor a hub id; expected {EXPECTED}")
    if isinstance(error, DisabledRepoError):
        return SourceError(
            f"{name} was taken down: the hub has disabled access to it, for everyone; expected "
            f"another {asked.called}"
        )
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then run `hf auth "
            "login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        elsewhere = ", and no local directory of that name" if asked.kind == "model" else ""
        return SourceError(
            f"there is no {asked.called} {name} on the hub, or it is private{elsewhere}; "
            "check the spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"{name} has no revision {asked.revision!r}; expected a branch, a tag or a commit hash "
            "of the hub"
        )
    status = _status(error)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        assert isinstance(error, HfHubHTTPError)
        host = urlsplit(str(error.response.url)).netloc
        if host != urlsplit(constants.ENDPOINT).netloc:
            return SourceError(
                f"{name}: {host}, where the hub stores large files, refuses this one (HTTP "
                f"{status}): a link that ran out, or a proxy that blocks it; run the command "
                "again, or from another network"
            )
        return SourceError(
            f"the hub refuses access to {name} (HTTP {status}); check your token with `hf auth "
            "whoami`"
        )
    return None


def not_fetched(error: Exception, file: str, asked: Repository) -> SourceError:
    """Why a file of a repository that is there could not be fetched."""
    told = isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
    of_hub = error.__cause__ if told else error
    assert isinstance(of_hub, Exception)
    refused = refusal(error, asked) or refusal(of_hub, asked)
    if refused is not None:
        return refused
    if isinstance(of_hub, EntryNotFoundError) and _status(of_hub) is not None:
        return SourceError(
            f"{asked.name} has no file {file} on the hub, which it should have; is it complete?"
        )
    if _status(of_hub) is not None or isinstance(of_hub, FileMetadataError):
        return SourceError(
            f"{asked.name}: {file} cannot be fetched: {unreachable(of_hub)}; run the command again "
            "later to go on"
        )
    if lengths := _LENGTHS.search(str(error)):
        return SourceError(
            f"{asked.name}: {file} came incomplete: {lengths[2]} bytes of {lengths[1]}; run the "
            "command again, and if that does not help, from another network: a proxy cuts it, or "
            "sends a page of its own"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return SourceError(
            f"{asked.name}: cannot store {file} in the cache {asked.cache}: {first_line(error)}"
        )
    return SourceError(
        f"{asked.name}: the network failed while {file} was being fetched ({first_line(of_hub)}); "
        "run the command again to go on"
    )


def not_cached(asked: Repository, reason: UnreachableError) -> SourceError:
    """The error for a model that can neither be fetched nor found in the cache: what to fetch
    beforehand, and how.
    """
    if reason.answered:
        return SourceError(
            f"{asked.name} is not complete in the cache {asked.cache}, and cannot be fetched: "
            f"{reason}; run the command again later"
        )
    at = f" --revision {asked.revision}" if asked.revision else ""
    return SourceError(
        f"{asked.name} is neither a local directory nor complete in the cache {asked.cache}, and "
        f"the hub cannot be reached ({reason}); "
        f"where there is a network, run `hf download {asked.name}{at}` and copy its cache "
        "directory here (cache_dir=DIR names another place), "
        "or pass a directory written by save_pretrained (config.json, model.safetensors and the "
        "tokenizer's files)"
    )


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _named(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _rate_limit(error: Exception) -> str:
    assert isinstance(error, HfHubHTTPError)
    seconds = error.response.headers.get("Retry-After") or ""
    if not seconds.isdigit() and (said := _SECONDS.search(str(error))):
        seconds = said[1]
    wait = f"wait {seconds} seconds" if seconds.isdigit() else "wait some minutes"
    return (
        f"the hub's rate limit is reached (HTTP 429): {wait}, or run `hf auth login`, as it is "
        "higher for those who sign in"
    )
