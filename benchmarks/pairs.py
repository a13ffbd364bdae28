"""Times the row ``aux_10`` of the pairs table beside the same training in PyTorch eager.

``python benchmarks/pairs.py --data-dir=DIR`` (needs ``pip install -e '.[benchmark]'``). Both train
``--seeds`` networks for ``--epochs`` epochs of 1,000 pairs in batches of 100, with Adam, dropout
and batch norm, and measure losses and accuracies of the training and test pairs after every epoch
(with ``--no-evaluation`` after the last). Both start from decoded images in memory. Ours is timed
from the config to the last measurement, compilation included; PyTorch from the first network to the
last measurement. With ``--at-once=2`` two networks are trained at a time, each on cores of its own:
by two devices that share the runs, and by two processes with half of the threads, which have been
started before. Prints a table and writes JSON.
"""

import argparse
import functools
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import devices
import jax
import numpy as np
import torch
from torch import nn

from sire_jax import configuration, train
from sire_jax.data import sources
from sire_jax.data.tasks import Pairs
from sire_jax.text import align, spread


class Branches(nn.Module):
    """The network of ``PairBranches``, written as its PyTorch users would."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.Dropout(0.1)),
            *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.Dropout(0.1)),
            *(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(32, 10),
        )
        self.combine = nn.Sequential(
            nn.Linear(20, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 1)
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps ``[b, 2, 14, 14]`` to the logit ``[b]`` and the digits ``[b, 2, 10]``."""
        digits = self.branch(image.flatten(0, 1)[:, None]).unflatten(0, (-1, 2))
        return self.combine(digits.softmax(-1).flatten(1))[:, 0], digits


def torch_run(splits: dict[str, tuple[torch.Tensor, ...]], epochs: int, evaluation: bool) -> float:
    """Trains one PyTorch network; returns its test accuracy."""
    image, digits, label = splits["train"]
    network = Branches().to(image.device)
    optimizer = torch.optim.Adam(network.parameters())
    for epoch in range(epochs):
        network.train()
        for chosen in torch.randperm(len(image), device=image.device).split(100):
            logit, digit_logits = network(image[chosen])
            main = nn.functional.binary_cross_entropy_with_logits(logit, label[chosen])
            # A sum over the two digits, as in the report.
            aux = 2 * nn.functional.cross_entropy(
                digit_logits.flatten(0, 1), digits[chosen].flatten()
            )
            optimizer.zero_grad()
            (main + 10 * aux).backward()
            optimizer.step()
        network.eval()
        if evaluation or epoch == epochs - 1:
            measured = {split: torch_measure(network, *arrays) for split, arrays in splits.items()}
    return measured["test"][0]


@torch.no_grad()
def torch_measure(
    network: nn.Module, image: torch.Tensor, digits: torch.Tensor, label: torch.Tensor
) -> tuple[float, ...]:
    """Returns accuracy and loss of the order and of the digits."""
    logit, digit_logits = network(image)
    return (
        ((logit > 0) == (label > 0.5)).float().mean().item(),
        nn.functional.binary_cross_entropy_with_logits(logit, label).item(),
        (digit_logits.argmax(-1) == digits).float().mean().item(),
        nn.functional.cross_entropy(digit_logits.flatten(0, 1), digits.flatten()).item(),
    )


def torch_runs(options: argparse.Namespace, seeds: Sequence[int]) -> list[float]:
    """Trains networks one after the other in PyTorch; returns test accuracies."""
    task, dataset = Pairs(downscale=2), _dataset(options.data_dir)
    arrays = {"train": task.prepare(dataset.train), "test": task.prepare(dataset.test)}
    accuracies = []
    device, evaluation = torch.device(options.device), not options.no_evaluation
    for seed in seeds:
        torch.manual_seed(seed)
        draw = task.draw(dataset, seed)._asdict()
        splits = {}
        for split, source in arrays.items():
            image = torch.from_numpy(source["image"][draw[split]][..., 0] / 255)
            digits = torch.from_numpy(source["label"][draw[split]]).long()
            label = (digits[:, 0] <= digits[:, 1]).float()
            splits[split] = tuple(array.to(device) for array in (image, digits, label))
        accuracies.append(torch_run(splits, options.epochs, evaluation))
    return accuracies


@functools.cache
def _dataset(data_dir: str) -> sources.Dataset[sources.Source]:
    config = configuration.load(f"{configuration.repository_configs()}/pairs.py:aux_10")
    return sources.load("tfds:mnist", data_dir, config.data.cache)


def _begin(threads: int, data_dir: str, all_begun: Any) -> None:
    """Begins a process that trains in PyTorch; returns when all have begun."""
    torch.set_num_threads(threads)
    _dataset(data_dir)
    all_begun.wait()


def time_torch(options: argparse.Namespace) -> Any:
    """Times PyTorch; returns seconds and test accuracies."""
    if options.at_once == 1:
        _dataset(options.data_dir)
        started = time.perf_counter()
        accuracies = torch_runs(options, range(options.seeds))
        return time.perf_counter() - started, accuracies
    threads = max(1, torch.get_num_threads() // options.at_once)
    context = multiprocessing.get_context("spawn")
    all_begun = context.Barrier(options.at_once + 1)
    with context.Pool(options.at_once, _begin, (threads, options.data_dir, all_begun)) as pool:
        all_begun.wait()
        started = time.perf_counter()
        shares = [range(i, options.seeds, options.at_once) for i in range(options.at_once)]
        found = pool.map(functools.partial(torch_runs, options), shares, chunksize=1)
        return time.perf_counter() - started, [each for share in found for each in share]


def time_ours(options: argparse.Namespace) -> Any:
    """Times the shipped config; returns seconds and test accuracies."""
    overrides = {
        "data.dir": options.data_dir,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "evaluate_every": int(not options.no_evaluation),
        # Compilation counts.
        "compilation_cache": "",
    }
    if options.at_once > 1:
        overrides |= {"devices": options.at_once, "devices_share": "runs"}
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    started = time.perf_counter()
    config = configuration.load(f"{configuration.repository_configs()}/pairs.py:aux_10", settings)
    with tempfile.TemporaryDirectory() as workdir:
        results = train.train(config, workdir)
    return time.perf_counter() - started, results["splits"]["test"]["main/top_1"]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    devices.add_option(parser)
    parser.add_argument("--data-dir", default="~/tensorflow_datasets")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--no-evaluation", action="store_true", help="measure only at the end")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the fastest counts")
    parser.add_argument("--at-once", type=int, default=1, help="networks trained at a time")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    options.device = devices.choose(options.device).platform
    _dataset(options.data_dir)
    rounds = []
    for _ in range(options.repeats):
        jax.clear_caches()
        rounds.append(
            {
                "sire_jax": time_ours(options),
                "PyTorch eager": time_torch(options),
            }
        )
    report(rounds, options)


def report(rounds: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints the table and writes the JSON."""
    best = {name: min(times[name][0] for times in rounds) for name in rounds[0]}
    rows = [["", "seconds", "relative", "test accuracy"]]
    for name, seconds in best.items():
        accuracy = "{:.3f} ± {:.3f}".format(*spread(rounds[-1][name][1]))
        relative = f"{seconds / best['PyTorch eager']:.2f}"
        rows.append([name, f"{seconds:.1f}", relative, accuracy])
    print("\n" + align(rows))
    figures = {
        "machine": f"{platform.processor() or platform.machine()}, {jax.devices()}",
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(),
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("data_dir", "json")},
        "rounds": rounds,
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
