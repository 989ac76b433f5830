"""The page trains the model in a real browser. Each test goes to its view itself, with what it sets
in the URL: whoever runs them may deal them out to several tabs.
"""

from __future__ import annotations

from urllib.parse import quote, urlencode

import pytest
import torch

import tintc
from tests.support.artifacts import TEXT, artifact
from tests.support.browser import DONE, Watched, run, why_no_browser

pytestmark = [
    pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser())),
    pytest.mark.xdist_group("browser"),
]
CLOSE = 1e-3  # between losses of the page, in float32, and the simulator's
ODD_TEXTS = (
    "Hello world, héllo 漢字 😀!",
    "  two  spaces\nand\ta line\n\n",
    "def f(x):\n    return {x: '</s>'}",
    "ﬁne ﬀ  naïve İstanbul ß",
)
RATE = 0.1  # ten times the compiled one
IN_VIEW = f"#/run?{urlencode({'text': TEXT, 'trained': 9, 'lr': RATE})}"


def test_losses_are_the_simulators(page: Watched) -> None:
    seen = len(page.requests)
    page.go("#/run", page.url)
    assert "fetches" in page.tab.locator(".controls").inner_text()
    assert not any(".wasm" in url or ".onnx" in url for url in page.requests[seen:])
    page.tab.get_by_label("Text", exact=True).fill(TEXT)
    ids = loaded_ids(TEXT)
    page.tab.wait_for_function(f"() => document.querySelectorAll('.token').length === {len(ids)}")
    move_handle(page, "Home", *["ArrowRight"] * 9)
    page.tab.evaluate("rate => { location.hash += `&lr=${rate}` }", RATE)
    run(page)
    agree(page, ids, trained=9)
    assert any(".wasm" in url for url in page.requests[seen:])


def test_runs_again_by_itself(page: Watched) -> None:
    """Once the model is there, another trained part needs no button."""
    page.go(IN_VIEW)
    run(page)
    handle = page.tab.locator(".handle").bounding_box()
    target = page.tab.locator(".token").nth(15).bounding_box()
    page.tab.mouse.move(handle["x"] + 6, handle["y"] + 12)
    page.tab.mouse.down()
    page.tab.mouse.move(target["x"] + 2, target["y"] + 12, steps=4)
    page.tab.mouse.up()
    page.tab.wait_for_function("() => document.querySelector('.handle').ariaValueNow === '15'")
    page.tab.wait_for_selector(DONE)
    agree(page, loaded_ids(TEXT), trained=15)


def test_figures_are_of_what_is_set(page: Watched) -> None:
    """Another trained part is set while the model is fetched: it runs too."""
    page.go(IN_VIEW, page.url)
    page.tab.evaluate(
        """() => {
            document.querySelector("#run").click();
            const key = new KeyboardEvent("keydown", {key: "ArrowRight"});
            document.querySelector(".handle").dispatchEvent(key);
        }"""
    )
    page.tab.wait_for_selector(DONE)
    assert page.params()["trained"] == "10"
    agree(page, loaded_ids(TEXT), trained=10)


def test_goes_on(page: Watched) -> None:
    """Greedily, as Hugging Face's generate does under the same weights."""
    page.go(IN_VIEW)
    page.tab.get_by_role("button", name="Continue the text").click()
    page.tab.wait_for_selector("[data-generated=before][data-ids]")
    page.tab.wait_for_selector(".generation button:enabled:text-is('Continue the text')")
    assert not page.tab.locator(".generation .failed").inner_text()
    ids = torch.tensor([loaded_ids(TEXT)])
    train = (torch.arange(ids.shape[1]) < 9)[None].long()
    simulator = tintc.load(artifact())
    for name, rate in (("after", RATE), ("before", 0.0)):
        simulator.inner_lr.data.fill_(rate)
        made = page.tab.locator(f"[data-generated={name}]").get_attribute("data-ids")
        found = [int(each) for each in made.split()]
        expected = simulator.adapt(ids, train).generate(
            ids, max_new_tokens=len(found), do_sample=False
        )
        assert found == expected[0, ids.shape[1] :].tolist()


def test_tokens_are_transformers(page: Watched) -> None:
    for text in ODD_TEXTS:
        page.go(f"#/run?text={quote(text)}")
        found = page.tab.locator(".token").evaluate_all("all => all.map(e => +e.dataset.id)")
        assert found == loaded_ids(text)


def test_error_is_one_line(page: Watched) -> None:
    page.go(f"#/run?lr=1e30&text={quote(TEXT)}")
    page.tab.locator("#run").click()
    page.tab.wait_for_selector(".figures [role=alert]")
    (said,) = page.texts(".figures [role=alert]")
    assert "learning rate is too large" in said and "\n" not in said


def test_nothing_went_wrong_or_out(page: Watched) -> None:
    """Of all that came before."""
    page.check_quiet()


def move_handle(page: Watched, *keys: str) -> None:
    page.tab.get_by_role("slider", name="Tokens that are trained on").focus()
    for key in keys:
        page.tab.keyboard.press(key)


def agree(page: Watched, ids: list[int], trained: int) -> None:
    """Losses and perplexities with those of the torch simulator."""
    simulator = tintc.load(artifact())
    simulator.inner_lr.data.fill_(RATE)
    tokens = torch.tensor([ids])
    train = (torch.arange(len(ids)) < trained)[None].long()
    with torch.inference_mode():
        expected = simulator.losses(tokens, train, tokens, return_initial=True)
    for name, losses in (("after", expected.losses), ("before", expected.initial_losses)):
        found = page.tab.locator(".token").evaluate_all(
            "(all, name) => all.slice(1).map(e => +e.dataset[name])", name
        )
        assert losses is not None
        assert torch.tensor(found) == pytest.approx(losses[0, : len(ids) - 1], abs=CLOSE)
        rest = losses[0, trained - 1 : len(ids) - 1].double().mean().exp()
        shown = page.texts(f"[data-figure={name}-training]")[0]
        assert float(shown) == pytest.approx(float(rest), abs=0.006 + CLOSE * float(rest))
    changed = (expected.losses - expected.initial_losses).abs().max()
    assert changed > 10 * CLOSE  # else nothing was compared


def loaded_ids(text: str) -> list[int]:
    found: list[int] = tintc.load(artifact()).tokenizer(text)["input_ids"]
    return found
