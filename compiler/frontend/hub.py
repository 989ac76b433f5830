"""The Hugging Face hub: finds a model, fetches its files into the cache, and says in one line what
went wrong.

Files are fetched one by one into the ordinary hub cache, so that `hf download` and tintc share it.
One short request comes first: without a network it fails at once, where a plain `from_pretrained`
retries for half a minute per file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tintc.ir.errors import SourceError

TIMEOUT_S = 10.0
EXPECTED = (
    "tiny-opt, smollm2-135m, shape:NAME, a directory, a .gguf file or a hub id such as "
    "facebook/opt-125m"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit.

    name: the hub id. directory: the snapshot in the cache, which holds the files fetched so far.
    commit: the hash of the commit. files: every file that can be had, on the hub or, without it, in
    the cache.
    unreachable: why the hub cannot be asked; None when it can.
    """

    name: str
    directory: Path
    commit: str
    files: frozenset[str]
    revision: str | None
    cache_dir: str | None
    unreachable: str | None

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads files into `directory`; those already there cost nothing. Raises
        SourceError.
        """
        for name in sorted(names) if self.unreachable is None else ():
            _download(
                self.name, name, revision=self.commit, cache_dir=self.cache_dir, local_only=False
            )

    def incomplete(self) -> SourceError:
        """The error for a cache that holds only a part of the model."""
        return not_cached(
            self.name,
            revision=self.revision,
            cache_dir=self.cache_dir,
            reason=str(self.unreachable),
        )


def locate(name: str, *, revision: str | None, cache_dir: str | None, offline: bool) -> HubModel:
    """Finds a model on the hub or, offline or when the hub cannot be reached, in the local cache.

    Raises SourceError: no such model, private or gated, no such revision, not a transformers model,
    or neither reachable nor cached.
    """
    remote: frozenset[str] | None = None
    unreachable: str | None = "offline mode"
    offline = offline or constants.HF_HUB_OFFLINE
    if not offline:
        try:
            remote, unreachable = _list_files(name, revision), None
        except _Unreachable as error:
            unreachable = str(error)
    if remote is not None and "config.json" not in remote:
        raise SourceError(
            f"{name} on the hub has no config.json; expected a model that transformers can load"
        )
    try:
        config = _download(
            name, "config.json", revision=revision, cache_dir=cache_dir, local_only=remote is None
        )
    except LocalEntryNotFoundError:
        raise not_cached(
            name, revision=revision, cache_dir=cache_dir, reason=str(unreachable)
        ) from None
    if unreachable and not offline:
        _log.warning(
            "%s: the hub cannot be reached (%s); using the copy in the cache", name, unreachable
        )
    directory = config.parent  # <cache>/models--<id>/snapshots/<commit>
    files = frozenset(path.name for path in directory.iterdir()) if remote is None else remote
    return HubModel(name, directory, directory.name, files, revision, cache_dir, unreachable)


def not_cached(
    name: str, *, revision: str | None, cache_dir: str | None, reason: str
) -> SourceError:
    """The error for a model that can neither be fetched nor found in the cache: what to fetch
    beforehand, and how.
    """
    cache = cache_dir or constants.HF_HUB_CACHE
    at = f" --revision {revision}" if revision else ""
    return SourceError(
        f"{name} is neither a local directory nor complete in the cache {cache}, and the hub "
        f"cannot be reached ({reason}); "
        f"where there is a network, run `hf download {name}{at}` and copy its cache directory here "
        "(cache_dir=DIR names another place), "
        "or pass a directory written by save_pretrained (config.json, model.safetensors and the "
        "tokenizer's files)"
    )


class _Unreachable(Exception):
    """The hub did not answer: no network, a timeout, a server that fails."""


def _list_files(name: str, revision: str | None) -> frozenset[str]:
    """The files in a repository's top folder."""
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
    except (HFValidationError, HfHubHTTPError) as error:
        raise _refusal(error, name, revision) or _Unreachable(first_line(error)) from error
    except (
        Exception
    ) as error:  # the HTTP library, and so its errors, differ between releases of huggingface_hub
        raise _Unreachable(first_line(error)) from error
    return frozenset(
        sibling.rfilename for sibling in info.siblings or () if "/" not in sibling.rfilename
    )


def _download(
    name: str, filename: str, *, revision: str | None, cache_dir: str | None, local_only: bool
) -> Path:
    """The path of one file in the cache, fetched first if need be. Raises SourceError, or
    LocalEntryNotFoundError when not there.
    """
    try:
        path = hf_hub_download(
            name,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_only,
            etag_timeout=TIMEOUT_S,
        )
    except LocalEntryNotFoundError:
        if local_only:
            raise
        raise SourceError(
            f"{name}: the network failed while {filename} was being fetched; run the command again "
            "to go on"
        ) from None
    except (HFValidationError, HfHubHTTPError) as error:
        failure = SourceError(f"{name}: the hub does not hand out {filename}: {first_line(error)}")
        raise _refusal(error, name, revision) or failure from error
    except OSError as error:
        cache = cache_dir or constants.HF_HUB_CACHE
        raise SourceError(
            f"{name}: cannot store {filename} in the cache {cache}: {first_line(error)}"
        ) from error
    except Exception as error:  # as in _list_files
        raise SourceError(
            f"{name}: fetching {filename} failed: {first_line(error)}; run the command again to go "
            "on"
        ) from error
    return Path(path)


def _refusal(error: Exception, name: str, revision: str | None) -> SourceError | None:
    """What a refusal of the hub means for the user; None for a server that fails."""
    if isinstance(error, HFValidationError):
        return SourceError(f"{name!r} is neither a directory nor a hub id; expected {EXPECTED}")
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then run `hf auth "
            "login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(
            f"there is no model {name} on the hub, or it is private, and no local directory of "
            "that name; "
            "check the spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"{name} has no revision {revision!r}; expected a branch, a tag or a commit hash of "
            "the hub"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (401, 403):
        return SourceError(
            f"the hub refuses access to {name} (HTTP {status}); check your token with `hf auth "
            "whoami`"
        )
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message (two where the first only announces the next), for a
    message of our own.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:300]
