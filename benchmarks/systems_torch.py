"""The networks of ``benchmarks/systems.py`` in PyTorch, and their steps.

Those of pairs, SIRe and AuxNet are those of other benchmarks; SSAL's is made of the blocks that
ours has. All are in ``channels_last`` and have fused optimizers.
"""

from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import devices
import numpy as np
import torch
from pairs import Branches
from sire import HIDDEN, WIDTHS, SireCNN, take_steps
from systems_programs import WARM_UP, Contender, load_config, random_batch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from updates_torch import AuxNet, count
from workers import Training

from sire_jax.backbones.blocks import Block, Convolution, Residual
from sire_jax.backbones.settings import scaled, strides
from sire_jax.configuration import experiment
from sire_jax.configuration.experiment import Experiment
from sire_jax.heads.branch_blocks import Dense, ExpandedInception, GlobalPool
from sire_jax.networks import MAIN

Batch = Mapping[str, torch.Tensor]
# Weights of the objectives by output.
Weights = Mapping[str, float]
Loss = Callable[[nn.Module, Batch, Weights], torch.Tensor]
# Modes of torch.compile; graphs of CUDA spare a small network the launches of its kernels.
MODES = {"compiled": "default", "graphs": "reduce-overhead"}


# ---- SSAL's network.


def unit(
    inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1
) -> list[nn.Module]:
    """Makes a convolution that keeps the size, or divides it by its stride, and batch norm."""
    height, width = (size, size) if isinstance(size, int) else size
    padding = (height // 2, width // 2)
    convolution = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class ResidualBlock(nn.Module):
    """Convolutions, and a shortcut around them: the identity or a projection."""

    def __init__(self, block: Residual, inputs: int) -> None:
        super().__init__()
        widths, sizes = block.widths, block.kernel_sizes
        layers: list[nn.Module] = []
        for before, width, size, stride in zip(
            (inputs, *widths[:-1]), widths, sizes, strides(sizes, block.stride), strict=True
        ):
            layers += [*unit(before, width, size, stride), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        changes = block.stride > 1 or inputs != widths[-1]
        projection = unit(inputs, widths[-1], 1, block.stride) if changes else []
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, c, h, w]``."""
        return (self.layers(x) + self.shortcut(x)).relu()


class Inception(nn.Module):
    """Four paths of convolutions, concatenated."""

    def __init__(self, block: ExpandedInception, inputs: int) -> None:
        super().__init__()
        width, reduced = block.width, block.reduced

        def active(*settings: Any) -> nn.Sequential:
            return nn.Sequential(*unit(*settings), nn.ReLU())

        self.first, self.second = active(inputs, width, 1), active(inputs, width, 1)
        self.third = nn.Sequential(active(inputs, reduced, 1), active(reduced, width, 1))
        sides = ((1, 3), (3, 1))
        self.lines = nn.ModuleList(active(width, width, side) for side in sides * 2)
        pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.pooled = nn.Sequential(pool, active(inputs, block.pooled, (3, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, c, h, w]``."""
        starts = [self.second(x)] * 2 + [self.third(x)] * 2
        lines = [line(start) for line, start in zip(self.lines, starts, strict=True)]
        return torch.cat([self.first(x), *lines, self.pooled(x)], 1)


class Mean(nn.Module):
    """The mean over all pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, c, h, w]`` to ``[b, c]``."""
        return x.mean((2, 3))


def module(block: Block, inputs: int) -> nn.Module:
    """Makes the module of a block of ours."""
    if isinstance(block, Convolution):
        convolution = unit(inputs, block.width, block.kernel_size, block.stride)
        return nn.Sequential(*convolution, nn.ReLU())
    if isinstance(block, Residual):
        return ResidualBlock(block, inputs)
    if isinstance(block, ExpandedInception):
        return Inception(block, inputs)
    if isinstance(block, GlobalPool):
        return Mean()
    if isinstance(block, Dense):
        return nn.Sequential(nn.Linear(inputs, block.width), nn.ReLU())
    raise ValueError(f"There is no module of PyTorch's for {block}.")


def sequence(blocks: tuple[Block, ...], inputs: int) -> tuple[nn.Sequential, int]:
    """Makes the modules of blocks; returns their output channels, too."""
    modules = []
    for block in blocks:
        modules.append(module(block, inputs))
        inputs = block.channels(inputs)
    return nn.Sequential(*modules), inputs


class Branched(nn.Module):
    """A backbone with branches behind its stages."""

    def __init__(self, parts: Experiment) -> None:
        super().__init__()
        backbone: Any = parts.network.backbone
        heads: Mapping[str, Any] = parts.network.heads
        width, self.stages, self.branches = 3, nn.ModuleList(), nn.ModuleDict()
        self.places: list[list[str]] = []
        for i, blocks in enumerate(backbone.plan.stages, start=1):
            stage, width = sequence(blocks, width)
            self.stages.append(stage)
            self.places.append(
                [k for k, head in heads.items() if head.endpoints == (f"stage_{i}",)]
            )
            for name in self.places[-1]:
                layers, last = sequence(heads[name].layers, width)
                self.branches[name] = layers.append(nn.Linear(last, heads[name].classes))
        self.output = nn.Sequential(Mean(), nn.Linear(width, backbone.classes))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps images to the logits of each output."""
        outputs: dict[str, torch.Tensor] = {}
        for stage, names in zip(self.stages, self.places, strict=True):
            x = stage(x)
            outputs |= {name: self.branches[name](x) for name in names}
        return {**outputs, MAIN: self.output(x)}


# ---- The four networks, and the losses of a batch.


class System(NamedTuple):
    """A network and its loss."""

    make: Callable[[Experiment], nn.Module]
    loss: Loss


def make_sire(parts: Experiment) -> nn.Module:
    """Makes SIRe-CNN."""
    backbone = parts.config.backbone
    widths = scaled(WIDTHS, backbone.get("width", 1.0))
    return SireCNN(sire=True, widths=widths, hidden=backbone.get("hidden", HIDDEN))


def make_auxnet(parts: Experiment) -> nn.Module:
    """Makes an AuxNet."""
    backbone, layers = parts.config.backbone, list(parts.config.heads.exit.layers)
    return AuxNet(backbone.depth, layers, backbone.classes, backbone.width)


def pairs_loss(network: nn.Module, batch: Batch, weights: Weights) -> torch.Tensor:
    """Returns the loss of the order and of the two digits, which are summed."""
    logit, digits = network(batch["image"])
    order = functional.binary_cross_entropy_with_logits(logit.float(), batch["label"].float())
    both = functional.cross_entropy(digits.float().flatten(0, 1), batch["digits"].flatten())
    return weights[MAIN] * order + weights["digits"] * 2 * both


def sire_loss(network: nn.Module, batch: Batch, weights: Weights) -> torch.Tensor:
    """Returns the cross entropy and the decoders' mean squared errors."""
    logits, decoded = network(batch["image"])
    loss = weights[MAIN] * functional.cross_entropy(logits.float(), batch["label"])
    for i, images in enumerate(decoded, start=1):
        error = functional.mse_loss(images.float(), batch["image"])
        loss = loss + weights[f"decoder_{i}"] * error
    return loss


def auxnet_loss(network: nn.Module, batch: Batch, weights: Weights) -> torch.Tensor:
    """Returns the cross entropy of all exits, the main one last."""
    outputs, _ = network(batch["image"])
    ordered = [weights[name] for name in weights if name != MAIN] + [weights[MAIN]]
    losses = [functional.cross_entropy(logits.float(), batch["label"]) for logits in outputs]
    return torch.stack([w * loss for w, loss in zip(ordered, losses, strict=True)]).sum()


def ssal_loss(network: nn.Module, batch: Batch, weights: Weights) -> torch.Tensor:
    """Returns the cross entropy of the classes and of each branch's groups."""
    total = torch.zeros((), device=batch["image"].device)
    for name, logits in network(batch["image"]).items():
        target = batch["label" if name == MAIN else name.replace("branch", "groups")]
        total = total + weights[name] * functional.cross_entropy(logits.float(), target)
    return total


SYSTEMS = {
    "pairs": System(lambda parts: Branches(), pairs_loss),
    "sire": System(make_sire, sire_loss),
    "auxnet": System(make_auxnet, auxnet_loss),
    "ssal": System(Branched, ssal_loss),
}


# ---- Training.


def torch_batch(parts: Experiment, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the batch of ours on a device; of pairs each image has but one channel."""
    batch = {name: torch.from_numpy(np.array(x)) for name, x in random_batch(parts).items()}
    image = batch.pop("image")
    image = image[..., 0] if image.ndim == 5 else image.permute(0, 3, 1, 2)
    image = image.to(device).contiguous(memory_format=torch.channels_last)
    labels = {name: values.long().to(device) for name, values in batch.items()}
    return {"image": image, **labels}


def make_optimizer(parts: Experiment, network: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimizer of the config."""
    chosen = parts.config.optimizer
    if chosen.name == "adam":
        return torch.optim.Adam(network.parameters(), chosen.learning_rate, fused=True)
    return torch.optim.SGD(
        network.parameters(),
        chosen.learning_rate,
        momentum=chosen.momentum,
        nesterov=chosen.nesterov,
        weight_decay=chosen.weight_decay,
        fused=True,
    )


def multiply_adds(network: nn.Module, image: torch.Tensor) -> int:
    """Counts those of one example's forward pass."""
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image[:1])
    network.train()
    return counter.get_total_flops() // 2


def prepare(contender: Contender) -> Training:
    """Makes a network of PyTorch's and its step, compiled if the contender is."""
    torch.manual_seed(0)
    if contender.device == "cuda":
        devices.as_xla()
    device = torch.device(contender.device)
    parts, system = experiment.build(load_config(contender)), SYSTEMS[contender.network]
    network = system.make(parts).to(device, memory_format=torch.channels_last)
    batch, optimizer = torch_batch(parts, device), make_optimizer(parts, network)
    objectives = {o.output: float(o.weight_at(0)) for o in parts.objectives.values()}
    weights = {name: objectives[name] for name in parts.output_names()}
    facts = {
        "batch_size": parts.config.batch_size,
        "multiply_adds": multiply_adds(network, batch["image"]),
        "kind": torch.cuda.get_device_name() if contender.device == "cuda" else "cpu",
    }
    mode = MODES.get(contender.engine)
    loss = torch.compile(system.loss, mode=mode) if mode else system.loss

    def take(steps: int) -> float:
        batches = repeat((network, batch, weights), steps)
        return take_steps(loss, optimizer, batches, contender.device, contender.dtype)

    take(WARM_UP)
    return Training(take, count(network), None, facts)
