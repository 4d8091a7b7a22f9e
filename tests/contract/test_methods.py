"""The contract of every method (design, section 6): it holds for each that is registered, at every kind of site.

Each case is a site, a dtype and the evidence of a real calibration. All of them are encoded here, written to artifacts,
and read by one fresh process; a new method is covered by registering itself.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.artifact import Contents, Entry, pack
from octavo.calibration.calibrating import calibrate, data_free
from octavo.calibration.curvature import kronecker
from octavo.calibration.evidence import Evidence
from octavo.calibration.objective import objective
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods import Method, get_method, methods
from octavo.sources.files import from_path
from octavo.sources.loading import load_weights
from octavo.sources.sites import Layout, Site
from octavo.sources.source import from_module
from octavo.system.raw import narrowed

METHODS = sorted(methods())
#: Those that choose for any matrix. What takes blocks over needs a file that has some: tests/targets/test_gguf.py.
CHOOSING = [name for name in METHODS if name != "source-blocks"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: A dtype changes how a matrix is read and given back, evidence what is stored of it: each is tried, not every pair.
SEEN = (("float32", "moment"), ("bfloat16", "data-free"), ("float16", "moment"))
EDGES_SEEN = SEEN[:2]


def on_a_grid() -> nn.Module:
    """What another quantizer has been at."""
    layer = nn.Linear(48, 24)
    layer.weight.data = coarse(layer.weight.data)
    return layer


def coarse(weight: Tensor) -> Tensor:
    """Every row in 15 levels, exact in every type; zeros of a file of integers have no sign."""
    return (weight / weight.abs().amax(1, keepdim=True) * 7).round().int().float() / 64


MODULES = {
    "linear": (lambda: nn.Linear(48, 24), (12, 48)),
    "linear on a grid": (on_a_grid, (12, 48)),
    # Columns that the blocks of other runtimes divide.
    "linear in blocks": (lambda: nn.Linear(256, 12), (12, 256)),
    "gpt2 conv1d": (lambda: Conv1D(24, 48), (12, 48)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 5), (8, 12, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3), (8, 8, 7, 6)),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=4), (8, 16, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(64, 64, 3, groups=64), (8, 64, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 20, 3, stride=2), (8, 12, 4, 4)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(24, 20, 4, groups=2), (8, 24, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(40, 16), nn.Flatten()), None),
    "table": (lambda: nn.Sequential(nn.Embedding(200, 16), nn.Flatten()), None),
}
HEADS = {"tied": True, "untied": False}


@dataclass(frozen=True)
class Case:
    site: Site
    weight: Tensor
    evidence: Evidence

    @property
    def matrix(self) -> Tensor:
        return self.site.layout.to_matrix(self.weight.float())


def _usual() -> dict[str, Case]:
    cases = {}
    for name, (make, shape) in MODULES.items():
        torch.manual_seed(0)
        module = make()
        x = torch.randint(0, 40, (8, 5)) if shape is None else torch.randn(shape)
        source = from_module(module)
        sites, _ = source.sites()
        seen, blind = calibrate(source, sites, [x], objective("squared")), data_free(source, sites)
        for dtype, evidence in SEEN:
            (site,) = from_module(make().to(DTYPES[dtype])).sites()[0]
            weight, found = source.read(site.name).to(DTYPES[dtype]), seen if evidence == "moment" else blind
            cases[f"{name} {dtype} {evidence}"] = Case(site, weight, found.evidence[site.name])
    return cases


def _heads(folder) -> dict[str, Case]:
    cases = {}
    config = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    for name, tied in HEADS.items():
        for dtype, evidence in SEEN:
            torch.manual_seed(0)
            path = folder / f"{name}-{dtype}"
            GPT2LMHeadModel(GPT2Config(**config, tie_word_embeddings=tied)).to(DTYPES[dtype]).save_pretrained(path)
            source = from_path(path)
            load_weights(source)
            (site,) = (
                s
                for s in source.sites()[0]
                if s.name in ("lm_head.weight", "transformer.wte.weight") and (tied or s.kind == "head")
            )
            assert site.dtype == DTYPES[dtype] and site.kind == ("embedding" if tied else "head")
            tokens = {"input_ids": torch.randint(0, 64, (8, 6))}
            seen = evidence == "moment"
            found = calibrate(source, [site], [tokens], objective("kl")) if seen else data_free(source, [site])
            cases[f"{name} head {dtype} {evidence}"] = Case(site, source.read(site.name), found.evidence[site.name])
    return cases


def _edge_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    usual = torch.randn(7, 13, generator=generator)
    outlier = usual.clone()
    outlier[3, 5] = 6e4
    shapes = {
        f"{rows}x{columns}": (rows, columns)
        for rows, columns in ((1, 1), (1, 9), (1, 600), (9, 1), (600, 1), (7, 13), (64, 8))
    }
    return {
        **{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        "zeros": torch.zeros(7, 13),
        "zero rows": torch.where(torch.arange(7)[:, None] % 2 == 0, 0.0, usual),
        "constant": torch.full((7, 13), -0.7),
        "constant rows": torch.linspace(-2, 2, 7)[:, None].expand(7, 13).contiguous(),
        "outlier": outlier,
        "vast outlier": usual.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-1e15)),
        "zero columns": torch.where(torch.arange(13) % 3 == 0, 0.0, usual),
        "large": usual * 1e7,
        "small": usual * 1e-9,
        "one weight": torch.zeros(7, 13).index_put((torch.tensor(2), torch.tensor(11)), torch.tensor(3.0)),
    }  # fmt: skip


def _edges() -> dict[str, Case]:
    cases = {}
    for name, weight in _edge_weights().items():
        rows, columns = weight.shape
        inputs = torch.randn(40, columns, generator=torch.Generator().manual_seed(3))
        moment = inputs.T @ inputs / 40 + 0.1 * torch.eye(columns)
        for dtype, evidence in EDGES_SEEN:
            site = Site("w", "linear", (rows, columns), DTYPES[dtype], Layout())
            found = Evidence(torch.linspace(0.5, 2, rows), moment if evidence == "moment" else None, 40)
            cases[f"{name} {dtype} {evidence}"] = Case(site, weight.to(DTYPES[dtype]), found)
    return cases


USUAL = [f"{kind} {d} {e}" for kind in (*MODULES, "tied head", "untied head") for d, e in SEEN]
EDGES = [f"{name} {d} {e}" for name in _edge_weights() for d, e in EDGES_SEEN]

READER = """
import hashlib, json, sys, torch
torch.set_num_threads(1)
import octavo
def digest(t):
    content = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + content).hexdigest()
states = {path: octavo.Artifact(path).state() for path in sys.argv[1:]}
print(json.dumps({path: {name: digest(t) for name, t in state.items()} for path, state in states.items()}))
"""


def digest(t: Tensor) -> str:
    content = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + content).hexdigest()


def _seen(method: Method, evidence: Evidence) -> Evidence:
    """The evidence with a curvature, the product of its moments, for methods that work from one."""
    if not method.by_curvature or evidence.columns is None:
        return evidence
    return replace(evidence, curvature=kronecker(torch.diag(evidence.rows), evidence.columns))


def _chosen(settings: list) -> list:
    """The finest, the coarsest and one between."""
    places = {0, len(settings) // 2, len(settings) - 1}
    return [settings[place] for place in sorted(places)] if settings else []


def _no_worse_than_nothing(form: Form, matrix: Tensor) -> None:
    energy = float(matrix.double().square().sum())
    lost = float((matrix.double() - form.dense().double()).square().sum())
    assert lost <= 1.02 * energy, f"more is lost than all there was: {lost:g} of {energy:g}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Per method, by tensor: restored here, restored there, stated bytes, bytes on disk; then refusals and contents."""
    folder = tmp_path_factory.mktemp("contract")
    usual, edges = {**_usual(), **_heads(folder)}, _edges()
    assert set(usual) == set(USUAL) and set(edges) == set(EDGES)
    found, paths = {}, {}
    for name in METHODS:
        here, stated, problems = {}, {}, {}
        contents = Contents({"title": "contract", "fingerprint": "0" * 64, "bytes": 1, "weights": 1})
        for key, case in {**usual, **edges}.items():
            method = get_method(name)
            if not method.accepts(case.site):
                problems[key] = None
                continue
            method, evidence = method.at_site(case.site), _seen(method, case.evidence)
            try:
                settings = method.settings(case.matrix, evidence)
                if not settings:
                    problems[key] = None
                for number, setting in enumerate(_chosen(settings)):
                    form = method.encode(case.matrix, setting, evidence)
                    packed, tensor = pack(form), f"{key}/{number}"
                    restored = narrowed(case.site.layout.from_matrix(form.dense(), case.site.shape), case.site.dtype)
                    here[tensor], stated[tensor] = restored, packed.bytes
                    contents.entries[tensor] = Entry(packed, case.site.shape, case.site.dtype, case.site.layout)
                    if evidence.columns is None:
                        _no_worse_than_nothing(form, case.matrix)
            except Exception as error:
                problems[key] = error
        path = folder / name
        path.mkdir()
        contents.write(path)
        paths[name], found[name] = path, [here, {}, stated, {}, problems, contents]
        for part in path.glob("*.safetensors"):
            header = json.loads(part.read_bytes()[8 : 8 + int.from_bytes(part.read_bytes()[:8], "little")])
            found[name][3].update(
                {t: e["data_offsets"][1] - e["data_offsets"][0] for t, e in header.items() if t != "__metadata__"}
            )
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths.values())], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    for name, path in paths.items():
        found[name][1] = there[str(path)]
    return found, paths


def check(written, name, key):
    here, there, stated, on_disk, problems, _ = written[0][name]
    if key in problems:
        if problems[key] is None:
            pytest.skip(f"{name} has nothing to offer at this site")
        raise problems[key]
    tensors = [tensor for tensor in here if tensor.startswith(f"{key}/")]
    assert tensors
    for tensor in tensors:
        assert there[tensor] == digest(here[tensor]), "a fresh process restores other bits"
        assert on_disk[tensor] == stated[tensor], "bytes on disk are not those stated"
        assert bool(torch.isfinite(here[tensor]).all()), "restored weights are not finite"


@pytest.mark.parametrize("key", USUAL)
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_site(written, name, key):
    check(written, name, key)


@pytest.mark.parametrize("key", EDGES)
@pytest.mark.parametrize("name", METHODS)
def test_edges(written, name, key):
    check(written, name, key)


@pytest.mark.parametrize("name", CHOOSING)
def test_every_method_is_put_to_the_test(written, name):
    """One that offers nothing at any site would pass all else by being skipped."""
    here = written[0][name][0]
    assert {key.rsplit("/", 1)[0] for key in here} & set(USUAL)


@pytest.mark.parametrize("octaves", [-12.0, 12.0])
@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).elastic is not None])
def test_however_far_a_knob_is_moved_its_setting_can_be_encoded(name, octaves):
    """Budgets are met by moving it, and nobody looks at a setting again before it is encoded."""
    method, generator = get_method(name), torch.Generator().manual_seed(0)
    weight = torch.randn(200, 16, generator=generator)
    evidence = _seen(method, Evidence(torch.rand(200, generator=generator) + 0.1, torch.eye(16) + 0.1, 9))
    settings = method.settings(weight, evidence)
    setting = settings[0 if octaves < 0 else -1]
    form = method.encode(weight, method.at(setting, method.octaves(setting) + octaves), evidence)
    assert bool(torch.isfinite(form.dense()).all())


@pytest.mark.parametrize("name", METHODS)
def test_files_have_the_bytes_that_were_stated(written, name):
    contents, path = written[0][name][5], written[1][name]
    assert sum(file.stat().st_size for file in path.iterdir()) == contents.bytes == octavo.Artifact(path).bytes


@pytest.mark.parametrize("name", [name for name in METHODS if name != "zero"])
def test_the_finest_setting_is_the_nearest(written, name):
    """A method finds what it is asked for: its largest setting resembles the weights, and more than its smallest."""
    here = written[0][name][0]
    for kind in MODULES:
        tensors = [here[key] for key in here if key.startswith(f"{kind} float32 moment/")]
        if not tensors:
            continue
        make, _ = MODULES[kind]
        torch.manual_seed(0)
        weight = next(p for p in make().parameters() if p.ndim > 1).detach()
        errors = [float((tensor - weight).norm() / weight.norm()) for tensor in (tensors[0], tensors[-1])]
        assert errors[0] < 0.9 and errors[0] <= errors[1] + 1e-6, kind


@pytest.mark.parametrize("name", CHOOSING)
def test_the_same_request_gives_the_same_bytes(name):
    torch.manual_seed(0)
    method = get_method(name)
    # Blocks of other runtimes have 32 columns.
    width = 32 if method.runtimes else 16
    weight, columns = coarse(torch.randn(160, width)), torch.eye(width) + 0.1
    plain = Evidence(torch.rand(160) + 0.1, columns, 9)
    evidence = _seen(method, plain)
    settings = _chosen(method.settings(weight, evidence))
    assert settings
    for setting in settings:
        before = weight.clone()
        first = pack(method.encode(weight, setting, evidence))
        again = pack(method.encode(weight, setting, _seen(method, Evidence(plain.rows, columns, 9))))
        assert first.blob == again.blob and first.parts == again.parts and first.meta == again.meta
        assert torch.equal(weight, before), "encoding changed the weights that it was given"


@pytest.mark.parametrize("name", CHOOSING)
def test_matrices_with_one_input_share_what_depends_on_it_alone(name):
    """Queries and keys, or a sample of rows and the whole, have one cache of results."""
    torch.manual_seed(0)
    method = get_method(name)
    width = 32 if method.runtimes else 16
    weights, columns = [coarse(torch.randn(rows, width)) for rows in (160, 240)], torch.eye(width) + 0.1
    rows, cache = [torch.rand(len(weight)) + 0.1 for weight in weights], {}
    for weight, own in zip(weights, rows, strict=True):
        shared = _seen(method, Evidence(own, columns, 9, cache))
        setting = _chosen(method.settings(weight, shared))[-1]
        alone = method.encode(weight, setting, _seen(method, Evidence(own, columns, 9)))
        assert pack(method.encode(weight, setting, shared)).blob == pack(alone).blob


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_values_that_are_not_finite_are_refused_by_name(name, value):
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    module[1].weight.data[4, 7] = value
    told = "formats of another runtime" if get_method(name).runtimes else r"'1\.weight'.*\(4, 7\)"
    with pytest.raises(RequestError, match=told):
        octavo.compress(module, ratio=2, methods=[name])
