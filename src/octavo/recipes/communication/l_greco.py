"""L-GreCo: settings for each layer by a dynamic programme, against one setting for all, in real processes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from octavo.flows.updates import UpdateCodec, compress_ddp
from octavo.flows.updates.mixed import Mixed
from octavo.flows.updates.powersgd import PowerSGD
from octavo.flows.updates.qsgd import QSGD
from octavo.flows.updates.topk import TopK
from octavo.recipes.frame import Lab, Study, gap
from octavo.recipes.frame.data import FASHION, TEXT, fashion
from octavo.recipes.frame.nets import momentum, shuffled
from octavo.recipes.frame.windows import text_windows
from octavo.recipes.testbeds.ranked import RankedGradients, uniform_bytes
from octavo.recipes.testbeds.workers import SmallDecoder, conv_net, nats_of, together
from octavo.training import accuracy, cross_entropy

#: Steps of every arm by its net, of which the first are dense; examples of a step and worker; test windows.
STEPS, WARM, BATCH, WINDOWS = {"images": 200, "text": 150}, 10, {"images": 64, "text": 16}, 256
#: The uniform rank, that of the source's experiments.
RANK = 4
#: Tokens of a window.
TOKENS = 64
#: Worse by so many nats counts as no worse.
MARGIN = 0.02
DENSE, UNIFORM, LESS, OURS = "dense", "PowerSGD, rank 4", "PowerSGD, rank 1", "L-GreCo"
#: Rank 4 in the code of L-GreCo's arm.
SAME = "rank 4, as L-GreCo averages"
FACTORS, TOP, RANDOM, MIXED = "one step for all factors", "top-k", "QSGD", "mixed families"
SENT, SECONDS, PAYS = "bytes sent a step by a worker", "seconds a step", "pays below (Mbit/s)"
RIGHT, SIZE = "accuracy (%)", "bytes a step"
Average = Callable[[list[Tensor]], None]
#: Codecs that get the bytes of L-GreCo's ranks.
CODECS: dict[str, UpdateCodec] = {FACTORS: PowerSGD(), TOP: TopK(), RANDOM: QSGD(), MIXED: Mixed()}


@dataclass(frozen=True)
class Task:
    """What workers train: a net, from a seed, once for every arm."""

    net: str
    world: int
    arms: tuple[str, ...]
    steps: int
    warm: int
    seed: int
    small: bool = False
    mark: str = ""


@Study(
    "l-greco",
    system="L-GreCo",
    source="Alimohammadi et al. (2023), arXiv 2210.17357",
    metric="test loss (nats)",
    higher=False,
    data=f"{FASHION}; {TEXT}",
    claims={
        "fewer": "Ranks for each layer take fewer bytes than rank 4 everywhere",
        "no worse": "The loss is no worse, images and text (0.02 nats)",
        "many": "Both hold with four workers, too",
    },
    extras={
        "top-k": "It is no worse than top-k in the same bytes",
        "qsgd": "It is no worse than QSGD in the same bytes",
        "same": "It is no worse than rank 4 in the same implementation",
        "step": "One step for all quantized factors is no worse, equal bytes",
        "mixed": "Mixed families are no worse on images, equal bytes",
    },
)
def run(lab: Lab) -> None:
    """Ranks and steps of grids are chosen so that the error is that of one setting, the best for its bytes."""
    images, words = fashion(lab), text_windows(lab)
    tensors = dict(zip(("x", "y", "test_x", "test_y"), (*images.train, *images.test), strict=True))
    tensors |= {"ids": words.train[:20_000, :TOKENS], "test_ids": words.test[:WINDOWS, :TOKENS]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    nets = {"images": "", "text": ", text"}
    for seed in lab.each_seed():
        lab.step(f"seed {seed}")
        many, warm = (2, 2) if lab.quick else (4, WARM)
        tasks = [
            Task(net, 2, arms_of(net), steps_of(lab, net), warm, seed, lab.quick, mark) for net, mark in nets.items()
        ]
        tasks.append(
            Task("images", many, (UNIFORM, OURS), steps_of(lab, "images"), warm, seed, lab.quick, ", 4 workers")
        )
        with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
            path = Path(folder)
            save_file(tensors, path / "data.safetensors")
            (path / "tasks.json").write_text(json.dumps([asdict(task) for task in tasks]))
            together(train_all, many, path)
            for arm, loss, size, also in json.loads((path / "found.json").read_text()):
                lab.add(arm, loss, size, **also)
    judge(lab, list(nets.values()))


def judge(lab: Lab, marks: list[str]) -> None:
    """All claims; bytes are what a worker hands over for one step, the mean over steps."""
    lab.gate("the dense net of images is above 80%", gap("accuracy", lab.arms[DENSE].also[RIGHT], [80]))
    lab.gate("bytes matter: rank 1 does damage to images", lab.ahead(UNIFORM, LESS))
    four = ", 4 workers"
    sizes = {mark: lab.ahead(OURS + mark, UNIFORM + mark, of=SIZE, higher=False) for mark in (*marks, four)}
    losses = {mark: lab.ahead(OURS + mark, UNIFORM + mark, -MARGIN) for mark in (*marks, four)}
    lab.judge("fewer", *(sizes[mark] for mark in marks))
    lab.judge("no worse", *(losses[mark] for mark in marks))
    lab.judge("many", sizes[four], losses[four])
    for key, rival in (("top-k", TOP), ("qsgd", RANDOM), ("same", SAME)):
        lab.judge(key, *(lab.ahead(OURS + mark, rival + mark, -MARGIN) for mark in marks))
    lab.judge("step", *(lab.ahead(FACTORS + mark, OURS + mark, -MARGIN) for mark in marks))
    lab.judge("mixed", lab.ahead(MIXED, OURS, -MARGIN))
    arms = lab.arms
    saved = ", ".join(f"{arms[UNIFORM + mark].bytes / arms[OURS + mark].bytes:.2f}" for mark in (*marks, four))
    lab.say(f"Rank {RANK} everywhere takes {saved} times the bytes of L-GreCo's ranks: images, text, four workers.")
    lab.say(
        "A sum over workers can be halved on its way, payloads go from each worker to all others: with more workers "
        "codecs send more than averaged factors of the same size."
    )


def arms_of(net: str) -> tuple[str, ...]:
    """The arms of a net with two workers."""
    common = (DENSE, UNIFORM, SAME, OURS, FACTORS, TOP, RANDOM)
    return (*common, LESS, MIXED) if net == "images" else common


def steps_of(lab: Lab, net: str) -> int:
    """The steps of all arms of a net."""
    return 6 if lab.quick else STEPS[net]


def train_all(folder: Path) -> None:
    """What every worker runs: all tasks in turn; the first one writes what was found."""
    data, found = load_file(folder / "data.safetensors"), []
    for plain in json.loads((folder / "tasks.json").read_text()):
        task = Task(**plain)
        group = dist.new_group(list(range(task.world)))
        if dist.get_rank() < task.world:
            room = 0
            for arm in task.arms:
                loss, size, also = trained(task, arm, data, group, room)
                room = size if arm == OURS else room
                if arm == DENSE:
                    dense_bytes, dense_seconds = size, also[SECONDS]
                elif DENSE in task.arms and also[SECONDS] > dense_seconds:
                    also[PAYS] = 8e-6 * (dense_bytes - size) / (also[SECONDS] - dense_seconds)
                found.append((arm + task.mark, loss, size, also))
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


def trained(
    task: Task, arm: str, data: dict[str, Tensor], group: dist.ProcessGroup, room: int
) -> tuple[float, int, dict[str, float]]:
    """Test loss, bytes of a payload, and other figures of one arm; the batches are those of all arms."""
    torch.manual_seed(task.seed)
    images, rank = task.net == "images", dist.get_rank()
    net = (
        conv_net(data["x"].shape[1:], 10, hidden=32 if task.small else 128)
        if images
        else SmallDecoder(int(data["ids"].max()) + 1, 32 if task.small else 64)
    )
    loss_of = cross_entropy if images else nats_of
    optimizer = momentum(0.05)(net) if images else torch.optim.Adam(net.parameters(), 2e-3)

    def batches() -> Iterator[list[Tensor]]:
        size, epoch = BATCH[task.net] * task.world, 0
        while True:
            tensors = (data["x"], data["y"]) if images else (data["ids"],)
            for parts in shuffled(*tensors, size=size, seed=task.seed)(epoch):
                yield [part[rank :: task.world] for part in parts]
            epoch += 1

    def train(model: nn.Module, steps: int, average: Average | None = None) -> float:
        started = time.perf_counter()
        for batch in islice(stream, steps):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if average is not None:
                average([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
            optimizer.step()
        return (time.perf_counter() - started) / steps

    def collect(gradients: list[Tensor]) -> None:
        for mean, own in zip(evidence, gradients, strict=True):
            mean += own / task.warm

    stream, evidence = batches(), [torch.zeros_like(parameter) for parameter in net.parameters()]
    train(DistributedDataParallel(net, process_group=group), task.warm, collect)
    if arm in (OURS, SAME):
        ranked = RankedGradients(evidence, RANK, group, uniform=arm == SAME)
        seconds, size = train(net, task.steps - task.warm, ranked.average), ranked.bytes
    else:
        model = DistributedDataParallel(net, process_group=group)
        sent = installed(arm, model, room)
        seconds, size = train(model, task.steps - task.warm), sent()
    others = task.world - 1
    also = {SIZE: size, SENT: size * (others if arm in CODECS else 2 * others / task.world), SECONDS: seconds}
    with torch.no_grad():
        net.eval()
        if images:
            test = [(data["test_x"], data["test_y"])]
            also[RIGHT] = 100 * accuracy(net, test)
            return float(cross_entropy(net, test[0])), size, also
        return float(nats_of(net, [data["test_ids"]])), size, also


def installed(arm: str, model: DistributedDataParallel, room: int) -> Callable[[], int]:
    """Let an arm send the gradients of a model; returns what says how many bytes a worker handed over in a step."""
    parameters = list(model.parameters())
    if arm in CODECS:
        sync = compress_ddp(model, size=room, codec=CODECS[arm])
        return lambda: sync.sent
    if arm == DENSE:
        return lambda: sum(parameter.nbytes for parameter in parameters)
    rank = RANK if arm == UNIFORM else 1
    model.register_comm_hook(PowerSGDState(model.process_group, rank, start_powerSGD_iter=2), powerSGD_hook)
    return lambda: uniform_bytes(parameters, rank)
