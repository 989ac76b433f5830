"""tintc page: a simulator's static site, written or served."""

from __future__ import annotations

import tempfile
import webbrowser
from contextlib import nullcontext
from pathlib import Path

from tintc import interrupts
from tintc.commands import console
from tintc.commands.paging import Paging
from tintc.page.serving import PageServer, check_port
from tintc.page.site import STAGES, Site, check_page_target, is_page, write_site


def run(path: Path, asked: Paging, *, as_json: bool) -> None:
    """Writes the page, or takes the one that is there, and serves it if that is asked for."""
    path = path.expanduser()
    of_page = is_page(path)
    asked.check(of_page=of_page, as_json=as_json)
    check_port(asked.port)
    if of_page:
        _serve(path, asked)
        return
    if asked.output is not None:
        check_page_target(asked.output, force=asked.force)
    # a page that is only looked at leaves nothing behind
    scratch = tempfile.TemporaryDirectory() if asked.output is None else nullcontext("")
    with scratch as folder:
        site = _write(path, asked.output or Path(folder) / "page", asked)
        if as_json:
            console.print_json(site.to_dict())
        elif asked.output is not None:
            _print(site, asked)
        if asked.served:
            _serve(site.path, asked)


def _write(path: Path, out: Path, asked: Paging) -> Site:
    with console.stages(STAGES) as stage:
        return write_site(
            path,
            out,
            model=asked.model,
            limit_mb=asked.limit_mb,
            force=asked.force,
            progress=stage,
        )


def _print(site: Site, asked: Paging) -> None:
    rows = {
        "page": f"{site.path}: {site.files} files, {site.bytes / 1e6:.1f} MB",
        "run": "in the browser" if site.run else f"not available. {site.reason}",
    }
    console.print_table(console.named(rows))
    if not console.Verbosity.quiet:
        after = "" if asked.served else f"; next: tintc page {site.path} --open"
        console.err.print(f"wrote {site.path} in {site.seconds:.1f} s{after}", markup=False)


def _serve(folder: Path, asked: Paging) -> None:
    """Until Ctrl-C, which is how it is meant to end."""
    with PageServer(folder, asked.port) as server:
        console.out.print(server.url, markup=False)
        if not console.Verbosity.quiet:
            console.err.print(f"serving {folder} until Ctrl-C", markup=False)
        try:
            if asked.open:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            interrupts.forget()
