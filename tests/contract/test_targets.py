"""What every registered target keeps: options are used or refused by name, and a budget is met by what is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.request import Request, Role, names
from octavo.targets import TARGETS, Target, get_target, targets
from octavo.targets.sizes import Sizes

DATA = [torch.randn(24, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]
#: A value of every option that says something, to see whether it is used or refused.
SAID = {
    "ratio": 4, "size": "1MB", "bits": 4, "speedup": 2, "latency": "5ms", "shape": "1x8", "curvature": "ekfac",
    "recover": "distill", "minutes": 5, "base": "base",
    "methods": ["rtn"], "preset": "fast", "plan": "plan.yaml", "memory": "6GB", "executor": "local", "data": DATA,
    "forward_args": lambda batch: batch, "objective": "kl", "ignore": ("0*",), "keep": {"0*": "float16"},
    "workspace": "work", "resume": True, "seed": 1,
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, which targets of other runtimes need."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("decoder")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokens() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 256, (4, 24), generator=generator)} for _ in range(3)]


@pytest.fixture
def given(name: str, decoder: Path) -> tuple[Any, list[Any]]:
    """A source and data that a target serves."""
    return (str(decoder), tokens()) if get_target(name).foreign else (net(), DATA)


@pytest.fixture(params=targets())
def target(request: pytest.FixtureRequest) -> Target:
    return get_target(request.param)


def test_it_says_what_it_is(target: Target) -> None:
    assert TARGETS.get(target.name) is type(target) and target.about and target.about[0].islower()
    assert target.budget and set(target.budget) <= set(names(Request, Role.BUDGET))
    assert target.unused <= set(names(Request)) - set(names(Request, Role.BUDGET))
    assert set(SAID) == set(names(Request)) - {"source", "target"}, "give the new option a value above"


#: Targets that any machine serves in a moment. That for speed is run in tests/runtimes/onnx/test_speed.py.
OF_BYTES = [name for name in targets() if isinstance(get_target(name), Sizes)]


@pytest.mark.parametrize("name", sorted(SAID))
def test_an_option_is_used_or_refused_by_name(target: Target, name: str) -> None:
    request = Request(None, target=target.name, **{name: SAID[name]})
    foreign = name in set(names(Request, Role.BUDGET)) - set(target.budget) | target.unused
    if foreign:
        with pytest.raises(octavo.RequestError, match=f"--for {target.name}: .*--{name}"):
            target.refuse(request)
        with pytest.raises(octavo.RequestError, match=f"--{name}"):
            octavo.compress(request)
    else:
        target.refuse(request)


@pytest.mark.parametrize("verb", [octavo.compress, lambda net, **how: octavo.frontier(net, [4], workspace="w", **how)])
def test_a_target_that_is_not_known_is_refused(verb: Callable) -> None:
    with pytest.raises(octavo.RequestError, match="target 'disc' is not known; did you mean 'disk'"):
        verb(net(), target="disc")


@pytest.mark.parametrize("name", OF_BYTES)
def test_a_budget_of_bytes_is_met_by_what_is_written(name: str, given: tuple[Any, list[Any]], tmp_path: Path) -> None:
    source, data = given
    done = octavo.compress(source, ratio=3, target=name, data=data, preset="fast")
    assert done.opened.target.total(done.built.contents) == done.built.counted <= done.budget.bytes
    report = done.save(tmp_path / "out").to_json()
    written = sum((tmp_path / "out" / file).stat().st_size for file in report["artifact"]["files"])
    size = done.built.counted if done.opened.target.foreign else done.built.bytes
    assert written == size == report["artifact"]["bytes"] and report["budget"]["target"] == name
    assert done.built.counted >= done.budget.least or report["artifact"]["note"]
    assert report["explorer"]["stops"] or report["explorer"]["why"]
    assert octavo.verify(tmp_path / "out").bytes == written


@pytest.mark.parametrize("name", OF_BYTES)
def test_profiles_and_frontiers_take_it(name: str, given: tuple[Any, list[Any]], tmp_path: Path) -> None:
    source, data = given
    asked = Request(source, target=name, data=data, preset="fast", workspace=tmp_path / "p")
    near, far = octavo.frontier(asked, [3, 1e6])
    assert near.ratio is not None and near.ratio >= 3 and near.error is None
    # What can be reached stands beside what cannot.
    assert far.ratio is None and far.limit is not None and "at most" in str(far.error)
    assert octavo.plan(tmp_path / "p", ratio=3).budget.target == name
    with pytest.raises(octavo.BudgetError):
        octavo.frontier(asked, [1e6])
