"""The candidates of ``benchmarks/updates.py`` in PyTorch, written as its users would.

A process of its own, as it may need another environment (``--peer-python``); it needs PyTorch
alone, and ``torchjd`` for two candidates. The argument is JSON from ``updates.py``. For every line
of standard input, the name of a candidate, a round of its steps runs.

* ``joint``: backpropagation of the weighted sum, a step.
* ``separate``: ``torch.autograd.grad`` of each loss to what it reaches, then a step of each, as in
  multi-way backpropagation, each with an optimizer of its own.
* ``mtl_backward``: TorchJD for networks with several outputs. The Jacobian of all losses to what
  they all share, below the first exit, aggregated with UPGrad; gradients above it are summed.
* ``backward``: TorchJD's Jacobian of all losses to all parameters, aggregated with UPGrad.
* ``compiled``: ``joint`` with ``torch.compile``.
* ``separate_compiled``: ``separate`` with ``torch.compile`` of the losses. Each of its backward
  passes is that of all outputs together, as they are compiled, with zeros for the other losses.

Eager but for the last two, ``channels_last``, fused optimizer, on the device of ours: on a GPU
with the fastest algorithms, and products of float32 in TF32, as XLA has them. TorchJD takes the
losses one after another (``parallel_chunk_size=1``): its ``vmap`` over them takes longer on a CPU.
"""

import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Take = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WARM_UP = 2
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """A residual block with pre-activation and a shortcut of type A."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(inputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, c, h, w]``."""
        y = self.conv_1(self.norm_1(x).relu())
        y = self.conv_2(self.norm_2(y).relu())
        x = x[:, :, :: self.stride, :: self.stride]
        return y + (functional.pad(x, (0, 0, 0, 0, 0, self.missing)) if self.missing else x)


class Exit(nn.Module):
    """Batch norm, ReLU, the mean over all pixels, a dense layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.output = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, c, h, w]`` to ``[b, classes]``."""
        return self.output(self.norm(x).relu().mean((2, 3)))


class AuxNet(nn.Module):
    """A pre-activation ResNet with exits after some of its layers; the last exit is its output.

    Attributes:
        reached: For each exit the parameters that its loss reaches.
    """

    def __init__(self, depth: int, layers: list[int], classes: int, width: float = 1.0) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        widths = [round(width * features) for features in WIDTHS]
        self.stem = nn.Conv2d(3, round(width * 16), 3, 1, 1, bias=False)
        sizes = [round(width * 16), *(features for features in widths for _ in range(blocks))]
        self.blocks = nn.ModuleList(
            Block(sizes[i], sizes[i + 1], 1 + (i > 0 and i % blocks == 0))
            for i in range(3 * blocks)
        )
        # Exits by the number of blocks before them: the first convolution is layer 1.
        self.places = [*((layer - 1) // 2 for layer in layers), 3 * blocks]
        self.exits = nn.ModuleList(Exit(sizes[place], classes) for place in self.places)
        self.reached = [
            [*self.shared(place), *own.parameters()]
            for place, own in zip(self.places, self.exits, strict=True)
        ]

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps images to the logits of each exit; also the features that all exits share."""
        x = self.stem(x)
        outputs, shared = [], x
        for count, block in enumerate(self.blocks, start=1):
            x = block(x)
            if count in self.places:
                shared = shared if outputs else x
                outputs.append(self.exits[len(outputs)](x))
        return outputs, shared

    def shared(self, count: int) -> list[nn.Parameter]:
        """Returns the parameters of the stem and the first blocks."""
        return [*self.stem.parameters(), *self.blocks[:count].parameters()]


class Contest:
    """The candidates of a network.

    Args:
        settings: The argument.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.weights = settings, settings["weights"]
        self.device = torch.device("cuda" if settings["device"] == "cuda" else "cpu")
        generator = torch.Generator().manual_seed(0)
        count = settings["batch_size"] * settings["steps"]
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).byte()
        labels = torch.randint(0, settings["classes"], (count,), generator=generator)
        self.pixels, self.labels = pixels.to(self.device), labels.to(self.device)

    def network(self) -> AuxNet:
        """Makes the network, always with the same parameters."""
        torch.manual_seed(0)
        settings = self.settings
        network = AuxNet(
            settings["depth"], settings["layers"], settings["classes"], settings["width"]
        )
        return network.to(self.device, memory_format=torch.channels_last)

    def optimizer(self, parameters: Any, divisor: float = 1.0) -> torch.optim.Optimizer:
        """Makes the optimizer of some parameters."""
        return torch.optim.SGD(
            parameters,
            self.settings["learning_rate"] / divisor,
            momentum=self.settings["momentum"],
            nesterov=True,
            weight_decay=self.settings["weight_decay"],
            fused=True,
        )

    def losses(
        self, network: AuxNet, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns each loss with its weight, and the features that all share."""
        outputs, shared = network(images)
        unweighted = [functional.cross_entropy(logits, labels) for logits in outputs]
        return [w * loss for w, loss in zip(self.weights, unweighted, strict=True)], shared

    def joint(self, compiled: bool = False) -> Take:
        """Prepares joint backpropagation."""
        network = self.network()
        optimizer = self.optimizer(network.parameters())

        def total(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.stack(self.losses(network, images, labels)[0]).sum()

        objective = torch.compile(total) if compiled else total

        def take(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = objective(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return take

    def compiled(self) -> Take:
        """Prepares joint backpropagation, compiled."""
        return self.joint(compiled=True)

    def gradients(self, losses: list[torch.Tensor], network: AuxNet) -> list[Any]:
        """Returns the gradient of each loss to what it reaches."""
        last = len(losses) - 1
        return [
            torch.autograd.grad(loss, network.reached[k], retain_graph=k < last)
            for k, loss in enumerate(losses)
        ]

    def separate(self, compiled: bool = False) -> Take:
        """Prepares a backward pass and a step for each loss."""
        network = self.network()

        def weighted(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
            return self.losses(network, images, labels)[0]

        objectives = torch.compile(weighted) if compiled else weighted
        last = len(self.weights) - 1
        divisors = [max(1.0, sum(self.weights[k:last])) for k in range(last)] + [1.0]
        optimizers = list(map(self.optimizer, network.reached, divisors))

        def take(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            losses = objectives(images, labels)
            # All before the first step, which would change what the others need.
            gradients = self.gradients(losses, network)
            for k, optimizer in enumerate(optimizers):
                for parameter, gradient in zip(network.reached[k], gradients[k], strict=True):
                    parameter.grad = gradient
                optimizer.step()
            return torch.stack(losses).detach().sum()

        return take

    def separate_compiled(self) -> Take:
        """Prepares a backward pass and a step for each loss, compiled."""
        from torch._functorch import config

        # What a backward pass has read is read by the next one.
        config.donated_buffer = False
        return self.separate(compiled=True)

    def mtl_backward(self) -> Take:
        """Prepares TorchJD's step with what all losses share below the first exit."""
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        network, aggregator = self.network(), UPGrad()
        optimizer = self.optimizer(network.parameters())
        shared = network.shared(network.places[0])

        def take(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            losses, features = self.losses(network, images, labels)
            optimizer.zero_grad()
            # Exits have blocks in common above the shared features: the graph is needed again.
            mtl_backward(losses, features=features, retain_graph=True, parallel_chunk_size=1)
            jac_to_grad(shared, aggregator)
            optimizer.step()
            return torch.stack(losses).detach().sum()

        return take

    def backward(self) -> Take:
        """Prepares TorchJD's step with the Jacobian to all parameters."""
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import backward, jac_to_grad

        network, aggregator = self.network(), UPGrad()
        optimizer = self.optimizer(network.parameters())

        def take(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            losses, _ = self.losses(network, images, labels)
            optimizer.zero_grad()
            backward(losses, parallel_chunk_size=1)
            jac_to_grad(network.parameters(), aggregator)
            optimizer.step()
            return torch.stack(losses).detach().sum()

        return take

    def run(self, take: Take, steps: int) -> float:
        """Takes steps; returns their mean loss."""
        total = torch.zeros((), device=self.device)
        size = self.settings["batch_size"]
        for i in range(steps):
            chosen = slice(i * size, (i + 1) * size)
            images = self.pixels[chosen].float() / 255
            images = images.contiguous(memory_format=torch.channels_last)
            total += take(images, self.labels[chosen])
        return total.item() / steps

    def check(self) -> None:
        """Checks that the losses' own gradients add up to the joint one."""
        network = self.network()
        images, labels = self.pixels[:4].float() / 255, self.labels[:4]
        losses, _ = self.losses(network, images, labels)
        summed = [torch.zeros_like(parameter) for parameter in network.parameters()]
        places = {id(parameter): i for i, parameter in enumerate(network.parameters())}
        for reached, gradients in zip(
            network.reached, self.gradients(losses, network), strict=True
        ):
            for parameter, gradient in zip(reached, gradients, strict=True):
                summed[places[id(parameter)]] += gradient
        torch.stack(self.losses(network, images, labels)[0]).sum().backward()
        for parameter, gradient in zip(network.parameters(), summed, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def count(network: nn.Module) -> int:
    """Counts parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    """Prepares the candidates, then answers a line of JSON for every line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print should not be among the answers.
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        sys.exit("Error: PyTorch finds no GPU for --device=cuda; install PyTorch for it.")
    if settings["device"] == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    contest, takes, errors = Contest(settings), {}, {}
    torch.backends.cudnn.allow_tf32 = False
    contest.check()
    torch.backends.cudnn.allow_tf32 = True
    for name in settings["candidates"]:
        try:
            takes[name] = getattr(contest, name)()
            contest.run(takes[name], min(WARM_UP, settings["steps"]))
        except Exception as error:
            takes.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            errors[name] = textwrap.shorten(reason, 120, placeholder=" …")
    facts = {
        "parameters": count(contest.network()),
        settings["trunk"]: count(AuxNet(int(settings["trunk"].split("-")[1]), [], 10)),
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if settings["device"] == "cuda" else "cpu",
        "ready": list(takes),
        "errors": errors,
    }
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        loss = contest.run(takes[line.strip()], settings["steps"])
        seconds = (time.perf_counter() - started) / settings["steps"]
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        print(json.dumps({"seconds": seconds, "loss": loss}), file=answers, flush=True)


if __name__ == "__main__":
    main()
