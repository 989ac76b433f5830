"""The version, in a module of its own: every room may read it, and none imports `tintc` itself."""

__version__ = "0.1.0"
