"""Training what patterns name, against torch.autograd and torch.optim.SGD on those parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.oracle import reference as oracle
from tests.oracle.reference import surrogate_loss
from tests.support.families import FAMILIES
from tests.support.models import gpt2, on_all_backends, opt, randomized, simulate, tokens
from tests.support.nano import nano
from tests.support.tolerances import BACKENDS, SIMULATOR, error
from tests.support.toys import toy
from tintc.compiler import checks
from tintc.compiler.casts import no_casts
from tintc.compiler.reports.trained import trained_weights
from tintc.compiler.verification import verify
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UnsupportedModelError

RATE, LIMIT = 0.02, SIMULATOR[torch.float64]


@pytest.fixture(autouse=True)
def _exact_reference() -> Iterator[None]:
    """The models' own casts to float32 are errors of 1e-7 of theirs."""
    with no_casts():
        yield


def llama() -> nn.Module:
    found: nn.Module = FAMILIES["llama"].build()
    return found


def untied_opt() -> nn.Module:
    found: nn.Module = opt(tie_word_embeddings=False)
    return found


def matched(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the parameters, each once, that have a name which matches."""
    first: dict[int, str] = {}
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), name)
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            found[own] = None
    return list(found)


def by_sgd(
    model: nn.Module, names: list[str], ids: Tensor, mask: Tensor, config: SimulatorConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """The state dict after the steps on one sequence, and its logits."""
    model = copy.deepcopy(model).train(False)
    every = dict(model.named_parameters())
    optimizer = torch.optim.SGD([every[name] for name in names], lr=config.inner_lr)
    carries = mask[1:].bool()
    for _ in range(config.steps):
        optimizer.zero_grad()
        logits = logits_of(model, ids)[:-1][carries]
        surrogate_loss(logits, ids[1:][carries], config.loss_gradient).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return {n: t.detach() for n, t in model.state_dict().items()}, logits_of(model, ids)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    found: Any = model(ids[None])
    return (found if isinstance(found, Tensor) else found.logits)[0]


def agree(
    simulator: Any, model: nn.Module, patterns: tuple[str, ...], limit: float = LIMIT
) -> None:
    """Updates and logits of two sequences are SGD's; what does not match is equal to the bit."""
    vocab = simulator.program.facts.vocab_size
    ids, mask = tokens(2, 9, vocab), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    ids[0, 2] = 1  # of padding, where the model has a row for it
    names = matched(model, patterns)
    before = model.state_dict()
    with torch.inference_mode():
        logits = simulator(ids, mask).logits
    for index in range(2):
        state, expected = by_sgd(model, names, ids[index], mask[index], simulator.config)
        with torch.inference_mode():
            found = simulator.updated_state_dict(ids, mask, index)
        assert error(logits[index], expected) < limit
        for name, value in state.items():
            assert error(found[name], value) < limit, name
        tied = {alias for alias, name in simulator.program.aliases.items() if name in names}
        for name in set(before) - set(names) - tied:
            assert torch.equal(found[name], before[name]), name
        changed = [n for n in names if not torch.equal(state[n], before[n])]
        assert changed, "the case trains nothing"


def exact(*patterns: str, **more: Any) -> SimulatorConfig:
    return SimulatorConfig.exact(train=patterns, inner_lr=RATE, **more)


INSIDE = {
    "mlp of one layer": (opt, ("*.layers.1.fc*",)),
    "one bias": (opt, ("*.layers.0.fc1.bias",)),
    "norms": (opt, ("*norm*",)),
    "a gain alone": (gpt2, ("*.ln_f.weight",)),
    "queries": (gpt2, ("*.h.0.attn.c_attn.*",)),
    "two patterns": (gpt2, ("*.h.1.mlp.c_fc.weight", "*.h.0.ln_1.*")),
    "gated": (llama, ("*.layers.1.mlp.*", "*.input_layernorm.*")),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("make", "patterns"), INSIDE.values(), ids=INSIDE)
def test_inside_the_blocks(make: Any, patterns: tuple[str, ...], steps: int) -> None:
    model = make()
    found = on_all_backends(model, exact(*patterns, steps=steps))
    agree(found["fused"], model, patterns)
    ids = tokens(2, 9, found["fused"].program.facts.vocab_size)
    with torch.inference_mode():
        logits = [each(ids, torch.ones_like(ids)).logits for each in found.values()]
    assert error(logits[1], logits[0]) < BACKENDS[torch.float64]


def untied_bias() -> nn.Module:
    """Its head has a bias, and a weight of its own."""
    found: nn.Module = nano()
    return found


class Placed(nn.Module):
    """Positions are rows of a (1, rows, width) parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 6), nn.Linear(6, 19)
        self.places, self.linear = nn.Parameter(torch.randn(1, 12, 6)), nn.Linear(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places[:, : input_ids.shape[1]]
        logits: Tensor = self.head(F.relu(self.linear(x)))
        return logits


def placed() -> nn.Module:
    found: nn.Module = randomized(Placed()).double()
    return found


ENDS = {
    "tied": (opt, ("lm_head.weight",)),
    "tied, by its other name": (gpt2, ("transformer.wte.weight",)),
    "tokens": (untied_opt, ("*.embed_tokens.weight",)),
    "positions": (opt, ("*.embed_positions.weight",)),
    "untied head": (untied_opt, ("lm_head.weight",)),
    "head and block": (untied_opt, ("lm_head.*", "*.1.fc2.*")),
    "bias of the head": (untied_bias, ("head.bias",)),
    "head with a bias": (untied_bias, ("head.*", "*.0.down.bias")),
    "weight of a head with a bias": (untied_bias, ("head.weight",)),
    "both ends": (gpt2, ("*.wpe.*", "*.wte.*", "*.ln_f.bias")),
    "everything": (opt, ("*",)),
    "everything, gated": (llama, ("*",)),
    "everything, a head with a bias": (untied_bias, ("*",)),
    "rows of a parameter": (placed, ("places", "linear.bias")),
    "behind a norm": (FAMILIES["bloom"].build, ("*.word_embeddings*", "*.ln_f.*")),
    "scaled": (FAMILIES["gemma"].build, ("*.embed_tokens.*", "*.layers.0.mlp.*")),
    "projections": (lambda: opt(word_embed_proj_dim=8), ("*.project_in.*", "*.project_out.*")),
    "tokens and projections": (lambda: opt(word_embed_proj_dim=8), ("*.project_in.*", "*embed*")),
}
_FUSED_ALONE = ("embed", "wte", "wpe", "tokens", "places")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("make", "patterns"), ENDS.values(), ids=ENDS)
def test_both_ends(make: Any, patterns: tuple[str, ...], steps: int) -> None:
    model, config = make(), exact(*patterns, steps=steps)
    simulator = simulate(model, config)
    agree(simulator, model, patterns)
    simulator.optimizations = False
    agree(simulator, model, patterns)
    learning = {slot.parameter for slot in simulator.program.layout.prefix.values() if slot.updated}
    if any(part in name for name in learning for part in _FUSED_ALONE):
        with pytest.raises(UnsupportedModelError, match=r"is an embedding that learns"):
            simulate(model, config, backend="transformer")
    else:
        other = simulate(model, config, backend="transformer")
        agree(other, model, patterns, BACKENDS[torch.float64])


@pytest.mark.parametrize("kind", ["mean_embedding", "quadratic"])
@pytest.mark.parametrize("patterns", [("lm_head.*",), ("lm_head.*", "*.1.fc2.*"), ("*",)])
@pytest.mark.slow
def test_the_head_under_other_gradients(kind: str, patterns: tuple[str, ...]) -> None:
    model = untied_opt()
    for steps in (1, 2):
        config = exact(*patterns, loss_gradient=kind, steps=steps)
        agree(simulate(model, config), model, patterns)
        if "*" not in patterns:
            other = simulate(model, config, backend="transformer")
            agree(other, model, patterns, BACKENDS[torch.float64])


def test_the_tied_head_under_mean_embedding() -> None:
    model, patterns = opt(), ("lm_head.weight", "*.0.fc1.bias")
    agree(simulate(model, exact(*patterns, loss_gradient="mean_embedding")), model, patterns)


@pytest.mark.slow
def test_padding_changes_no_update() -> None:
    """Padding on the left of a sequence: its positions and training tokens are the same."""
    model, patterns = gpt2(), ("*",)
    config = exact(*patterns, steps=2)
    simulator = simulate(model, config)
    ids, mask = tokens(1, 9, 29)[0], torch.tensor([1] * 6 + [0] * 3)
    state, _ = by_sgd(model, matched(model, patterns), ids, mask, config)
    padded = {
        name: F.pad(value, (3, 0))[None]
        for name, value in (("ids", ids), ("train", mask), ("seen", torch.ones_like(ids)))
    }
    with torch.inference_mode():
        found = simulator.updated_state_dict(
            padded["ids"], padded["train"], attention_mask=padded["seen"]
        )
    assert {n for n, value in state.items() if error(found[n], value) >= LIMIT} == set()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.slow
def test_everything_by_the_papers_approximations(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against finite differences and constant probabilities put into the model itself."""
    for make in (untied_opt, llama):
        model, config = make(), SimulatorConfig.paper(train="*", inner_lr=RATE, steps=steps)
        monkeypatch.setattr(oracle, "trained_names", lambda model, _: matched(model, ("*",)))
        simulator = simulate(model, config)
        ids = tokens(2, 9, simulator.program.facts.vocab_size)
        mask = torch.ones_like(ids)
        expected = oracle.reference(model, config, ids, mask)
        with torch.inference_mode():
            assert error(simulator(ids, mask).logits, expected.logits) < LIMIT
            found = simulator.updated_state_dict(ids, mask, 1)
        for name, value in expected.states[1].items():
            assert error(found[name], value) < LIMIT, name


class Bare(nn.Module):
    """No stack of blocks, no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first = nn.Embedding(19, 6), nn.Linear(6, 6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 19, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        logits: Tensor = self.head(x + self.second(F.relu(self.first(x))))
        return logits


def test_a_model_without_blocks() -> None:
    model = Bare().double().eval()
    agree(simulate(model, exact("first.*")), model, ("first.*",))


def test_compile_checks_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is compared with autograd's is of the weights that patterns name."""
    compared: list[str] = []
    gradients = checks._gradients

    def noted(model: Any, weights: Any, names: list[str], *rest: Any) -> Any:
        compared.extend(names)
        return gradients(model, weights, names, *rest)

    monkeypatch.setattr(checks, "_gradients", noted)
    config = SimulatorConfig.paper(train="*.1.fc1.*", lr_scale={"*.bias": 0})
    tintc.compile(opt(), config, check="step")
    assert compared == ["model.decoder.layers.1.fc1.weight"]


def test_verify_of_a_tied_head() -> None:
    found = verify(tintc.compile(opt(), exact("lm_head.weight", steps=2)), tokens=12)
    assert found.exact and found.agrees
    assert [update.name for update in found.updates] == ["model.decoder.embed_tokens.weight"]


def test_verify_knows_what_is_trained() -> None:
    config = exact("*.1.fc1.*", "*.fc2.bias", steps=2, lr_scale={"*.0.*": 0})
    found = verify(tintc.compile(opt(), config, check="none"), tokens=12)
    assert found.exact and found.agrees
    names = {f"model.decoder.layers.1.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.bias")}
    assert {update.name for update in found.updates} == names


def test_the_report_lists_what_no_operator_reads() -> None:
    model = toy(lambda m, x, ids: m.linear(x))
    program = simulate(model, exact("*")).program
    found = trained_weights(program, 1000)
    own = ("positions.weight", "wide.weight", "wide.bias", "norm.weight", "norm.bias", "scale")
    assert set(found["unreached"]) == set(own)
    assert found["weights"] == len(list(model.parameters())) - len(own) == 4
    assert found["parameters"] == 2 * 19 * 6 + 6 * 6 + 6
    assert found["share"] == found["parameters"] / 1000
