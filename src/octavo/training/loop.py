"""One training loop on ``accelerate``, for any model and loss, with regimens that hook into its steps."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from octavo.errors import DivergedError, MissingExtraError, RequestError
from octavo.sources.batches import Batch
from octavo.sources.source import StepProgress
from octavo.system.atomic import writing
from octavo.training.losses import LossFunction
from octavo.training.regimens.base import Regimen

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    loss: LossFunction,
    *,
    epochs: int = 1,
    lr: float = 1e-3,
    optimizer: Optimizers | None = None,
    warmup: float = 0.05,
    clip: float | None = 1.0,
    regimen: Regimen | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: StepProgress = lambda done, total: None,
) -> list[float]:
    """Train ``model`` in place.

    Parameters
    ----------
    batches
        Returns the batches of an epoch, by its number; every epoch must have the same number of batches.
    loss
        Takes the model and a batch, and returns a scalar.
    lr, warmup
        Peak learning rate, and the share of steps of its linear rise; it then falls to zero along a cosine.
    optimizer
        Creates an optimizer for the model, after the regimen has begun; AdamW with a weight decay of 0.01 on matrices
        by default. The schedule scales its rates.
    clip
        The largest norm of the gradient.
    checkpoint
        A file for the state after every epoch. An interrupted run continues from it, bit for bit on the CPU.
    seed
        Seed of torch's global generator, which dropout uses.
    progress
        Called with the number of steps done and their total.

    Returns
    -------
    list of float
        The mean loss of every epoch.

    Raises
    ------
    RequestError
        If an epoch has no batches or not as many as the first, or the checkpoint belongs to another run: one of other
        epochs, batches, rates, seed, optimizer or regimen.
    DivergedError
        If the loss is not finite.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("training needs accelerate: pip install 'octavo[train]'") from error
    regimen = regimen or Regimen()
    torch.manual_seed(seed)
    a_batch_each = sum(1 for _ in batches(0))
    if not a_batch_each:
        raise RequestError("batches: an epoch has none, so there is nothing to train on; give at least one")
    steps = epochs * a_batch_each
    try:
        regimen.begin(model, steps)
        made = (optimizer or (lambda module: _adamw(module, lr)))(model)
        regimen.optimized_by(made)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: _rate(step, steps, warmup))
        knobs = {f"knob {knob!r}": value for knob, value in regimen.knobs().items()}
        run = {
            "epochs": epochs, "batches": a_batch_each, "seed": seed, "rates": schedule.get_last_lr(),
            "optimizer": type(made).__name__, "regimen": type(regimen).__name__, **knobs,
        }  # fmt: skip
        # The model stays on its device.
        accelerator = Accelerator(device_placement=False)
        ready, made, schedule = accelerator.prepare(model, made, schedule)
        losses: list[float] = []
        if checkpoint is not None and checkpoint.exists():
            losses = _resume(checkpoint, run, model, made, schedule, regimen)
        step = len(losses) * a_batch_each
        model.train()
        # Gradients of an earlier backward pass would count in the first step.
        model.zero_grad()
        made.zero_grad()
        for number in range(len(losses), epochs):
            total = 0.0
            for batch in batches(number):
                regimen.before_step(step)
                value = regimen.loss(ready, batch, loss)
                if not math.isfinite(value.item()):
                    raise DivergedError(
                        f"the loss is {value.item()} in step {step} of {steps}; lower the learning rate"
                    )
                accelerator.backward(value)
                regimen.after_backward(step)
                if clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                made.step()
                schedule.step()
                made.zero_grad()
                regimen.after_step(step)
                total += value.item()
                step += 1
                progress(step, steps)
            if step != (number + 1) * a_batch_each:
                had = step - number * a_batch_each
                raise RequestError(
                    f"epoch {number} has {had} batches, but epoch 0 has {a_batch_each}; give every epoch as many"
                )
            regimen.after_epoch(number)
            losses.append(total / a_batch_each)
            if checkpoint is not None:
                state = {
                    "run": run, "model": model.state_dict(), "optimizer": made.state_dict(),
                    "schedule": schedule.state_dict(), "regimen": regimen.state(), "losses": losses,
                    "random": torch.get_rng_state(),
                }  # fmt: skip
                _save(checkpoint, state)
        model.eval()
    except BaseException:
        regimen.abort(model)
        raise
    return losses


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def _rate(step: int, steps: int, warmup: float) -> float:
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _save(file: Path, state: dict[str, Any]) -> None:
    with writing(file) as aside:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, aside)


def _resume(
    file: Path, run: dict[str, Any], model: nn.Module, optimizer: Any, schedule: Any, regimen: Regimen
) -> list[float]:
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
        before = state["run"]
        if before != run:
            key = next(key for key in {**run, **before} if before.get(key) != run.get(key))
            there, here = (shorten(str(known.get(key)), 60) for known in (before, run))
            raise RequestError(f"{file}: a checkpoint of another run ({key}: {there} there, {here} here); remove it")
        if _shapes(state["model"]) != _shapes(model.state_dict()):
            raise ValueError("its weights have other names or shapes")
        regimen.resume(state["regimen"])
        # The model last, so that it is as it was where the rest is refused.
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        model.load_state_dict(state["model"])
        torch.set_rng_state(state["random"])
        return [float(value) for value in state["losses"]]
    except RequestError:
        raise
    except (OSError, RuntimeError, AttributeError, KeyError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise RequestError(f"{file}: not a checkpoint of this model and optimizer ({error}); remove it") from error


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(tensor, "shape", None) for name, tensor in state.items()}
