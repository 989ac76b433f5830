"""Tokens coloured by how their losses changed: the numbers against autograd in float64, and texts
that nobody would want executed, hidden or turned around.
"""

from __future__ import annotations

import copy
import io
import math
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

import tintc as package
from tests.oracle.reference import reference
from tests.support.artifacts import TEXT, artifact
from tests.support.models import opt, simulator_of
from tests.support.tolerances import SIMULATOR
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.runtime.showing.shown import Shown
from tintc.runtime.showing.tokens import (
    LEVELS,
    TokenLosses,
    colour,
    level,
    token_texts,
    visible,
)
from tintc.runtime.simulator import Simulator

HOSTILE = "</span><script>alert('1 & 2')</script>\x1b[2J\r\x07\u202egnp.\u2066\x9b1m\tend\u2028"
CONFIG = SimulatorConfig.exact(inner_lr=0.02)


class Letters:
    """Tokens are characters; what a tokenizer of any library must have."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(chr(97 + token) for token in ids)


def a_simulator() -> Simulator:
    return simulator_of(opt(), CONFIG)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, train mask and attention mask of two sequences, the second padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(0, 20, (2, 9))
    train = torch.zeros_like(ids)
    train[:, 2:5] = 1
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, train, mask


def expected_losses(row: int) -> tuple[list[float], list[float]]:
    """Of the tokens behind the first that is no padding, by torch.autograd."""
    ids, train, mask = batch()
    found = reference(opt(), CONFIG, ids, train, attention_mask=mask)
    first = int(mask[row].argmax())
    before, after = (
        F.cross_entropy(each[row, first:-1], ids[row, first + 1 :], reduction="none").tolist()
        for each in (found.initial_logits, found.logits)
    )
    return before, after


class TestOutputs:
    @pytest.mark.parametrize("row", [0, 1, -1])
    def test_losses_are_those_of_autograd(self, row: int) -> None:
        ids, train, mask = batch()
        both = (
            a_simulator()(ids, train, attention_mask=mask, return_initial=True),
            a_simulator().losses(ids, train, ids, attention_mask=mask, return_initial=True),
        )
        for out in both:
            tokens = out.show(Letters(), row).losses.tokens
            kept = mask[row].bool()
            assert [token.token for token in tokens] == ids[row, kept].tolist()
            assert [token.trained for token in tokens] == train[row, kept].bool().tolist()
            assert (tokens[0].before, tokens[0].after) == (None, None)
            found = [[t.before for t in tokens[1:]], [t.after for t in tokens[1:]]]
            assert found == [pytest.approx(e, rel=SIMULATOR[torch.float64]) for e in
                             expected_losses(row)]  # fmt: skip

    def test_masks_of_pairs(self) -> None:
        ids, train, mask = batch()
        pairs = mask[:, None, :] * mask[:, :, None]
        out = a_simulator()(ids, train, attention_mask=pairs, return_initial=True)
        assert len(out.show(Letters(), 1).losses.tokens) == 7

    def test_labels_say_which_tokens_have_a_loss(self) -> None:
        ids, train, _ = batch()
        labels = ids.masked_fill(train.bool(), -100)
        out = a_simulator().losses(ids, train, labels, return_initial=True)
        tokens = out.show(Letters()).losses.tokens
        assert [t.position for t in tokens if t.after is None] == [0, 2, 3, 4]

    def test_copies_know_their_tokens(self) -> None:
        ids, train, _ = batch()
        with torch.inference_mode():
            out = a_simulator()(ids, train, return_initial=True)
        assert str(copy.deepcopy(out).show(Letters())) == str(out.show(Letters()))

    def test_refused(self) -> None:
        ids, train, _ = batch()
        sim = a_simulator()
        for out in (sim(ids, train), sim.losses(ids, train, ids)):
            with pytest.raises(UsageError, match="call the simulator with return_initial=True"):
                out.show(Letters())
        few = sim(ids, train, return_initial=True, logits_to_keep=3)
        with pytest.raises(UsageError, match=r"logits of 3 of 9 positions; leave out logits_to"):
            few.show(Letters())
        whole = sim(ids, train, return_initial=True)
        with pytest.raises(UsageError, match="tokenizer is NoneType; expected one with decode"):
            whole.show(None)
        with pytest.raises(InputError, match="index is 2; the batch has 2 sequences"):
            whole.show(Letters(), 2)

    def test_an_exported_program_returns_what_it_did(self) -> None:
        ids, train, _ = batch()
        exported = torch.export.export(a_simulator(), (ids, train))
        out = exported.module()(ids, train)
        torch.testing.assert_close(out.logits, a_simulator()(ids, train).logits)
        with pytest.raises(UsageError, match="does not say which tokens it is of"):
            out.show(Letters())


class TestTexts:
    @given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=40))
    def test_of_tokens_make_up_the_text(self, text: str) -> None:
        """A token a byte: characters come from up to four of them."""
        ids = list(text.encode())
        found = list(token_texts(ids, lambda part: bytes(part).decode("utf-8", "replace")))
        assert len(found) == len(ids)
        assert "".join(found) == text

    def test_a_real_tokenizer(self) -> None:
        tokenizer = package.load(artifact()).tokenizer
        text = f"{TEXT} caf\u00e9 \u4e2d\u6587 \U0001f600\n\x1b"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        losses = TokenLosses.of_text(ids, tokenizer.decode, 3, [1.0] * (len(ids) - 1),
                                     [0.5] * (len(ids) - 1))  # fmt: skip
        assert "".join(piece.text for piece in losses.pieces()) == text
        shared = [piece for piece in losses.pieces() if len(piece.tokens) > 1]
        assert shared
        assert all(piece.change == -0.5 * len(piece.tokens) for piece in shared)

    def test_spaces_that_a_decoder_drops_in_front(self) -> None:
        vocabulary = {"\u2581a": 0, "\u2581b": 1, "c": 2, "\u2581": 3, "<unk>": 4}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.decoder = decoders.Metaspace()
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
        assert list(token_texts([0, 1, 2, 3, 0], decode)) == ["a", " b", "c", " ", " a"]

    def test_all_that_moves_a_cursor_is_spelled_out(self) -> None:
        assert (
            visible("a\n\t\r\x1b\x9b\u202e\u2028") == "a\u21b5\n\u21e5\\r\\x1b\\x9b\\u202e\\u2028"
        )
        assert visible("\u4e2d\u200d\U0001f469") == "\u4e2d\u200d\U0001f469"
        assert visible("\u4e2d\n", ascii_only=True) == "\\u4e2d\\n\n"

    @pytest.mark.parametrize(
        ("change", "expected"),
        [(None, 0), (math.nan, 0), (0.0, 0), (-0.09, 0), (-0.1, -1), (0.7, 2), (-math.inf, -3)],
    )
    def test_levels(self, change: float | None, expected: int) -> None:
        assert level(change) == expected

    def test_dark_ink_can_be_read_on_every_colour(self) -> None:
        """Contrast as WCAG 2.2 defines it, at least 4.5, against #111111."""

        def luminance(colour: str) -> float:
            channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for size in (size for size in range(-len(LEVELS), len(LEVELS) + 1) if size):
            assert (luminance(colour(size)) + 0.05) / (luminance("#111111") + 0.05) > 4.5


def shown(*texts: str, trained: int = 1) -> Shown:
    """These tokens; the loss of each is half of what it was."""
    before = [float(n) for n in range(1, len(texts))]
    return Shown(
        TokenLosses.of_text(
            range(len(texts)), lambda ids: "".join(texts[i] for i in ids), trained, before,
            [loss / 2 for loss in before],
        )
    )  # fmt: skip


def printed(what: Shown, width: int = 80, encoding: str = "utf-8", **options: object) -> str:
    taken = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    Console(file=taken, width=width, **options).print(what)  # type: ignore[arg-type]
    return taken.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


class TestTerminal:
    def test_marks_where_there_are_no_colours(self) -> None:
        lines = str(shown("The", " sea", " rises", "\n", "end", trained=2)).splitlines()
        assert len(lines[0]) < 80
        assert lines[0].startswith("loss: \u25be\u25be\u25be -1 ")
        assert lines[1:3] == [
            "\u27e6The sea\u25be\u25be\u27e7 rises\u25be\u25be\u25be\u21b5\u25be\u25be\u25be",
            "end\u25be\u25be\u25be",
        ]
        assert lines[3:] == [
            "1 trained on: mean loss 1.000 -> 0.500 nats",
            "3 predicted: mean loss 3.000 -> 1.500 nats",
        ]

    @pytest.mark.parametrize("plain", [{}, {"force_terminal": True, "no_color": True}])
    def test_no_terminal_or_no_colours(self, plain: dict[str, bool]) -> None:
        assert "sea\u25be\u25be" in printed(shown("The", " sea"), **plain)

    def test_colours(self) -> None:
        found = printed(shown("The", " sea"), force_terminal=True, color_system="truecolor")
        assert "\x1b[38;2;17;17;17;48;2;" in found
        assert "\u25be" not in found

    def test_an_encoding_that_has_no_triangles(self) -> None:
        found = printed(shown("Caf\u00e9", " \u4e2d"), encoding="ascii")
        assert found.splitlines()[1] == "[[Caf\\xe9]] \\u4e2d--"

    def test_wide_characters_count_twice(self) -> None:
        lines = printed(shown("\u4e2d" * 30, trained=0), width=20).splitlines()
        assert lines[-3:] == ["\u4e2d" * 10] * 3

    def test_hostile_texts(self) -> None:
        found = printed(shown("a", HOSTILE), force_terminal=True, color_system="truecolor")
        for hidden in ("\x1b[2J", "\r", "\x07", "\u202e", "\u2066", "\x9b", "\u2028"):
            assert hidden not in found
        assert "\\x1b[2J" in found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


class TestNotebook:
    def test_hostile_texts_are_texts(self) -> None:
        reader = _Reader()
        written = shown("a", HOSTILE, '" onmouseover="x', "&lt;", trained=2)._repr_html_()
        reader.feed(written)
        assert reader.tags == {"figure", "div", "span", "figcaption", "br"}
        assert reader.attributes == {"style", "title"}
        assert visible("a" + HOSTILE + '" onmouseover="x&lt;') in reader.text

    def test_numbers_and_what_is_trained(self) -> None:
        written = shown("The", " sea", trained=2)._repr_html_()
        assert 'title="token 0: no loss, trained on"' in written
        assert "token 1: loss 1.000 before, 0.500 after (-0.500), trained on" in written
        assert "1 trained on: mean loss 1.000 -&gt; 0.500 nats" in written
