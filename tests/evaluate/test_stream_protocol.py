"""The streaming experiment: its numbers against autograd and torch.optim in float64
(tests/oracle/streaming.py), what it chooses on, its resumption, and what it refuses.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.oracle.streaming import streamed
from tests.support.artifacts import TEXT, source_directory
from tintc.compiler.casts import no_casts
from tintc.evaluate import reports, stream
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.language import ASCENT, DYNAMIC, SHUFFLED, SIMULATOR, UNMODIFIED, Run
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.evaluate.store import Store
from tintc.evaluate.stream_documents import Passage, longest
from tintc.evaluate.stream_learners import shuffled
from tintc.evaluate.stream_rows import Measured, rows_of
from tintc.evaluate.stream_settings import Settings
from tintc.evaluate.tables import stream_table
from tintc.evaluate.text import Text
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, NumericalError, TintcError, UsageError
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.windows import IGNORED, Fresh, window

CHUNK, CONTEXT, RATE = 5, 7, 0.02
SEA = "The sea is deep, and the boats go out in the morning; häßlich grüßt ✓ the tide."
DOCUMENTS = (TEXT, "A short one.", SEA, "The hills are above the town, the town is below.")
STORY = Text("story", "".join(DOCUMENTS), DOCUMENTS)
OTHER = Text("other", "".join(DOCUMENTS[::-1]), (f"Once more: {TEXT}", "It is wide and long."))
SETTINGS = Settings(
    cut=StreamSettings(CHUNK, CONTEXT),
    inner_lr=RATE,
    limit=3,
    presets=("exact", "paper"),
    buckets=3,
)
CUT = [each.name for each in dataclasses.fields(StreamSettings)]


@cache
def auxiliary() -> Auxiliary:
    return Auxiliary(str(source_directory()), dtype=torch.float64)


@cache
def huggingface() -> Any:
    return transformers.OPTForCausalLM.from_pretrained(
        source_directory(), dtype=torch.float64
    ).eval()


def settings(**changes: Any) -> Settings:
    cut = {name: changes.pop(name) for name in CUT if name in changes}
    return dataclasses.replace(SETTINGS, cut=dataclasses.replace(SETTINGS.cut, **cut), **changes)


def run(chosen: Settings = SETTINGS, store: Store | None = None, **options: Any) -> dict[str, Any]:
    text, other = options.pop("text", STORY), options.pop("other", None)
    return stream.run(auxiliary(), text, other, chosen, store or Store(None, {}), **options)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"]}


def numbers(report: dict[str, Any]) -> Any:
    """The report without its times."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]
    return {**report, "rows": rows, "settings": {**report["settings"], "batch": None}}


def passages(limit: int = 3, tokens: int | None = None) -> list[Passage]:
    return longest(auxiliary().tokenizer, list(enumerate(DOCUMENTS)), limit, tokens)


def by_autograd(config: SimulatorConfig, documents: list[Tensor], **options: Any) -> list[Tensor]:
    """Losses of the documents of one row."""
    trained = updated_parameters(auxiliary().simulator(config))
    with no_casts():
        found = streamed(
            huggingface(), config, documents, trained, chunk=CHUNK, context=CONTEXT,
            longest=auxiliary().facts.longest, **options,
        )  # fmt: skip
    return found.losses


def total(losses: list[Tensor]) -> float:
    return float(torch.cat(losses).sum())


RULE: dict[str, Any] = {"momentum": 0.9, "schedule": "linear", "decay": 0.1}
LEARNERS = {
    UNMODIFIED: {"inner_lr": 0.0},
    f"{SIMULATOR} (exact)": {"inner_lr": RATE},
    f"{DYNAMIC} (all of norms)": {"inner_lr": RATE},
    f"{SIMULATOR} (exact), gradient ascent": {"inner_lr": -RATE},
}


@pytest.mark.parametrize("keys", ["recompute", "cache"])
def test_rows_are_those_of_an_independent_loop(keys: str) -> None:
    chosen = settings(keys=keys, steps=2, changes=RULE)
    rows, documents = by_name(run(chosen)), [each.ids_N for each in passages()]
    expected = {
        name: SimulatorConfig.exact(steps=2, **RULE, **fields) for name, fields in LEARNERS.items()
    }
    expected[f"{DYNAMIC} (shifts of norms)"] = SimulatorConfig.exact(
        steps=2, norm_update="bias", inner_lr=RATE, **RULE
    )
    if keys == "recompute":
        expected[f"{SIMULATOR} (paper)"] = SimulatorConfig.paper(steps=2, inner_lr=RATE, **RULE)
    found = {
        name: total(by_autograd(config, documents, keys=keys)) for name, config in expected.items()
    }
    for name, nll in found.items():
        assert rows[name]["nll"] == pytest.approx(nll, rel=1e-8), name
        assert rows[name]["targets"] == sum(len(each) - 1 for each in documents)
        assert rows[name]["perplexity"] == pytest.approx(math.exp(nll / rows[name]["targets"]))
    start, after = (rows[n] for n in (UNMODIFIED, f"{SIMULATOR} (exact)"))
    gain = start["perplexity"] - after["perplexity"]
    assert after["change"] == pytest.approx(-100 * gain / start["perplexity"])
    assert after["gain"] == pytest.approx(gain)
    assert abs(gain) > 1
    for preset, norms in (("exact", "all"), ("paper", "shifts")):
        one, other = rows[f"{SIMULATOR} ({preset})"], rows[f"{DYNAMIC} ({norms} of norms)"]
        assert one.get("share") == (
            pytest.approx(one["gain"] / other["gain"]) if other["gain"] > 0 else None
        )


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_variants_have_the_first_preset_and_moments_of_their_own(optimizer: str) -> None:
    """A momentum, which is everyone's but adam's."""
    chosen = settings(
        variants=(optimizer,), controls=False, inner_lr=0.001, changes={"momentum": 0.9}
    )
    row = by_name(run(chosen))[f"{SIMULATOR} (exact, {optimizer})"]
    fields = {} if optimizer == "adam" else {"momentum": 0.9}
    config = SimulatorConfig.exact(optimizer=optimizer, inner_lr=0.001, **fields)
    assert row["config"] == config.to_dict()
    expected = total(by_autograd(config, [each.ids_N for each in passages()]))
    assert row["nll"] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("batch", [1, 2])
def test_without_a_reset_weights_go_on_in_each_row(batch: int) -> None:
    chosen = settings(reset="never", batch=batch, limit=None, presets=("exact",), changes=RULE)
    rows, documents = by_name(run(chosen)), [each.ids_N for each in passages(4)]
    config = SimulatorConfig.exact(inner_lr=RATE, **RULE)
    expected = sum(
        total(by_autograd(config, documents[row::batch], reset="never")) for row in range(batch)
    )
    for name in (f"{SIMULATOR} (exact)", DYNAMIC):
        assert rows[name]["nll"] == pytest.approx(expected, rel=1e-8)


def test_the_shuffled_control_scores_as_usual_and_trains_on_other_order() -> None:
    (passage,) = passages(1)
    config = SimulatorConfig.exact(inner_lr=RATE)
    model = huggingface()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = updated_parameters(auxiliary().simulator(config))
    ids, expected = passage.ids_N, 0.0
    for s in range(1, len(ids), CHUNK):
        e = min(s + CHUNK, len(ids))
        context = ids[max(0, s - 1 - CONTEXT) : s]
        logits = _logits(weights, torch.cat([context, ids[s : e - 1]]))[len(context) - 1 :]
        expected += float(F.cross_entropy(logits, ids[s:e], reduction="sum"))
        mixed = shuffled(window([context], [Fresh(ids[s:e], begins=False)]))
        labels = mixed.labels[0][mixed.labels[0] != IGNORED]
        assert sorted(labels.tolist()) == sorted(ids[s:e].tolist())
        assert sorted(mixed.input_ids[0, : len(context)].tolist()) == sorted(context.tolist())
        leaves = {name: weights[name].requires_grad_() for name in trained}
        logits = _logits(weights, mixed.input_ids[0])[len(context) - 1 :]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            weights[name] = weights[name].detach() - RATE * (0 if gradient is None else gradient)
    found = stream.Experiment(auxiliary(), SETTINGS, Store(None, {}), lambda *_: None).measure(
        Run(SHUFFLED, config, shuffled=True), [passage], ""
    )
    assert math.fsum(found[0]["losses"]) == pytest.approx(expected, rel=1e-8)


def _logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    with no_casts():
        found = torch.func.functional_call(huggingface(), weights, (ids[None],))
    logits: Tensor = found.logits[0]
    return logits


def test_an_order_depends_on_the_tokens_of_its_window_alone() -> None:
    first, other = torch.arange(9), torch.arange(20, 32)
    alone = shuffled(window([first[:4]], [Fresh(first[4:], begins=False)]))
    both = shuffled(
        window(
            [other[:2], first[:4]],
            [Fresh(other[2:9], begins=False), Fresh(first[4:], begins=False)],
        )
    )
    assert both.input_ids[1, both.valid[1]].tolist() == alone.input_ids[0].tolist()
    begins = shuffled(window([first[:0]], [Fresh(first[:2], begins=True)]))
    assert begins.input_ids.tolist() == [[0]] and begins.labels.tolist() == [[1]]


def test_batches_change_nothing() -> None:
    expected = numbers(run(settings(presets=("exact",))))
    assert numbers(run(settings(presets=("exact",), batch=2))) == expected


class TestBytes:
    def test_with_a_bos_every_byte_counts(self) -> None:
        row, data = run()["rows"][0], run()["data"]
        kept = [text for text in DOCUMENTS if text != DOCUMENTS[1]]
        size = sum(len(text.encode()) for text in kept)
        assert sum(len(text) for text in kept) < size
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2) / size)
        assert data["first_token_counts"] and [d["number"] for d in data["documents"]] == [0, 2, 3]

    def test_of_the_scored_tokens_of_a_cut_document(self) -> None:
        (passage,) = longest(auxiliary().tokenizer, [(2, SEA)], 1, 30)
        shown = auxiliary().tokenizer.decode(passage.ids_N, skip_special_tokens=True)
        assert len(passage.ids_N) == 30 and SEA.startswith(shown)
        assert passage.bytes == len(shown.encode()) > len(shown)

    def test_without_a_bos_the_first_token_does_not_count(self) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source_directory())
        tokenizer.add_bos_token = False
        (passage,) = longest(tokenizer, [(0, TEXT)], 1, None)
        first = tokenizer.decode(passage.ids_N[:1])
        assert passage.first_is_text
        assert passage.bytes == len(TEXT.encode()) - len(first.encode())


def test_a_curve_adds_up_and_its_interval_is_over_documents() -> None:
    row = by_name(run())[f"{SIMULATOR} (exact)"]
    curve = row["curve"]
    assert [part["first"] for part in curve[1:]] == [part["last"] + 1 for part in curve[:-1]]
    assert sum(part["targets"] for part in curve) == row["targets"]
    nll = sum(part["targets"] * math.log(part["after"]) for part in curve)
    assert nll == pytest.approx(row["nll"])
    assert curve[-1]["last"] == max(each.targets for each in passages())
    whole = curve[-1]["up_to"]
    assert whole["change"] == pytest.approx(row["change"])
    assert whole["change_interval"] == pytest.approx(row["change_interval"])
    low, high = row["change_interval"]
    assert low < row["change"] < high


def test_intervals_of_known_numbers() -> None:
    """Two documents whose losses change by -1 and by +0.5 a token: the bootstrap draws both, or one
    of them twice.
    """
    two = [
        Passage(number, "", torch.zeros(1 + 2 * CHUNK, dtype=torch.int64), 10, True)
        for number in range(2)
    ]
    before = Measured("a", Run(UNMODIFIED), [{"losses": [10.0, 10.0], "seconds": 0}] * 2)
    changed = [{"losses": [5.0, 5.0], "seconds": 0}, {"losses": [12.5, 12.5], "seconds": 0}]
    after = Measured("b", Run(SIMULATOR, SimulatorConfig()), changed)
    (_, row) = rows_of([before, after], two, SETTINGS)
    assert row["change"] == pytest.approx(100 * math.expm1(-0.25))
    expected = [100 * math.expm1(-1), 100 * math.expm1(0.5)]
    assert row["change_interval"] == pytest.approx(expected)
    gains = [math.exp(2) - math.exp(2.5), math.exp(2) - math.exp(1)]
    assert row["gain_interval"] == pytest.approx(gains)
    alone = rows_of(
        [dataclasses.replace(each, results=each.results[:1]) for each in (before, after)],
        two[:1],
        SETTINGS,
    )
    assert all(map(math.isnan, alone[1]["change_interval"]))


def test_rates_are_chosen_on_other_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    measure = stream.Experiment.measure

    def spy(self: Any, run: Any, items: list[Passage], label: str) -> Any:
        seen.append((label, [item.title for item in items]))
        return measure(self, run, items, label)

    monkeypatch.setattr(stream.Experiment, "measure", spy)
    rates = (0.001, 0.01, 1e3)
    chosen = settings(inner_lr=None, rates=rates, presets=("exact",), controls=False, limit=1)
    chosen = dataclasses.replace(chosen, choosing_tokens=11, decays=(0.0, 1.0))
    report = run(chosen, other=OTHER)
    for label, titles in seen:
        expected = OTHER.parts if "choosing" in label else (DOCUMENTS[2],)
        assert titles == [text[:60] for text in expected]
    assert report["data"]["chosen_on_sha256"] == OTHER.sha256
    assert [each["targets"] for each in report["data"]["choosing_documents"]] == [10, 6]
    row = by_name(report)[DYNAMIC]
    documents = [
        each.ids_N for each in longest(auxiliary().tokenizer, list(enumerate(OTHER.parts)), 2, 11)
    ]
    # a decay of 1 takes every step back
    losses = {r: total(by_autograd(SimulatorConfig.exact(inner_lr=r), documents)) for r in rates}
    assert row["inner_lr"] == min(rates, key=lambda r: losses[r]) and row["rule"] == {}
    unchosen = run(settings(inner_lr=None, rates=rates[:1], limit=None, controls=False))
    assert [d["number"] for d in unchosen["data"]["documents"]] == [1, 2, 3]
    assert [d["number"] for d in unchosen["data"]["choosing_documents"]] == [0]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("reset", ["document", "never"])
def test_a_killed_run_goes_on_and_computes_nothing_twice(tmp_path: Path, reset: str) -> None:
    chosen, expected = settings(presets=("exact",), reset=reset), Store(None, {})
    report, path = run(chosen, expected), tmp_path / "units.jsonl"

    def kill(_: str, done: int, __: int) -> None:
        if done >= 5:
            raise Killed

    with pytest.raises(Killed):
        run(chosen, Store(path, {}), progress=kill)
    kept, again = len(path.read_text().splitlines()), Store(path, {})
    assert numbers(run(chosen, again)) == numbers(report)
    assert kept == 5 and again.computed == expected.computed - kept
    more = Store(path, {})
    run(settings(presets=("exact",), reset=reset, limit=4), more)
    # without a reset all but the first depend on what was read before them
    assert more.found == (15 if reset == "document" else 5)


class TestOverflow:
    def test_names_document_and_chunk_and_keeps_what_is_there(self, tmp_path: Path) -> None:
        chosen, path = settings(inner_lr=1e200, presets=("exact",)), tmp_path / "units.jsonl"
        message = "The river rises .* are not finite in chunk 1: .* lower inner_lr"
        for _ in range(2):
            store = Store(path, {})
            with pytest.raises(NumericalError, match=message):
                run(chosen, store)
        assert store.computed == 0 and len(path.read_text().splitlines()) == 3 + 1

    def test_of_a_control_is_a_row_that_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only one document of a batch: the others are read without it."""
        controls = stream.controls_of
        monkeypatch.setattr(
            stream,
            "controls_of",
            lambda label, found: [(n, each.at(-1e200)) for n, each in controls(label, found)[:1]],
        )
        report = run(settings(presets=("exact",), batch=2))
        row = by_name(report)[f"{SIMULATOR} (exact), gradient ascent"]
        assert row["perplexity"] == math.inf and math.isnan(row["change_interval"][0])
        assert row["overflow"] == {"document": 0, "chunk": 1} and row["learner"] == ASCENT
        assert row["curve"][0]["documents"] == 3
        assert "not finite in document 0, chunk 1" in stream_table(report).markdown()

    def test_one_row_of_several_does_not_spoil_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The weights of the second document are spoiled in its second chunk."""
        step = stream.Stream.step
        three, spoiled = passages(), passages()[1].ids_N

        def spoil(self: Any, ids: Tensor, mask: Tensor, new: Tensor) -> Any:
            for b in range(len(ids)):
                if torch.equal(ids[b, :3], spoiled[CHUNK + 1 :][:3]):
                    for value in self.carried.given.values():
                        value[b] = math.nan
            return step(self, ids, mask, new)

        plain = run(settings(presets=("exact",), controls=False))
        monkeypatch.setattr(stream.Stream, "step", spoil)
        experiment = stream.Experiment(
            auxiliary(), settings(batch=3), Store(None, {}), lambda *_: None
        )
        ran = Run(SIMULATOR, SimulatorConfig.exact(inner_lr=RATE))
        found = experiment.measure(ran, three, "")
        assert found[1]["overflow"] == 1 and len(found[1]["losses"]) == 1
        whole = [math.fsum(result["losses"]) for result in found]
        rest = total(by_autograd(SimulatorConfig.exact(inner_lr=RATE), [spoiled]))
        assert whole[0] + whole[2] == pytest.approx(plain["rows"][1]["nll"] - rest, rel=1e-8)


def test_a_document_without_a_target() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source_directory())
    for text, found in (("", 1), ("\n", 2)):
        if found == 1:
            with pytest.raises(InputError, match=r"document 4 \(''\) has 1 tokens; expected at"):
                longest(tokenizer, [(0, TEXT), (4, text)], None, None)
        else:
            assert longest(tokenizer, [(4, text)], None, None)[0].targets == 1
    with pytest.raises(InputError, match="has 1 tokens"):
        run(text=Text("empty", " ", ("", "")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "chunk is 0; expected a whole number, at least 1"),
        ({"context": -1}, "context is -1; expected a whole number, at least 0"),
        ({"chunk": 60}, "make windows of 67 tokens; this model takes 64"),
        ({"keys": "none"}, "keys is 'none'; expected recompute or cache"),
        ({"reset": "none"}, "reset is 'none'; expected document or never"),
        ({"tokens": 1}, "tokens is 1; expected at least 2"),
        ({"choosing_tokens": 1}, "choosing_tokens is 1; expected at least 2"),
        ({"buckets": 0}, "buckets is 0; expected at least 1"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"rates": (0.1,)}, "rates are to be chosen from; expected one of them"),
        ({"rates": (0.0, 0.1), "inner_lr": None}, "expected numbers above 0"),
        ({"rates": (0.1, 0.1), "inner_lr": None}, "none of them twice"),
        ({"variants": ("sgd",)}, "optimizers other than the config's own, sgd, none of them"),
        ({"variants": ("adam", "adam")}, "none of them twice"),
        ({"variants": ("best",)}, "optimizer is 'best'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(settings(**changes), other=OTHER)


def test_what_rates_are_chosen_on_is_other_text() -> None:
    chosen = settings(inner_lr=None)
    with pytest.raises(InputError, match="the evaluated text itself"):
        run(chosen, other=STORY)
    with pytest.raises(TintcError, match="has one document, and learning rates are chosen on othe"):
        run(chosen, text=Text("one", TEXT))


def test_a_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    report = run(settings(variants=("adam",)))
    report |= reports.about("tintc eval lm", 1.0, "cpu")
    reports.write(tmp_path, report)
    shown = (tmp_path / "report.md").read_text()
    assert "chunks of 5 with 7 tokens before them, keys recompute, reset document" in shown
    assert "| simulator (exact), shuffled tokens | 0.02 |" in shown
    size = sum(len(text.encode()) for text in DOCUMENTS if text != DOCUMENTS[1])
    targets = report["rows"][0]["targets"]
    assert f"n = 3 documents, {targets} targets of {size} bytes;" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
