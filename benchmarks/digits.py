"""A small convolutional net trained on real digits, and a bare safetensors file, at ratios 8 and 16.

Writes docs/results/digits.json. A few minutes on two cores; `make reproduce` runs it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import digits, minilm, save_results, stat_bytes
from safetensors.torch import save_file
from torch import nn

import octavo


def net() -> nn.Module:
    """A VGG-like net of 0.3 M weights for 28 x 28 images, without bells."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128 * 9, 160), nn.ReLU(), nn.Linear(160, 10),
    )  # fmt: skip


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int = 6) -> None:
    """Plain Adam with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that are told right."""
    model.eval()
    return float((torch.cat([model(part) for part in images.split(500)]).argmax(1) == labels).float().mean())


def main() -> None:
    """Train on 8,000 digits, compress with 512 of them, test on 2,000 others."""
    torch.manual_seed(0)
    images, labels = digits()
    train_images, test_images, test_labels = images[:8000], images[8000:], labels[8000:]
    model = net()
    train(model, train_images, labels[:8000])
    rows: list[dict[str, Any]] = []
    before = accuracy(model, test_images, test_labels)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for ratio in (8, 16):
            done = octavo.compress(model, ratio=ratio, data=list(train_images[:512].split(64)))
            done.save(work / f"net-{ratio}")
            restored = octavo.load(work / f"net-{ratio}", into=net())
            size = stat_bytes(work / f"net-{ratio}")
            rows.append(
                {
                    "source": "convolutional net", "ratio": ratio, "bytes": size, "budget": done.budget.bytes,
                    "used": size / done.budget.bytes, "kl_held_back": done.built.quality,
                    "accuracy": accuracy(restored, test_images, test_labels), "accuracy_before": before,
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, work / "net.safetensors")
        for name, source in (
            ("bare net.safetensors", work / "net.safetensors"),
            ("bare MiniLM", minilm() / "model.safetensors"),
        ):
            for ratio in (8, 16):
                done = octavo.compress(source, ratio=ratio)
                target = work / f"{name.split()[1].split('.')[0]}-bare-{ratio}"
                done.save(target)
                size = stat_bytes(target)
                row = {
                    "source": name,
                    "ratio": ratio,
                    "bytes": size,
                    "budget": done.budget.bytes,
                    "used": size / done.budget.bytes,
                }
                if "net" in name:
                    restored = octavo.load(target, into=net())
                    row |= {"accuracy": accuracy(restored, test_images, test_labels), "accuracy_before": before}
                rows.append(row)
                print(json.dumps(row), flush=True)
    save_results(
        "digits", {"data": "10,000 MNIST digits: 8,000 to train, 512 of them to calibrate, 2,000 to test", "rows": rows}
    )


if __name__ == "__main__":
    main()
