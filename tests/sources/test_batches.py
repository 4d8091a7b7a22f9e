"""Batches as people have them: loaders with labels, keys too many, graphs, strings; what a module fails on is named."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import octavo
from octavo.calibration import inputs
from octavo.calibration.objective import Loss, Squared
from octavo.sources.batches import run, select, sequences_in


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def compressed(module, data, **request):
    return octavo.compress(module, ratio=2, data=data, preset="fast", objective="squared", **request)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, edges):
        states = self.layer(x)
        return torch.zeros_like(states).index_add_(0, edges[1], states[edges[0]])


class Adjacent(nn.Module):
    """A graph by its matrix: as many rows as nodes, yet no row can be left out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, neighbours):
        return neighbours @ self.layer(x)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 16)

    def forward(self, x, scale=None):
        return self.layer(x) if scale is None else self.layer(x) * scale


def graphs(count):
    return [(torch.randn(32, 64), torch.randint(0, 32, (2, 80))) for _ in range(count)]


def test_a_loader_with_labels_works_and_says_what_goes_in():
    loader = DataLoader(TensorDataset(torch.randn(96, 64), torch.randint(0, 10, (96,))), 32)
    done = compressed(net(), loader)
    assert done.opened.measurable and sum(map(sequences_in, done.opened.held_data)) == 24
    assert any("the first one is used" in note for note in done.opened.notes)


def test_keys_that_forward_does_not_take_are_left_out():
    data = [{"x": torch.randn(32, 64), "labels": torch.zeros(32), "idx": ["a"] * 32, "extra": None}]
    done = compressed(Keyed(), data)
    assert any("does not take labels, idx, extra" in note for note in done.opened.notes)


def test_a_forward_of_any_keys_gets_them_all():
    class Open(Keyed):
        def forward(self, x, **others):
            assert others["name"] == ["a", "b"] and others["count"] == 3 and others["nothing"] is None
            return self.layer(x)

    data = [{"x": torch.randn(32, 64), "name": ["a", "b"], "count": 3, "nothing": None}]
    assert compressed(Open(), data).opened.notes == []


@pytest.mark.parametrize(
    "forward_args",
    [lambda b: (b["image"], b["gain"]), lambda b: {"x": b["image"], "scale": b["gain"]}],
    ids=["tuple", "mapping"],
)
def test_forward_args_decide(forward_args):
    data = [{"image": torch.randn(32, 64), "gain": torch.rand(32, 1), "label": 1}]
    done = compressed(Keyed(), data, forward_args=forward_args)
    assert done.opened.measurable and done.opened.notes == []


def test_objects_of_any_kind_go_through_forward_args():
    class Item:
        def __init__(self):
            self.x = torch.randn(16, 64)

    with pytest.raises(octavo.RequestError, match=r"Item.*forward_args"):
        compressed(net(), [Item()])
    assert compressed(net(), [Item(), Item()], forward_args=lambda item: item.x).opened.measurable
    with pytest.raises(octavo.RequestError, match=r"forward_args fails on batch 0.*has no attribute 'y'"):
        compressed(net(), [Item()], forward_args=lambda item: item.y)
    with pytest.raises(octavo.RequestError, match="forward_args gives NoneType for batch 0"):
        compressed(net(), [Item()], forward_args=lambda item: None)


def test_profile_takes_forward_args(tmp_path):
    data = [{"image": torch.randn(32, 64)}]
    result = octavo.profile(
        Keyed(), tmp_path / "p", data=data, preset="fast", objective="squared", forward_args=lambda b: (b["image"],)
    )
    assert len(result.curves) == 1


@pytest.mark.parametrize("data", [torch.randn(96, 64), {"input": torch.randn(96, 64)}], ids=["tensor", "mapping"])
def test_one_batch_needs_no_list(data):
    assert sum(map(sequences_in, compressed(net(), data).opened.calibration_data)) == 72


def test_graphs_are_held_back_whole():
    data = graphs(5)
    job = compressed(Graph(), data).opened
    assert [batch[1].shape for batch in job.held_data] == [(2, 80)]
    assert len(job.calibration_data) == 4
    assert all(any(part[0] is one[0] for one in data) for part in (*job.calibration_data, *job.held_data))


def test_edges_may_come_first_and_by_name():
    data = [{"edges": edges, "x": x} for x, edges in graphs(3)]
    job = compressed(Graph(), data).opened
    assert (len(job.calibration_data), len(job.held_data)) == (2, 1)
    assert sequences_in(data[0]) == 32


@pytest.mark.parametrize("sparse", [False, True])
def test_a_matrix_of_neighbours_is_not_divided(sparse):
    def matrix():
        dense = (torch.rand(32, 32) < 0.1).float()
        return dense.to_sparse() if sparse else dense

    job = compressed(Adjacent(), [(torch.randn(32, 64), matrix()) for _ in range(3)]).opened
    assert (len(job.calibration_data), len(job.held_data)) == (2, 1)


def test_one_graph_alone_is_refused():
    with pytest.raises(octavo.RequestError, match=r"the only batch \(\[\(32, 64\) float32, \(2, 80\) int64\]\)"):
        compressed(Graph(), graphs(1))


def test_graphs_are_reconstructed_whole():
    done = octavo.compress(Graph(), ratio=6, data=graphs(4), objective="squared")
    assert done.built.quality < 0.1


def test_what_belongs_to_all_rows_is_shared():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x, mask, places):
            return (self.layer(x) + places[..., None]) * mask[0][:, None]

    data = [(torch.randn(32, 6, 24), torch.ones(6, 6), torch.arange(6))]
    job = compressed(Masked(), data).opened
    assert [len(batch[0]) for batch in (*job.calibration_data, *job.held_data)] == [24, 8]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.randn(32, 63), r"batch 1: Sequential fails on a batch of \(32, 63\) float32: RuntimeError: mat1"),
        (torch.randint(0, 9, (32, 64)), r"batch 1: .*\(32, 64\) int64"),
        ({"image": torch.randn(32, 64)}, r"batch 1: .*\{image: \(32, 64\) float32\}: TypeError"),
        (("a", "b", torch.randn(32, 64)), r"batch 1: .*\[str, str, \(32, 64\) float32\]"),
    ],
    ids=["width", "dtype", "keys", "order"],
)
def test_a_batch_that_the_module_fails_on_is_named(bad, words):
    with pytest.raises(octavo.RequestError, match=words):
        compressed(net(), [torch.randn(32, 64), bad, torch.randn(32, 64)])


def test_values_that_the_module_fails_on_are_named_too():
    module = nn.Sequential(nn.Embedding(40, 16), nn.Flatten(), nn.Linear(64, 8))
    good, bad = torch.randint(0, 40, (32, 4)), torch.full((32, 4), 40)
    with pytest.raises(octavo.RequestError, match=r"batch 2: .*IndexError: index out of range"):
        compressed(module, [good, good, bad])


def test_a_loss_that_fails_is_named():
    loss = Loss(lambda module, batch: module(batch[0]).gather(1, batch[2])[:, 0])
    with pytest.raises(octavo.RequestError, match=r"fails on batch 0 of .*IndexError"):
        octavo.compress(net(), ratio=2, data=[(torch.randn(32, 64), torch.zeros(32))], objective=loss, preset="fast")


def test_a_loss_gets_the_labels(tmp_path):
    loss = Loss(lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none"))
    data = DataLoader(TensorDataset(torch.randn(96, 64), torch.randint(0, 10, (96,))), 32)
    done = octavo.compress(net(), ratio=2, data=data, objective=loss, preset="fast")
    done.save(tmp_path / "out", report=False)
    assert done.opened.notes == []


def test_data_that_cannot_be_read_says_where():
    def broken():
        yield torch.randn(32, 64)
        raise OSError("no more disk")

    with pytest.raises(octavo.RequestError, match="batch 1 cannot be read: OSError: no more disk"):
        compressed(net(), broken())


def test_trying_the_batches_draws_no_random_numbers():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(len(x), 1)

    source = inputs.open_source(Noisy(64, 16))
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    inputs.prepared(source, Squared(), [torch.zeros(8, 64)])
    assert torch.equal(torch.rand(1), wanted)


def test_nested_batches_are_divided_and_run():
    x = torch.randn(12, 64)
    batch = ({"x": x, "scale": torch.ones(12, 1)}, torch.zeros(12), "name")
    assert sequences_in(batch) == 12
    part = select(batch, slice(0, 5))
    assert part[0]["x"].shape == (5, 64) and part[1].shape == (5,) and part[2] == "name"
    torch.testing.assert_close(run(Keyed().eval(), batch).shape, torch.Size([12, 16]))
