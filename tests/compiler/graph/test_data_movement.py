"""Chains of data movement: one gather if they are one, else unchanged."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ensemble.compiler.pipeline import compile_vmapped
from ensemble.compiler.runtime.program import Program
from tests.tiny import independent

pytest.importorskip("numba")

CHANNELS = 24


class Between(nn.Module):
    """Data movement, `move`, between two convolutions."""

    def __init__(self, move: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.move = nn.Conv2d(3, CHANNELS, 3, padding=1), move
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.move(self.first(x))).mean((2, 3), keepdim=True)


def shuffled(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    parts = x.view(batch, 3, channels // 3, height, width)
    return parts.transpose(1, 2).reshape(batch, channels, height, width)


def shorter_and_wider(x: Tensor) -> Tensor:
    """The shortcut without weights of a ResNet for CIFAR (He and others, arXiv 1512.03385)."""
    return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


def in_parts(x: Tensor) -> Tensor:
    first, second, third = x.split(8, 1)
    return torch.cat([second.relu(), first, third], 1)


GATHERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "shuffle": (shuffled, CHANNELS),
    "torch's shuffle": (lambda x: functional.channel_shuffle(x, 4), CHANNELS),
    "half": (lambda x: x.chunk(2, 1)[1], CHANNELS // 2),
    "half of a shuffle": (lambda x: shuffled(x)[:, 7:18], 11),
    "parts": (in_parts, CHANNELS),
    "shortcut": (shorter_and_wider, CHANNELS + 8),
    "border": (lambda x: functional.pad(x, (0, 1, 2, 0)), CHANNELS),
    "smaller": (lambda x: functional.pad(x, (-1, 0, -2, 1)), CHANNELS),
    "reflection": (lambda x: functional.pad(x, (1, 2, 1, 1), "reflect"), CHANNELS),
    "replication": (lambda x: functional.pad(x, (1, 2, 1, 1), "replicate"), CHANNELS),
    "larger": (lambda x: functional.interpolate(x, scale_factor=2.0), CHANNELS),
    "turned": (lambda x: x.flip(-1).roll(2, -2), CHANNELS),
    "one row": (lambda x: x[:, :, 2:3], CHANNELS),
    "nothing": (lambda x: x.permute(1, 0, 2, 3).transpose(0, 1), CHANNELS),
}
OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pixels to channels": (lambda x: functional.pixel_unshuffle(x, 2), 4 * CHANNELS),
    "circular": (lambda x: functional.pad(x, (1, 2, 1, 1), "circular"), CHANNELS),
    "border of ones": (lambda x: functional.pad(x, (1, 1, 1, 1), value=1.0), CHANNELS),
    "transposed": (lambda x: x.transpose(2, 3), CHANNELS),
    "rows by column": (lambda x: torch.gather(x, 2, ramp(x)), CHANNELS),
}


def ramp(x: Tensor) -> Tensor:
    return torch.arange(x.shape[3]).remainder(x.shape[2]).expand_as(x)


def found(
    move: Callable[[Tensor], Tensor], channels: int, x: Tensor
) -> tuple[Tensor, Tensor, list[str], int]:
    """The result, the expected one, the remaining operators, and the number of programs."""
    torch.manual_seed(0)
    models: list[nn.Module] = [Between(move, channels).eval() for _ in range(3)]
    with torch.inference_mode():
        module = compile_vmapped(models, x, threads=torch.get_num_threads()).forward
        result = module(x)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in calls if "getitem" not in str(node.target)]
    programs = sum(isinstance(child, Program) for child in module.modules())
    return result, independent(models, x), names, programs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", GATHERS)
def test_a_gather_is_a_step_of_one_program(name: str, batch: int) -> None:
    result, expected, left, programs = found(*GATHERS[name], torch.randn(batch, 3, 8, 6))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert (left, programs) == ([], 1)


@pytest.mark.parametrize("name", OTHERS)
def test_a_chain_that_is_no_gather_stays(name: str) -> None:
    result, expected, left, _ = found(*OTHERS[name], torch.randn(2, 3, 8, 6))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert left


def test_zeros_of_a_gather_are_zeros_even_if_the_images_are_not_finite() -> None:
    x = torch.full((1, 3, 4, 4), torch.inf)
    result, _, _, _ = found(lambda x: functional.pad(x, (1, 1, 1, 1))[:, :, :1], CHANNELS, x)
    assert bool(result.isfinite().all())
