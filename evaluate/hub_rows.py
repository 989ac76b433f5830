"""Rows of a data set of the hub: the files of one split alone, fetched once and read again without
a network.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tintc.compiler import libraries
from tintc.compiler.frontend import hub
from tintc.compiler.frontend.files import check_received
from tintc.compiler.frontend.hub_errors import Repository, UnreachableError
from tintc.compiler.frontend.messages import first_line
from tintc.compiler.network import without_network
from tintc.ir.errors import SourceError, TintcError

_ON_THE_HUB = re.compile(r"hf://datasets/(?P<name>.+?)@(?P<commit>[0-9a-f]{40})/(?P<file>.+)")


@dataclass(frozen=True)
class Access:
    """How the hub is asked. cache_dir: of what was made of a data set. offline: read that alone.
    before: called before anything is fetched.
    """

    cache_dir: str | None = None
    offline: bool = False
    before: Callable[[], None] = lambda: None


USUAL = Access()


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set. name: of its configuration, where it has several. first: so many
    rows are read, without fetching the rest; None for all. instead: what to give where there is no
    network.
    """

    path: str
    split: str
    instead: str
    name: str | None = None
    first: int | None = None

    def columns(self, columns: Iterable[str], access: Access) -> list[list[Any]]:
        """The values of some columns. Raises SourceError where the hub or the cache gives none."""
        access.before()
        asked = Repository(self.path, "dataset")
        _, reason = hub.ask(asked, offline=access.offline)
        if reason is not None and self.first is not None:
            raise self._not_there(f"{reason}, and its first rows alone are in no cache")
        with (
            libraries.quiet(),
            without_network(reason is not None),
            _datasets(offline=reason is not None),
        ):
            try:
                if self.first is not None:
                    rows = list(islice(self._stream(), self.first))
                    return [[row[column] for row in rows] for column in columns]
                found = self._rows(asked, reason, access)
                return [list(found[column]) for column in columns]
            except TintcError:
                raise
            except Exception as error:  # every library below has its own
                raise self._not_there(str(reason or first_line(error))) from error

    def _stream(self) -> Any:
        import datasets

        return datasets.load_dataset(self.path, self.name, split=self.split, streaming=True)

    def _rows(self, asked: Repository, reason: UnreachableError | None, access: Access) -> Any:
        """A split has a folder of its own: the ordinary one would say of a data set whose other
        splits were never fetched that it is whole.
        """
        import datasets

        shared = Path(access.cache_dir or datasets.config.HF_DATASETS_CACHE)
        own = shared / "tintc" / self.split
        if reason is not None:
            with contextlib.suppress(Exception):
                return self._prepared(own)
            return self._prepared(shared)
        builder = datasets.load_dataset_builder(self.path, self.name, cache_dir=str(own))
        if not Path(builder.cache_dir).is_dir():
            files = builder.config.data_files or {}
            if self.split not in files:
                raise ValueError(f"it has no such split; it has {', '.join(files)}")
            builder.config.data_files = type(files)({self.split: files[self.split]})
            for file in files[self.split]:
                _fetch(file, asked)
        builder.download_and_prepare(verification_mode="no_checks")  # of the other splits
        return builder.as_dataset(split=self.split)

    def _prepared(self, folder: Path) -> Any:
        import datasets

        return datasets.load_dataset(self.path, self.name, split=self.split, cache_dir=str(folder))

    def _not_there(self, reason: str) -> SourceError:
        return SourceError(
            f"the data set {self.path} ({self.split}) cannot be read from the hub or the cache: "
            f"{reason}; expected a network, or {self.instead}"
        )


def _fetch(address: str, asked: Repository) -> None:
    """Brings a file into the hub's cache, where datasets finds it."""
    if found := _ON_THE_HUB.fullmatch(address):
        check_received(hub.fetch(asked, found["file"], found["commit"]), asked.name)


@contextlib.contextmanager
def _datasets(*, offline: bool) -> Iterator[None]:
    """datasets' own bars, log lines and notion of being offline, while its splits are read."""
    import datasets

    logs, config = datasets.logging, datasets.config
    level, bars, before = (
        logs.get_verbosity(),
        datasets.are_progress_bars_disabled(),
        config.HF_HUB_OFFLINE,
    )
    logs.set_verbosity_error()
    datasets.disable_progress_bars()
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
        logs.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
