"""scikit-learn's handwritten digits, real data without a download, and training on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .console import extra

SIZE = 32  # pixels a side after enlarging; the images have 8
HELD_OUT = 0.2  # share of the images that training never sees
BATCH = 64
LEARNING_RATE = 0.02  # peak of the one-cycle schedule
# Pixels by which a training batch is moved at most: 99.4% after 8 epochs, else 98.3-99.4%.
SHIFT = 2
MEAN, STD = 0.305, 0.376  # of the 8x8 images, whose values are 0..16, here scaled to 0..1


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, SIZE, SIZE) and labels (N,); every digit has the same share in both parts."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def subset(self, train: int, test: int) -> Digits:
        """The first images of each part."""
        return Digits(
            self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test]
        )


def load_digits(seed: int) -> Digits:
    """1437 images to train on and 360 held out; the split depends on `seed` alone."""
    datasets, selection = extra(_import_sklearn, "scikit-learn", "the demo's data set")
    data = datasets.load_digits()
    train, test = selection.train_test_split(
        range(len(data.target)), test_size=HELD_OUT, stratify=data.target, random_state=seed
    )
    x = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - MEAN) / STD
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    y = torch.tensor(data.target)
    return Digits(x[train], y[train], x[test], y[test])


def to_pixels(x: Tensor) -> Tensor:
    """Normalised images back to brightness 0..1 for a picture."""
    return x * STD + MEAN


def train(
    net: nn.Module,
    digits: Digits,
    epochs: int,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> nn.Module:
    """Trains `net` itself by SGD with momentum and a one-cycle schedule; returns it in eval mode.

    on_step(done, total, loss) is called after every batch. The global random state is not used.
    """
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = -(-len(digits.train_x) // BATCH)
    total = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=total
    )
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_x), generator=generator)
        for index in order.split(BATCH):
            shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
            x = digits.train_x[index].roll(shift, (2, 3))
            loss = F.cross_entropy(net(x), digits.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            on_step(done, total, loss.item())
    return net.eval().to(memory_format=torch.contiguous_format)


def logits(net: nn.Module, x: Tensor) -> Tensor:
    """(N, 1, SIZE, SIZE) -> (N, 10), in batches of 64."""
    with torch.inference_mode():
        return torch.cat([net(part) for part in x.split(BATCH)])


def _import_sklearn():
    from sklearn import datasets, model_selection

    return datasets, model_selection
