"""The page in a real browser: one server and one tab. Each test goes to its view itself.

TINTC_BROWSER names a browser, TINTC_SCREENSHOTS a folder for pictures of every view.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.browser import AXE, Watched, run, why_no_browser
from tests.support.pages import HOSTILE, column, content, hostile
from tintc.page.serving import PageServer
from tintc.page.site import write_site

pytestmark = [
    pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser())),
    pytest.mark.xdist_group("browser"),
]
VIEWS = ("graph", "slots", "cost", "run")
BLOCK = "model.decoder.layers.1"
SLOT = f"{BLOCK}.fc1.weight"


def lowered() -> dict[str, Any]:
    found: dict[str, Any] = content("graph-lowered")
    return found


def prefix_slot(name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in content("slots")["prefix"] if s["name"] == name)
    return found


class TestGraph:
    def test_opens(self, page: Watched) -> None:
        page.go("#/graph", page.url)
        site_file = content("site")
        assert page.texts("h1 .model") == [site_file["title"]]
        assert page.texts(".toolbar .segments a") == site_file["stages"]
        lanes = ["weights, inputs", "step 0 forward", "step 0 backward", "step 0 descent"]
        assert page.texts(".lane strong") == [*lanes, "last forward"]
        # Closed: no more than a row a block and what stands around the blocks.
        assert 0 < len(page.drawn(".item")) < len(lowered()["nodes"]["name_s"]) / 3
        first = page.tab.evaluate("performance.getEntriesByName('tintc:shown')[0].startTime")
        size = page.tab.evaluate(
            "performance.getEntriesByType('resource').reduce((s, r) => s + r.decodedBodySize, 0)"
        )
        assert size < 6e6
        print(f"first view after {first:.0f} ms, {size / 1e6:.2f} MB")

    def test_block_opens_by_a_click(self, page: Watched) -> None:
        page.go("#/graph")
        groups = lowered()["groups"]
        block = next(i for i, group in enumerate(groups) if group["path"] == BLOCK)
        closed = len(page.drawn(".item"))
        cell = next(item for item in page.drawn(".cell") if item.startswith(f"g{block}l"))
        took = self._timed(page, cell)
        page.settle()
        assert page.params()["open"] == BLOCK
        assert len(page.drawn(".item")) > closed
        assert page.drawn(".band") == [f"b{block}"]
        print(f"a block opened in {took:.0f} ms")
        page.tab.keyboard.press("Escape")
        page.tab.get_by_role("button", name="Close all").click()
        page.tab.wait_for_function("() => !location.hash.includes('open')")
        page.settle()
        assert len(page.drawn(".item")) == closed

    @staticmethod
    def _timed(page: Watched, cell: str) -> float:
        """Milliseconds from a click until its result is drawn."""
        page.tab.evaluate(
            """() => { window.took = new Promise(done => {
                let start = 0;
                addEventListener("mouseup", () => { start = performance.now(); }, {once: true});
                addEventListener("hashchange", () => requestAnimationFrame(
                    () => setTimeout(() => done(performance.now() - start))), {once: true});
            }); }"""
        )
        page.tab.mouse.click(*page.place(cell))
        return float(page.tab.evaluate("window.took"))

    def test_outline_by_keyboard(self, page: Watched) -> None:
        page.go("#/graph")
        items = page.tab.locator("[role=treeitem]")
        before = items.count()
        items.first.focus()
        page.tab.keyboard.press("ArrowRight")
        page.tab.wait_for_function("() => location.hash.includes('open')")
        page.settle()
        assert items.count() > before
        page.tab.keyboard.press("ArrowDown")
        page.tab.keyboard.press("Enter")
        page.tab.wait_for_function("() => location.hash.includes('node')")
        page.settle()
        assert page.params()["node"] in column(lowered(), "name_s")
        assert page.texts(".panel h2.mono") == [page.params()["node"]]

    def test_search(self, page: Watched) -> None:
        page.go("#/graph")
        page.tab.keyboard.press("/")
        page.tab.keyboard.type("linear_descent layers_1")
        graph = lowered()
        names = [
            name
            for name, operator in zip(
                column(graph, "name_s"), column(graph, "operator_s"), strict=True
            )
            if "layers_1" in name and operator == "tint.linear_descent"
        ]
        page.tab.wait_for_function(
            "n => document.querySelectorAll('#search-list li').length === n", arg=len(names)
        )
        assert page.texts("#search-list .mono") == names
        page.tab.keyboard.press("ArrowDown")
        page.tab.keyboard.press("Enter")
        page.tab.wait_for_selector(".panel .operator")
        page.settle()
        assert page.params()["node"] == names[0]
        assert page.drawn(".selected") == [f"n{column(graph, 'name_s').index(names[0])}"]

    def test_node(self, page: Watched) -> None:
        graph = lowered()
        names = column(graph, "name_s")
        at = next(
            i for i, op in enumerate(column(graph, "operator_s")) if op == "tint.linear_descent"
        )
        page.go(f"#/graph?node={names[at]}")
        said = page.tab.locator(".panel").inner_text()
        operator = content("operators")["tint.linear_descent"]
        for text in (operator["formula"], operator["meaning"]):
            assert " ".join(text.split()) in " ".join(said.split())
        for name in ("shape_s", "module_s", "slot_s", "args_s", "source_s"):
            assert (column(graph, name)[at] or "") in said
        edges = graph["edges"]
        inputs = {names[a] for a, b in zip(edges["from"], edges["to"], strict=True) if b == at}
        users = {names[b] for a, b in zip(edges["from"], edges["to"], strict=True) if a == at}
        assert set(page.texts(".panel .links a")) == inputs | users

    def test_weight_is_followed(self, page: Watched) -> None:
        page.go("#/graph")
        page.tab.get_by_label("Follow a weight").select_option(SLOT)
        page.tab.wait_for_selector(".steps button")
        page.settle()
        way = prefix_slot(SLOT)["path"]
        names = column(lowered(), "name_s")
        assert set(page.drawn(".followed")) == {f"n{index}" for index in way}
        assert len(page.drawn(".trail")) == len(way) - 1
        found = []
        for _ in way:
            before = page.params().get("node", "")
            page.tab.keyboard.press("]")
            page.tab.wait_for_function(
                "b => (new URLSearchParams(location.hash.split('?')[1]).get('node') ?? '') !== b",
                arg=before,
            )
            found.append(page.params()["node"])
        assert found == [names[index] for index in way]
        page.tab.keyboard.press("Escape")
        page.tab.wait_for_function("() => !location.hash.includes('slot')")
        page.settle()
        assert not page.drawn(".followed, .dim, .trail")

    def test_stages(self, page: Watched) -> None:
        page.go("#/graph")
        for stage in content("site")["stages"][1:]:
            page.tab.locator(".toolbar .segments a", has_text=stage).click()
            page.tab.wait_for_selector(f".toolbar [aria-current]:text-is('{stage}')")
            page.settle()
            graph = content(f"graph-{stage}")
            changes = column(graph, "change_s")
            new, changed = changes.count("new"), changes.count("changed")
            said = f"{new:,} new, {changed:,} changed, {graph['removed']:,} gone"
            assert said in page.tab.locator(".changes").inner_text()
            assert bool(page.drawn(".new")) == bool(new)


class TestSlots:
    def test_names_and_nodes(self, page: Watched) -> None:
        page.go("#/slots")
        page.tab.locator(".map canvas").first.hover(position={"x": 30, "y": 30})
        told = page.texts(".map .tip div")
        assert told[0] in [slot["name"] for slot in content("slots")["prefix"]]
        page.tab.locator(".map canvas").first.click(position={"x": 30, "y": 30})
        page.tab.wait_for_selector(".graph-view .steps button")
        page.settle()
        assert page.params()["slot"] == told[0]

    def test_tables_say_the_same(self, page: Watched) -> None:
        page.go("#/slots")
        slots = content("slots")
        for title, kind in (("Prefix slots", "prefix"), ("Memory slots", "memory")):
            page.tab.get_by_text(f"{title} as a table").click()
            rows = page.tab.get_by_role("region", name=title).locator("tbody a")
            rows.first.wait_for()
            assert rows.all_text_contents() == [slot["name"] for slot in slots[kind]]

    def test_program_time(self, page: Watched) -> None:
        slots = content("slots")
        time = len(slots["program"]) // 2
        page.go(f"#/slots?t={time}")
        alive = [m for m in slots["memory"] if m["from"] <= time <= m["until"]]
        said = page.tab.locator(".clock output").inner_text()
        assert slots["program"][time]["name"] in said
        assert f"{len(alive)} activation" in said
        assert f"{sum(m['size'] for m in alive):,} coordinates" in said


def test_cost(page: Watched) -> None:
    page.go("#/cost")
    cost = content("cost")
    assert page.tab.locator(".treemap .leaf").count() == len(cost["auxiliary"])
    lanes = list(dict.fromkeys(row["lane"] for row in cost["phases"]))
    assert page.texts(".bars:not(.compared) .bar-name") == lanes
    assert cost["lower_bound"]["text"] in page.texts(".bar-about")
    page.tab.get_by_role("button", name="Bytes").click()
    page.tab.wait_for_selector("[aria-pressed=true]:text-is('Bytes')")
    assert "B" in page.texts(".bar-value")[0]


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: npm ci in web/")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(page: Watched, theme: str, width: int) -> None:
    page.go("#/graph", page.url)
    page.tab.evaluate(AXE.read_text(encoding="utf-8"))
    slot = f"?slot={SLOT}&node=inner_lr"
    for view in ("graph", f"graph{slot}", "slots", "cost", "run"):
        page.look(width, 800, theme)
        page.go(f"#/{view}")
        found = page.tab.evaluate("axe.run({resultTypes: ['violations']})")
        said = [
            f"{view}: {one['id']}: {one['nodes'][0]['html'][:120]}" for one in found["violations"]
        ]
        assert not said
        wide = page.tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{view} is {wide} wide"
    page.look(1280, 800, "light")


def test_hostile_names_are_text(page: Watched, tmp_path: Path) -> None:
    found = write_site(hostile(), tmp_path / "site")
    server = PageServer(found.path, 0)
    server.start()
    before = list(page.requests)
    page = replace(page, url=server.url)  # the same tab
    try:
        page.go("#/graph?open=*")
        assert page.texts("h1 .model") == [HOSTILE[0]]
        names = page.texts("[role=treeitem] .name")
        for name in HOSTILE:
            assert any(name in shown for shown in names)
        graph = content("graph-lowered", found.path)
        modules = column(graph, "module_s")
        for name in HOSTILE:
            node = next(i for i, module in enumerate(modules) if name in module)
            page.go(f"#/graph?open=*&node={quote(column(graph, 'name_s')[node])}")
            said = page.texts(".panel dd")
            assert modules[node] in said
        for view in VIEWS:
            page.go(f"#/{view}")
            assert page.tab.evaluate("window.ran") is None
            assert page.tab.locator("main img, main script").count() == 0
        assert found.reason is not None
        assert found.reason in page.texts("main p")
        assert all(url.startswith(server.url) for url in page.requests[len(before) :])
    finally:
        page.requests[:] = before
        server.close()


def test_a_failure_shows_the_tab(
    page: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.go("#/cost")
    monkeypatch.setenv("TINTC_SCREENSHOTS", str(tmp_path))
    said = page.told("test_x[a/b]").splitlines()
    assert said == [f"tab: {page.url}#/cost", f"picture: {tmp_path}/failed-test-x-a-b-.png"]
    assert (tmp_path / "failed-test-x-a-b-.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.delenv("TINTC_SCREENSHOTS")
    assert page.told("x") == said[0]


def test_pictures(page: Watched) -> None:
    """Of every view, where a folder is asked for."""
    folder = os.environ.get("TINTC_SCREENSHOTS")
    if not folder:
        pytest.skip("TINTC_SCREENSHOTS names no folder")
    views = {
        "graph": "#/graph",
        "block": f"#/graph?open={BLOCK}",
        "followed": f"#/graph?slot={SLOT}",
        "captured": f"#/graph?stage=captured&open={BLOCK}",
        "slots": "#/slots",
        "cost": "#/cost",
        "run": "#/run",
    }
    for theme in ("light", "dark"):
        for width in (1280, 400):
            page.look(width, 900, theme)
            for name, hash_ in views.items():
                page.go(hash_, page.url)
                if name == "run":
                    run(page)
                page.tab.wait_for_timeout(250)
                path = Path(folder) / f"{name}-{theme}-{width}.png"
                page.tab.screenshot(path=path, full_page=name not in ("graph", "block", "followed"))


def test_nothing_went_wrong_or_out(page: Watched) -> None:
    """Of all that came before."""
    page.check_quiet()
