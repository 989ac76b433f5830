"""What README and the pages of docs/ print is what a reader gets."""

import re
from pathlib import Path

import pytest

from tests.docs.snippets import ROOT, check, commands, run_page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]
WITH_CODE = [page for page in PAGES if re.search(r"^```(python|console)", page.read_text(), re.M)]
# These run by default. Guides and concepts, which compile once more each, do not; nor does what a
# tutorial says of the commands that README shows.
DEFAULT = {"README.md", "tutorials"}
SLOW = {"paragraph.md"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_slow(page: Path) -> bool:
    return page.name in SLOW or not DEFAULT & {page.name, page.parent.name}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * is_slow(page))
        for page in WITH_CODE
    ],
)
def test_a_page_does_what_it_prints(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


def test_readme_and_all_tutorials_run() -> None:
    """Nothing in them is left out but what their text says."""
    must = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
    assert set(must) <= {*WITH_CODE, ROOT / "docs" / "tutorials" / "index.md"}
    assert len(must) >= 4


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6000


def test_a_ratio_of_speed_names_its_processor() -> None:
    """It is the one of speed.md's rows, and those of other processors stand beside it, as it holds
    for one alone.
    """
    (row,) = (
        line for line in (ROOT / "README.md").read_text().splitlines() if "tintc bench" in line
    )
    speed = (ROOT / "docs" / "guides" / "speed.md").read_text()
    table = [line.split(" | ") for line in speed.splitlines() if re.match(r"\| \w+-\w+, \d", line)]
    assert len(table) >= 6
    assert all("EPYC" in processor or "AVX-512" in processor for _, processor, *_ in table)
    ratios = {ratio for name, _, ratio, *_ in table if name == "| OPT-125M, 256 x 8"}
    assert len(ratios) == 3
    assert all(ratio in row for ratio in ratios)
    assert "AMD EPYC" in row and "with AVX-512" in row
    (measured,) = re.findall(r"\| 256 x 8 \| `paper` \| (0\.\d+) \(", speed)
    assert row.startswith(f"| {float(measured):.2f} |")


def page(folder: Path, text: str) -> int:
    (folder / "page.md").write_text(text, encoding="utf-8")
    (folder / "run").mkdir()
    return run_page(folder / "page.md", folder / "run")


def test_output_is_compared(tmp_path: Path) -> None:
    wrong = "```python\nprint('a', 1.5)\n```\n\n```text\na 1.6\n```\n"
    with pytest.raises(AssertionError, match=r"page\.md"):
        page(tmp_path, wrong)


def test_a_page_is_one_session(tmp_path: Path) -> None:
    text = "```python\nx = 2\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n"
    assert page(tmp_path, text + "\n```console\n$ echo a b; echo c\na  b\nc\n```\n") == 3


def test_a_command_must_succeed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 2"):
        page(tmp_path, "```console\n$ tintc inspect --format nothing sim\n```\n")


def test_a_stated_reason_leaves_a_block_out(tmp_path: Path) -> None:
    assert page(tmp_path, "*Not run by the tests: no network.*\n\n```console\n$ false\n```\n") == 0


def test_commands_are_split() -> None:
    found = commands("$ a \\\n  --b\nout\n$ c\n")
    assert [(command.split(), output) for command, output in found] == [
        (["a", "--b"], "out\n"),
        (["c"], ""),
    ]


def test_numbers_have_a_tolerance_and_words_have_none() -> None:
    check("loss 1.000 ... end", "loss  1.005 and so on\nend", "here")
    with pytest.raises(AssertionError):
        check("loss 1.000", "loss 1.02", "here")
    with pytest.raises(AssertionError):
        check("237 tokens", "238 tokens", "here")
