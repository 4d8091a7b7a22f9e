"""Clients of Flower send payloads; whatever is lost, repeated, damaged or foreign is told, and training goes on."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from octavo.flows import FLOWS
from octavo.flows.updates.flower import RECORD, CompressedStrategy, CompressedUplink

pytest.importorskip("flwr", reason="needs the extra flower")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

CLIENTS = 3


@pytest.fixture(autouse=True)
def a_run(monkeypatch):
    """Flower's processes know which run they belong to."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))


def examples(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 40, generator=g)
    return x, x[:, :4].argmax(1)


def training(message, context, spoil=lambda state, client: state):
    """What every client does: a few steps on its own examples."""
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["client"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = examples(client)
    for start in range(0, 256, 32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[start : start + 32]), y[start : start + 32]).backward()
        optimizer.step()
    state = spoil(model.state_dict(), client)
    metrics = MetricRecord({"num-examples": 256})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


class Loopback(Grid):
    """Clients in this process, with contexts that stay; ``between`` may change or drop what they reply."""

    def __init__(self, mod, spoil=lambda state, client: state, between=lambda number, replies: replies):
        self.contexts = {
            node: Context(1, node, {"client": node}, RecordDict(), {}) for node in range(1, CLIENTS + 1)
        }  # fmt: skip
        self.app, self.between, self.rounds = ClientApp(mods=[mod]), between, 0
        self.app.train()(lambda message, context: training(message, context, spoil))

    def set_run(self, *args, **kwargs): ...
    def run(self): ...
    def create_message(self, *args, **kwargs): ...
    def get_nodes(self): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        if not messages:  # nothing is evaluated
            return replies
        for message in messages:
            node = message.metadata.dst_node_id
            try:
                reply = self.app(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(code=0, reason=str(error)), reply_to=message)
            replies.append(reply)
        self.rounds += 1
        return self.between(self.rounds, replies)


def trained(rounds, mod=None, **given):
    """The strategy and the arrays after some rounds."""
    grid = Loopback(mod or CompressedUplink(ratio=20), **given)
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy = CompressedStrategy(inner)
    result = strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=rounds)
    return strategy, result.arrays.to_torch_state_dict(), grid


def accuracy(state):
    model = net()
    model.load_state_dict(state)
    x, y = examples(99)
    return float((model.eval()(x).argmax(1) == y).float().mean())


def test_clients_learn_together_with_payloads_of_the_stated_size():
    strategy, state, grid = trained(8)
    assert accuracy(state) > 0.6 > accuracy(net().state_dict()) + 0.1
    assert int(state["1.num_batches_tracked"]) > 0 and state["1.num_batches_tracked"].dtype == torch.int64
    floats = sum(t.nbytes for t in net().state_dict().values() if t.is_floating_point())
    for traffic in strategy.traffic[1:]:
        assert not traffic.refused
        assert traffic.uplink < CLIENTS * (floats / 20 + 1200), traffic
        assert traffic.downlink > CLIENTS * floats and traffic.plain > CLIENTS * floats
    assert grid.contexts[1].state["octavo-memory"].to_torch_state_dict()["missing"].abs().sum() > 0


def test_a_lost_reply_and_a_killed_client_begin_again_with_a_plan():
    def lose(number, replies):
        return replies[1:] if number == 2 else replies

    strategy, state, grid = trained(4, between=lose)
    assert [traffic.refused for traffic in strategy.traffic] == [()] * 4 and accuracy(state) > 0.5
    # A client that was killed has lost its context; another one goes on as before.
    grid.contexts[2].state = RecordDict()
    again = strategy.start(grid, ArrayRecord(state), num_rounds=1)
    assert again.arrays is not None and not strategy.traffic[-1].refused


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("damage", "checksum does not match"), ("repeat", "received before"), ("foreign", "other tensors"),
        ("bare", "has no payload"), ("planless", "sent no plan"), ("text", "not the plan of a flow"),
        ("empty", "not a reply of"), ("words", "not a reply of"), ("numbers", "not a reply of"),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_is_left_out_and_told(harm, says, caplog):
    def between(number, replies):
        if number != 2 and harm not in ("planless", "text"):
            return replies
        ours, record = replies[0], replies[0].content[RECORD]
        if harm == "damage":
            payload = bytearray(record["payload"])
            payload[-1] ^= 1
            ours.content[RECORD] = ConfigRecord({**record, "payload": bytes(payload)})
        elif harm == "repeat":
            return [*replies, twin_of(ours)]
        elif harm == "foreign":
            plan = FLOWS.get(CompressedUplink.codec)().fit([{"other": torch.randn(900)}], 400).to_json()
            ours.content[RECORD] = ConfigRecord({**record, "plan": plan})
        elif harm == "bare":
            del ours.content[RECORD]
        elif harm == "empty":
            ours.content[RECORD] = ConfigRecord({"step": 1})
        elif harm == "words":
            ours.content[RECORD] = ConfigRecord({**record, "payload": "none"})
        elif harm == "numbers":
            ours.content["arrays"] = MetricRecord({"loss": 1.0})
        elif number == 1:
            ours.content[RECORD] = (
                ConfigRecord({**record, "plan": "{}"})
                if harm == "text"
                else ConfigRecord({"payload": record["payload"]})
            )
        return replies

    with caplog.at_level(logging.WARNING, logger="octavo"):
        strategy, state, _ = trained(3, between=between)
    told = [text for traffic in strategy.traffic for text in traffic.refused]
    assert len(told) == 1 and says in told[0] and says in caplog.text
    assert not strategy.traffic[-1].refused and all(bool(torch.isfinite(t.float()).all()) for t in state.values())


def twin_of(reply):
    """The same reply, which a network may deliver twice."""
    twin = copy.copy(reply)
    twin.content = RecordDict(dict(reply.content))
    return twin


def test_weights_that_are_not_finite_are_a_failure_of_their_client():
    def spoil(state, client):
        return {n: t / 0 if client == 2 and n == "0.bias" else t for n, t in state.items()}

    strategy, state, _ = trained(2, spoil=spoil)
    assert all(bool(torch.isfinite(t.float()).all()) for t in state.values())
    whole = net().state_dict()
    per_client = sum(t.nbytes for t in whole.values())
    assert strategy.traffic[0].plain < 2.7 * per_client


SIMULATED = """
import torch
from torch import nn
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from octavo.flows.updates.flower import CompressedStrategy, CompressedUplink

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 4))

client, server = ClientApp(mods=[CompressedUplink(ratio=20)]), ServerApp()

@client.train()
def train(message, context):
    net = make()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x = torch.randn(256, 40)
    nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
    torch.optim.SGD(net.parameters(), 1.0).step()
    records = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 256})}
    return Message(RecordDict(records), reply_to=message)

@server.main()
def main(grid, context):
    strategy = CompressedStrategy(FedAvg(fraction_evaluate=0.0))
    strategy.start(grid, ArrayRecord(make().state_dict()), num_rounds=3)
    for traffic in strategy.traffic:
        print("traffic", traffic.uplink, traffic.plain, len(traffic.refused))

run_simulation(server, client, num_supernodes=4, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
"""


@pytest.mark.slow
def test_the_simulation_of_flower_keeps_streams_in_step():
    """Its clients are processes that have nothing but their context from round to round."""
    pytest.importorskip("ray", reason="needs ray, the extra of Flower's simulation")
    done = subprocess.run([sys.executable, "-c", SIMULATED], capture_output=True, text=True, timeout=300)
    rounds = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("traffic")]
    assert len(rounds) == 3, done.stderr[-2000:]
    # The first replies also have plans.
    assert all(int(up) * 20 < 1.05 * int(plain) for up, plain, _ in rounds[1:])
    assert [refused for *_, refused in rounds] == ["0"] * 3
