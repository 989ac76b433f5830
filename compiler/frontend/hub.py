"""The Hugging Face hub: finds a model or a data set, and fetches files into the cache.

Files are fetched one by one into the ordinary hub cache, so that `hf download` and tintc share it.
One short request comes first: without a network it fails at once, where a plain `from_pretrained`
retries for half a minute per file.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tintc.compiler.frontend.files import check_received, looks_like
from tintc.compiler.frontend.hub_errors import (
    Repository,
    UnreachableError,
    not_cached,
    not_fetched,
    refusal,
    unreachable,
)
from tintc.ir.errors import SourceError

TIMEOUT_S = 10.0
OFFLINE = UnreachableError("offline mode")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit.

    asked: what was asked for. directory: the snapshot in the cache, which holds the files fetched
    so far. commit: the hash of the commit. files: every file that can be had, on the hub or,
    without it, in the cache. unreachable: why the hub cannot be asked; None when it can.
    """

    asked: Repository
    directory: Path
    commit: str
    files: frozenset[str]
    unreachable: UnreachableError | None

    @property
    def name(self) -> str:
        return self.asked.name

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads files into `directory`; those already there cost nothing. Raises
        SourceError.
        """
        if self.unreachable is None:
            for name in sorted(names):
                fetch(self.asked, name, self.commit)

    def fetch_whole(self, names: Collection[str]) -> None:
        """The same, and compares each with the digest that the hub gave: for small files. Raises
        SourceError where one is damaged.
        """
        self.fetch(names)
        for name in sorted(names):
            check_received(self.directory / name, self.name)

    def holds(self, names: Collection[str]) -> bool:
        """Whether these files were fetched already."""
        return all((self.directory / name).is_file() for name in names)

    def check_complete(self, names: Collection[str]) -> None:
        """Raises SourceError if the hub cannot be asked and the cache lacks one of these, or if
        there is none at all.
        """
        if self.unreachable is not None and not (names and self.files.issuperset(names)):
            raise not_cached(self.asked, self.unreachable)


def locate(asked: Repository, *, offline: bool) -> HubModel:
    """Finds a model on the hub or, offline or when the hub cannot be reached, in the local cache.

    Raises SourceError: no such model, private or gated, no such revision, not a transformers model,
    or neither reachable nor cached.
    """
    remote, reason = ask(asked, offline=offline)
    if remote is not None and "config.json" not in remote:
        raise SourceError(
            f"{asked.name} on the hub has no config.json; expected {looks_like(remote, asked.name)}"
        )
    try:
        config = _download(asked, "config.json", asked.revision, local_only=remote is None)
    except LocalEntryNotFoundError:
        assert reason is not None
        raise not_cached(asked, reason) from None
    check_received(config, asked.name)
    if reason is not None and reason is not OFFLINE:
        _log.warning(
            "%s: the hub cannot be used (%s); taking it from the cache", asked.name, reason
        )
    directory = config.parent  # <cache>/models--<id>/snapshots/<commit>
    files = _cached_files(directory) if remote is None else remote
    return HubModel(asked, directory, directory.name, files, reason)


def ask(
    asked: Repository, *, offline: bool
) -> tuple[frozenset[str] | None, UnreachableError | None]:
    """The files of a repository, or None and why the hub cannot be asked. Raises SourceError where
    it refuses.
    """
    if offline or constants.HF_HUB_OFFLINE:
        return None, OFFLINE
    try:
        info = HfApi().repo_info(
            asked.name, revision=asked.revision, repo_type=asked.kind, timeout=TIMEOUT_S
        )
    except (
        Exception
    ) as error:  # the HTTP library, and so its errors, differ between releases of huggingface_hub
        refused = refusal(error, asked)
        if refused is not None:
            raise refused from error
        return None, unreachable(error)
    found = getattr(info, "siblings", None) or ()  # other kinds of repositories have none
    return frozenset(sibling.rfilename for sibling in found), None


def fetch(asked: Repository, file: str, commit: str) -> Path:
    """The path of one file in the cache, fetched first if need be. Raises SourceError."""
    return _download(asked, file, commit, local_only=False)


def _cached_files(directory: Path) -> frozenset[str]:
    """The files of a snapshot whose content is there."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return frozenset(path.relative_to(directory).as_posix() for path in files)


def _download(asked: Repository, file: str, revision: str | None, *, local_only: bool) -> Path:
    """Raises SourceError, or LocalEntryNotFoundError when not there and `local_only`."""
    try:
        path = hf_hub_download(
            asked.name,
            file,
            repo_type=asked.kind,
            revision=revision,
            cache_dir=asked.cache_dir,
            local_files_only=local_only,
            etag_timeout=TIMEOUT_S,
        )
    except Exception as error:  # as above
        if local_only and isinstance(error, LocalEntryNotFoundError):
            raise
        raise not_fetched(error, file, asked) from error
    return Path(path)
