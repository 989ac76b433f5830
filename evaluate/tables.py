"""Reports as tables that people read, in a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tintc.evaluate.language import ASCENT, DYNAMIC, SHUFFLED, SIMULATOR, UNMODIFIED
from tintc.ir.rule_values import RULE, rule_text

_NOT_FINITE = "not finite"
_TOO_MUCH = 1e4  # per cent


@dataclass(frozen=True)
class Table:
    """header: of each column. rows: of texts. numeric: from which column on texts are numbers,
    which stand to the right. notes: below.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    numeric: int = 1

    def markdown(self) -> str:
        """A table as GitHub shows it."""
        lines = ["| " + " | ".join(self.header) + " |"]
        lines.append(
            "|"
            + "|".join(
                "---" if column < self.numeric else "---:" for column in range(len(self.header))
            )
            + "|"
        )
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return (
            "\n".join(
                [f"**{self.title}**", "", *lines, "", *(f"{note}  " for note in self.notes)]
            ).rstrip()
            + "\n"
        )


def lm_table(report: dict[str, Any]) -> Table:
    """One row a training fraction and learner."""
    data, settings = report["data"], report["settings"]
    rows: list[tuple[str, ...]] = [
        (
            f"{row['fraction']:g}" if row["learner"] == UNMODIFIED else "",
            _learner(row, len(settings["presets"]) > 1),
            rate(row["inner_lr"], row.get("rule"), settings),
            number(row["perplexity"]),
            "" if row["learner"] == UNMODIFIED else change(row["change"], row["error"]),
            p_value(row["p_value"]),
            share(row["share"]),
            f"{row['seconds']:.2f}",
        )
        for row in report["rows"]
    ]
    chosen = f"The learning rate {settings['inner_lr']} was given."
    if settings["inner_lr"] is None:
        where = data.get("chosen_on", "the first quarter of the file")
        chosen = f"Learning rates were chosen on {data['choosing_sequences']} sequences of {where}."
    return Table(
        f"{report['model']['name']} on {data['name']}: perplexity of the rest of each sequence",
        (
            "trained part",
            "learner",
            "rate",
            "perplexity",
            "change",
            "p",
            "of dyn. eval.",
            "s / seq.",
        ),
        rows,
        (
            f"n = {data['sequences']} sequences of {settings['tokens']} tokens (seeds "
            f"{', '.join(map(str, settings['seeds']))}); "
            f"{budget(settings, settings.get('changes'))}. {chosen}",
            "Change: of the perplexity against the unmodified model, ± standard error over "
            "sequences; "
            "p: paired permutation test against the unmodified model.",
        ),
        numeric=2,
    )


def classify_table(report: dict[str, Any]) -> Table:
    """One row a number of demonstrations and learner, one column a task."""
    results, settings = report["results"], report["settings"]
    tasks = list(dict.fromkeys(result["task"] for result in results))
    titles = {result["task"]: result["title"] for result in results}
    rows: list[tuple[str, ...]] = []
    for shots in settings["shots"]:
        cells = {result["task"]: result["rows"] for result in results if result["shots"] == shots}
        averages = [row for row in report["averages"] if row["shots"] == shots]
        for index, average in enumerate(averages):
            found = [_accuracy(cells[task][index]) for task in tasks]
            p = p_value(average["p_unmodified"])
            rows.append(
                (
                    f"{shots}" if index == 0 else "",
                    average["name"],
                    *found,
                    f"{100 * average['accuracy']:.1f}",
                    p,
                )
            )
    items = sorted({result["rows"][0]["n"] for result in results})
    used = sorted(
        {count for result in results if result["shots"] for count in result["demonstrations"]}
    )
    fit = (
        f"; {' to '.join(str(count) for count in dict.fromkeys((used[0], used[-1])))} "
        "demonstrations fitted"
        if used
        else ""
    )
    return Table(
        f"{report['model']['name']}: accuracy in per cent",
        ("shots", "learner", *(titles[task] for task in tasks), "average", "p"),
        rows,
        (
            f"n = {' to '.join(str(count) for count in dict.fromkeys((items[0], items[-1])))} test "
            "items of each task; "
            "± standard error over demonstrations drawn with seeds "
            f"{', '.join(map(str, settings['seeds']))}{fit}.",
            f"Demonstrations: {settings['form']}, loss on {settings['loss']}; zero-shot: each "
            "item's own context is trained on. "
            "Rate, budget, template and calibration were chosen on training data.",
            "p: paired permutation test over the items of all tasks against the unmodified model.",
            *([f"Inner rule: {rule}."] if (rule := _rule(settings.get("changes"))) else []),
        ),
        numeric=2,
    )


def ablate_table(report: dict[str, Any]) -> Table:
    """One row a variant."""
    data, settings = report["data"], report["settings"]
    rows: list[tuple[str, ...]] = [
        (
            row["variant"],
            *("" if row[name] is None else f"{row[name]:.4f}" for name in ("cosine", "min_cosine")),
            "" if row["relative_error"] is None else f"{row['relative_error']:.2g}",
            rate(row["inner_lr"]),
            number(row["perplexity"]),
            change(row["change"], row["error"]),
            share(row["share"]),
            p_value(row["p_value"]),
            f"{row['seconds']:.2f}",
        )
        for row in report["rows"]
    ]
    chosen = (
        f"chosen for each on {data['choosing_sequences']} other sequences"
        if settings["inner_lr"] is None
        else "given"
    )
    return Table(
        f"{report['model']['name']} on {data['name']}: what each approximation costs",
        (
            "variant",
            "cosine",
            "worst block",
            "rel. error",
            "rate",
            "perplexity",
            "change",
            "of exact",
            "p",
            "s / seq.",
        ),
        rows,
        (
            f"n = {data['sequences']} sequences of {settings['tokens']} tokens, the first "
            f"{settings['trained']} trained on; "
            f"{budget(settings, settings.get('rule'))}; rates {chosen}.",
            "Cosine and relative error: of one step's update with the exact gradient in float64, "
            f"on {settings['error_sequences']} sequences. Change: of the perplexity against the "
            "unmodified model in the same float format, "
            "± standard error; p: paired, against exact.",
        ),
    )


def stream_table(report: dict[str, Any]) -> Table:
    """One row a learner."""
    data, settings = report["data"], report["settings"]
    rows: list[tuple[str, ...]] = [
        (
            row["name"],
            rate(row["inner_lr"], row["rule"], settings),
            number(row["perplexity"]),
            number(row["bits_per_byte"], 4),
            interval(row, "change", "{:+.2f} %"),
            *(
                "" if row["learner"] in (ASCENT, SHUFFLED) else interval(row, name, form)
                for name, form in (("gain", "{:.3f}"), ("share", "{:.2f}"))
            ),
            f"{row['seconds']:.1f}",
        )
        for row in report["rows"]
    ]
    documents, chosen_on = data["documents"], data["choosing_documents"]
    of = "of the evaluated text" if data.get("chosen_on") is None else f"of {data['chosen_on']}"
    chosen = f"Rates were chosen on {len(chosen_on)} documents {of}."
    if settings["inner_lr"] is not None:
        chosen = f"The learning rate {settings['inner_lr']} was given."
    first = "" if data["first_token_counts"] else ", the first token's not counted"
    return Table(
        f"{report['model']['name']} on {data['name']}: every chunk scored, then trained on",
        (
            "learner",
            "rate",
            "perplexity",
            "bits per byte",
            "change",
            "gain",
            "of dyn. eval.",
            "s / doc.",
        ),
        rows,
        (
            f"n = {len(documents)} documents, {sum(d['targets'] for d in documents)} targets of "
            f"{sum(d['bytes'] for d in documents)} bytes{first}; {_windows(settings)}; "
            f"{budget(settings, settings['changes'])}. {chosen}",
            "Change of the perplexity, gain (what it is lower by) and its share of dynamic "
            "evaluation's, with 95 % intervals by bootstrap over documents.",
            *_chosen(settings["limit"], documents),
            *_up_to(report["rows"]),
            *_overflows(report["rows"]),
        ),
    )


def _windows(settings: dict[str, Any]) -> str:
    """How a text is cut, in words."""
    cut = settings["cut"]
    batch = f", {settings['batch']} side by side" if cut["reset"] == "never" else ""
    return (
        f"chunks of {cut['chunk']} with {cut['context']} tokens before them, keys {cut['keys']}, "
        f"reset {cut['reset']}{batch}"
    )


def _chosen(limit: int | None, documents: list[dict[str, Any]]) -> list[str]:
    """Which documents were taken of a text; their titles are in the report."""
    numbers = ", ".join(str(each["number"]) for each in documents)
    return [] if limit is None else [f"The longest documents, by their numbers from 0: {numbers}."]


def _up_to(rows: list[dict[str, Any]]) -> list[str]:
    """Of the first learner, how the gain grows with the text."""
    if len(rows) < 2:
        return []
    parts = [
        f"{part['last']} targets {interval(part['up_to'], 'change', '{:+.2f} %')}"
        for part in rows[1]["curve"]
    ]
    return [f"Change of {rows[1]['name']} over the first {', '.join(parts)}."]


def _overflows(rows: list[dict[str, Any]]) -> list[str]:
    """Controls that diverged."""
    return [
        f"{row['name']}: losses not finite in document {row['overflow']['document']}, chunk "
        f"{row['overflow']['chunk']}."
        for row in rows
        if "overflow" in row
    ]


def interval(row: dict[str, Any], name: str, form: str) -> str:
    """A value with its interval behind it; nothing where there is none."""
    if name not in row:
        return ""
    value, between = row[name], row[f"{name}_interval"]
    if value is None or not math.isfinite(value):
        return _NOT_FINITE
    if abs(value) >= _TOO_MUCH:
        return "> 100 x"
    known = all(end is not None and math.isfinite(end) for end in between)
    ends = f" ({', '.join(form.format(end).removesuffix(' %') for end in between)})"
    return form.format(value) + (ends if known else "")


def _accuracy(row: dict[str, Any]) -> str:
    error = "" if row["standard_error"] is None else f" ± {100 * row['standard_error']:.1f}"
    return f"{100 * row['accuracy']:.1f}{error}"


def _learner(row: dict[str, Any], presets: bool) -> str:
    if not presets or row["learner"] == UNMODIFIED:
        return str(row["learner"])
    if row["learner"] == DYNAMIC:
        return f"{DYNAMIC} ({'all of' if row['norm_update'] == 'all' else 'shifts of'} norms)"
    exact = row["config"]["attention_gradient"] == "full"
    return str(row["learner"]).replace(SIMULATOR, f"{SIMULATOR} ({'exact' if exact else 'paper'})")


def budget(settings: dict[str, Any], rule: dict[str, Any] | None = None) -> str:
    """Steps, layers and the inner rule, unless it is plain sgd, in words."""
    steps, layers = settings["steps"], settings["layers"]
    blocks = "all blocks" if layers is None else f"the top {layers} blocks"
    where = [] if rule and rule.get("train") else [blocks]
    named = [found] if (found := _rule(rule)) else []
    return ", ".join([f"{steps} step{'s' if steps > 1 else ''}", *where, *named])


def _rule(fields: dict[str, Any] | None) -> str:
    """In words; nothing for plain sgd. fields: of a config, others than the rule's too."""
    rule = {name: value for name, value in (fields or {}).items() if name in RULE}
    return rule_text(rule) if rule else ""


def rate(
    value: float | None,
    rule: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> str:
    """With what was chosen beside it."""
    chosen = {"momentum": "momentums", "decay": "decays"}
    parts = [
        f"{name} {(rule or {}).get(name, 0):g}"
        for name, grid in chosen.items()
        if (settings or {}).get(grid)
    ]
    return "" if value is None else ", ".join([f"{value:g}", *parts])


def number(value: float | None, digits: int = 3) -> str:
    """None is what JSON made of a number that is not finite."""
    return _NOT_FINITE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def change(value: float | None, error: float | None) -> str:
    """In per cent, with its standard error where there is one."""
    if value is None or not math.isfinite(value):
        return _NOT_FINITE
    spread = "" if error is None or math.isnan(error) else f" ± {error:.2f}"
    return f"{value:+.2f}{spread} %" if abs(value) < _TOO_MUCH else "> 100 x"


def share(value: float | None) -> str:
    """Of another's gain; nothing where there is no gain to speak of."""
    return "" if value is None or not 0 <= value < 10 else f"{value:.0%}"


def p_value(value: float | None) -> str:
    """As tables have it."""
    return (
        ""
        if value is None
        else "-"
        if math.isnan(value)
        else "< 0.001"
        if value < 0.001
        else f"{value:.3f}"
    )


TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "lm": lm_table,
    "classify": classify_table,
    "ablate": ablate_table,
    "stream": stream_table,
}
