"""Here models of one kind are exported and lowered once a process."""

from tests.support.once import _compiled_once  # noqa: F401  (a fixture of every test)
