"""Draws what one simulated step does to a paragraph: the loss of every token before and after.

    python examples/paragraph_picture.py examples/paragraph.txt docs/images/paragraph.png

Needs matplotlib. Trains on the first half of the text and prints the mean loss of the second half.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import tintc

COLUMNS = 112  # characters of one line of the picture
LIMIT = 1.0  # nats: the change at which the colour is full
Colour = tuple[float, ...] | None
plt.rcParams |= {"font.size": 9, "font.family": "DejaVu Sans"}


def losses(text: str) -> tuple[list[tuple[int, int]], int, torch.Tensor, torch.Tensor]:
    """Characters of each token, how many tokens are trained, and losses (T,) in nats, before and
    after; that of token t at t.
    """
    simulator = tintc.compile("tiny-opt", tintc.SimulatorConfig.paper(inner_lr=1e-4))
    batch = simulator.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    ids, spans = batch["input_ids"], batch["offset_mapping"][0].tolist()
    trained = ids.shape[1] // 2
    train_mask = (torch.arange(ids.shape[1]) < trained).long()[None]
    with torch.inference_mode():
        out = simulator.losses(ids, train_mask, ids, return_initial=True)
    return spans, trained, out.initial_losses[0].roll(1), out.losses[0].roll(1)


def colour(change: float) -> tuple[float, ...]:
    """Blue for a loss that fell, red for one that rose; light enough to read text on it."""
    part = min(1.0, max(-1.0, change / LIMIT))
    return tuple(plt.get_cmap("RdBu_r")(0.5 + 0.32 * part))


def places(text: str) -> dict[int, tuple[int, int]]:
    """Line and column of each character in the wrapped text."""
    found, at = {}, 0
    for row, line in enumerate(textwrap.wrap(text, COLUMNS)):
        at = text.index(line, at)
        found |= {at + column: (row, column) for column in range(len(line))}
        at += len(line)
    return found


def draw_text(axes: Axes, text: str, colours: list[Colour]) -> None:
    """The text, a cell a character, with the colour of its token behind it."""
    where = places(text)
    axes.set(xlim=(0, COLUMNS), ylim=(1 + max(row for row, _ in where.values()), 0))
    axes.axis("off")
    for at, (row, column) in where.items():
        colour = colours[at]
        if colour is not None:
            axes.add_patch(Rectangle((column, row + 0.06), 1.03, 0.88, color=colour, lw=0))
        axes.text(
            column + 0.5,
            row + 0.5,
            text[at],
            family="DejaVu Sans Mono",
            fontsize=7.6,
            ha="center",
            va="center",
            color="#8a8a8a" if colour is None else "#111111",
            in_layout=False,
        )


def draw_losses(axes: Axes, first: int, before: list[float], after: list[float]) -> None:
    """A line from each predicted token's loss before to its loss after, which has the dot."""
    tokens = range(first, first + len(before))
    colours = [colour(b - a) for b, a in zip(after, before, strict=True)]
    axes.scatter(tokens, before, s=5, color="#b0b0b0", label="before", zorder=1)
    axes.vlines(tokens, before, after, colors=colours, lw=1.6, zorder=2)
    axes.scatter(tokens, after, s=7, color=colours, edgecolors="#333333", lw=0.3, zorder=3)
    axes.scatter([], [], s=7, color=colour(-LIMIT), edgecolors="#333333", lw=0.3, label="after")
    axes.set(xlim=(first - 1, tokens.stop), ylim=(0, None), xlabel="token", ylabel="loss (nats)")
    axes.legend(loc="upper right", ncols=2, fontsize=8)


def main(file: str, target: str) -> None:
    text = Path(file).read_text(encoding="utf-8").strip()
    spans, trained, before, after = losses(text)
    colours: list[Colour] = [None] * len(text)
    for (start, stop), change in zip(spans[trained:], (after - before)[trained:], strict=True):
        colours[start:stop] = [colour(float(change))] * (stop - start)

    figure, (words, curve) = plt.subplots(
        2, 1, figsize=(9.2, 5.4), height_ratios=(4, 3), layout="constrained"
    )
    draw_text(words, text, colours)
    words.set_title(
        "grey: trained on inside the forward pass.  "
        "Coloured: predicted with the updated weights (blue: more likely than before).",
        fontsize=8.5,
        loc="left",
    )
    draw_losses(curve, trained, before[trained:].tolist(), after[trained:].tolist())
    means = f"{before[trained:].mean():.3f} before, {after[trained:].mean():.3f} after"
    curve.set_title(f"mean of the predicted half: {means}", fontsize=8.5, loc="left")
    figure.savefig(target, dpi=150)
    print(f"mean loss of {len(spans) - trained} predicted tokens: {means}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
