"""Sphinx: the pages are MyST Markdown, parts of them are made from the code (generated.py)."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import generated  # noqa: E402

from tintc.version import __version__  # noqa: E402

project = "tintc"
author = "the tintc contributors"
copyright = "the tintc contributors. Apache-2.0"
default_role = "literal"  # of docstrings
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
nitpicky = True
# What is documented elsewhere; the build asks no network for its index.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|fx|collections|pathlib|typing|transformers|onnx)\..*"),
    (
        r"py:.*",
        r"(AdaptedCache|Program|Any|Tensor|Path|Callable|Sequence|Collection|ValueError|optional|int|str|bool)",
    ),
    (r"py:.*", r"tintc\.(ir|runtime|compiler|passes)\..*"),  # the parts of the public face
]

html_theme = "furo"
html_title = f"tintc {__version__}"
html_static_path = ["_static"]
html_css_files = ["tintc.css"]
html_copy_source = False


def _generate(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = generated.expand(source[0])


def _list_arguments(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Makes a list of the lines `argument: meaning` of a docstring; what follows belongs to the
    same argument until a blank line, or a sentence that starts a line.
    """
    known = _arguments(obj)
    made: list[str] = []
    inside = False
    for line in lines:
        found = re.match(r"\s*([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        sentence = made and made[-1].endswith((".", ". ")) and re.match(r"[A-Z]", line)
        if found and set(found[1].split(", ")) <= known:
            made += [] if inside else [""]
            names = ", ".join(f"**{name}**" for name in found[1].split(", "))
            made.append(f"* {names}: {found[2]}")
            inside = True
        elif inside and line.strip() and not sentence:
            made.append("  " + line.strip())
        else:
            made += [""] if inside else []
            made.append(line)
            inside = False
    lines[:] = made


def _arguments(obj: Any) -> set[str]:
    """Names of a function's arguments, or of a class's and its fields."""
    if not callable(obj) or (inspect.isclass(obj) and issubclass(obj, Exception)):
        return set()
    return {*inspect.signature(obj).parameters, *getattr(obj, "__annotations__", ())}


def _write_demo(app: Sphinx, error: Exception | None) -> None:
    """The page of the bundled model, beside the site's own pages."""
    if error is None and app.builder.format == "html":
        generated.write_demo(Path(app.outdir) / "demo")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", _write_demo)
    app.connect("source-read", _generate)
    app.connect("autodoc-process-docstring", _list_arguments)
