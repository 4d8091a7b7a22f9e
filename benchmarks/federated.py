"""FedZip's federation through Flower: what its own simulation counts and learns, beside the study's loop.

    python benchmarks/federated.py

writes docs/results/federated.json. Clients, nets, rates and codecs are those of the study `fedzip`, whose result must be
there. It needs the extra `flower` with Flower's simulation, and so an environment of its own: `pip install -e '.[train,flower]'
'flwr[simulation]'`. About a minute an arm and seed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import torch
from common import load_results, save_results
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from octavo.flows.updates.flower import CompressedStrategy, CompressedUplink
from octavo.flows.updates.kmeans import KMeansLevels
from octavo.recipes.communication.fedzip import CLIENTS, CLIP, EXAMPLES, FED_BACK, FEDAVG, OURS, ROUNDS, at_ratio
from octavo.recipes.frame import Lab, studies
from octavo.recipes.frame.data import fashion
from octavo.recipes.testbeds.federated import Federation, dealt, few, locally, percent
from octavo.recipes.testbeds.workers import conv_net

#: Every arm's ratio, and whether it has feedback; FedAvg sends weights as they are.
ARMS: dict[str, tuple[int, bool] | None] = {
    FEDAVG: None,
    at_ratio(OURS, 100): (100, False),
    at_ratio(OURS, 300): (300, False),
    at_ratio(OURS, 1085): (1085, False),
    at_ratio(FED_BACK, 1085): (1085, True),
}
_TWO_CORES = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}


@functools.cache
def lab() -> Lab:
    """The lab of the study, for its data."""
    return Lab(studies()["fedzip"])


@functools.cache
def federation(seed: int, lr: float) -> Federation:
    """The study's federation of a seed, classes dealt evenly; each process of Flower makes it once."""
    split = fashion(lab())

    def net() -> nn.Module:
        torch.manual_seed(seed)
        return conv_net(split.train[0].shape[1:], split.classes, hidden=256)

    return Federation(dealt(few(split, EXAMPLES), CLIENTS, None, seed), net, ROUNDS, lr, seed, clip=CLIP)


def client_app(arm: str, seed: int, lr: float) -> ClientApp:
    """Clients that do in a round what those of the study do."""
    told = ARMS[arm]
    mods = [] if told is None else [CompressedUplink(told[0], codec=KMeansLevels(told[1], (2,), layerwise=True))]
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        found, client = federation(seed, lr), int(context.node_config["partition-id"])
        net = found.make()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        number = int(message.content["config"]["server-round"]) - 1
        locally(found, net, found.clients[client], 1000 * client + number)
        metrics = MetricRecord({"num-examples": len(found.clients[client][1])})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def simulated(arm: str, seed: int, lr: float) -> dict[str, Any]:
    """Accuracy after all rounds, and bytes of a client's reply by Flower's own count."""
    found: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        strategy = inner if ARMS[arm] is None else CompressedStrategy(inner)
        start = ArrayRecord(federation(seed, lr).make().state_dict())
        found["state"] = strategy.start(grid, start, num_rounds=ROUNDS).arrays.to_torch_state_dict()
        if isinstance(strategy, CompressedStrategy):
            # The first replies also have plans.
            found["uplink"] = statistics.fmean(one.uplink for one in strategy.traffic[1:]) / CLIENTS
            found["with_plans"] = statistics.fmean(one.uplink for one in strategy.traffic) / CLIENTS
            found["downlink"] = statistics.fmean(one.downlink for one in strategy.traffic) / CLIENTS
            found["refused"] = sum(len(one.refused) for one in strategy.traffic)

    run_simulation(server, client_app(arm, seed, lr), num_supernodes=CLIENTS, backend_config=_TWO_CORES)
    net = federation(seed, lr).make()
    net.load_state_dict(found.pop("state"))
    return {"accuracy": percent(net.eval(), fashion(lab()).test), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    asked = parser.parse_args()
    study = load_results("fedzip")
    rates = {choice["name"].removeprefix("rate of clients, "): choice["value"] for choice in study["choices"]}
    arms = {arm["name"]: arm for arm in study["arms"]}
    rows = []
    for arm in asked.arms:
        for seed in range(asked.seeds):
            row = {"arm": arm, "seed": seed, "rate": rates[arm], **simulated(arm, seed, rates[arm])}
            row |= {"study_accuracy": arms[arm]["values"][seed], "study_bytes": arms[arm]["bytes"]}
            print(row, flush=True)
            rows.append(row)
            save_results("federated", {"rows": rows})


if __name__ == "__main__":
    # Flower's processes know these functions by the name of their module, which is not that of a script.
    import federated

    federated.main()
