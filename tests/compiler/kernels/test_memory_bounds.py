"""Kernels at every vector width stay within the bounds of their buffers."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble.compiler.planning.row_tiling import CacheSizes
from ensemble.compiler.planning.step import (
    Activation,
    Geometry,
    Kind,
    Step,
)

pytest.importorskip("numba")

from ensemble.compiler import kernels
from ensemble.compiler.codegen.simd import PANEL, WIDTH
from ensemble.compiler.graph.decomposition import coordinates
from ensemble.compiler.operators.affine import affine_step
from ensemble.compiler.operators.channel_conv import channel_conv, channel_conv_step
from ensemble.compiler.operators.conv2d import pack_weight
from ensemble.compiler.operators.gather import gather_step, plain_gather
from ensemble.compiler.operators.group_norm import group_norm_step
from ensemble.compiler.operators.layer_norm import layer_norm_step
from ensemble.compiler.operators.pixel_shuffle import pixel_shuffle_step
from ensemble.compiler.operators.pooling import average_pool2d_step, max_pool2d_step
from ensemble.compiler.operators.resample import resample_step
from ensemble.compiler.planning import vector_layout
from ensemble.compiler.runtime import program

GUARD = 256  # bytes before and after each buffer
NAN = 0xFF  # four of them are a NaN: a read out of bounds shows in the result


@pytest.fixture
def check_guards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """All buffers of programs between guard bytes; call it to check these."""
    buffers: list[Tensor] = []

    def guarded(size: int) -> Tensor:
        memory = torch.full((size + 2 * GUARD + 64,), NAN, dtype=torch.uint8)
        start = GUARD + -memory.data_ptr() % 64
        memory[start : start + size] = 0
        buffers.append(memory[:start])
        buffers.append(memory[start + size :])
        return memory[start : start + size]

    def check() -> None:
        assert buffers
        assert all(bool((guard == NAN).all()) for guard in buffers)

    monkeypatch.setattr(program, "_allocate_aligned", guarded)
    monkeypatch.setattr(program, "_allocate_aligned_huge", guarded)
    return check


def inside_guards(values: Tensor) -> Tensor:
    """A copy between NaN guards."""
    memory = torch.full((values.numel() + 2 * GUARD,), float("nan"))
    inner = memory[GUARD : GUARD + values.numel()].view(values.shape)
    return inner.copy_(values)


def cases() -> list[tuple[Kind, Geometry]]:
    """Every kernel of convolutions with every shape here that it can run."""
    # Outputs with a last panel that is not full, or with no full one.
    both = [(1, PANEL), (3, PANEL + WIDTH), (WIDTH, PANEL), (WIDTH + 1, PANEL), (2 * WIDTH, WIDTH)]
    both += [(3 * WIDTH, PANEL + WIDTH), (80 * WIDTH, PANEL)]
    kernel_sizes, sizes = ((1, 1), (3, 3), (7, 2)), ((1, 1), (2, 3), (13, 9))
    geometries = [
        Geometry(
            2,
            count,
            (height, width),
            out_channels,
            (height + 2 * (rows // 2) - rows + 1, width + 2 * (columns // 2) - columns + 1),
            (rows, columns),
            (1, 1),
            (rows // 2, columns // 2),
            (1, 1),
        )
        for (count, out_channels), (rows, columns), (height, width) in product(
            both, kernel_sizes, sizes
        )
    ]
    # Halves of pixels, channels and outputs; and groups, down to one channel each, by strides.
    wide = replace(geometries[0], images=1, channels=2 * WIDTH, out_channels=2 * PANEL)
    for height, width in (*sizes, (7, 9)):
        geometries.append(replace(wide, size=(height, width), out_size=(height, width)))
    for share, (height, width), stride in product(shares(), sizes, (1, 2)):
        out = (height - 1) // stride + 1, (width - 1) // stride + 1
        geometry = Geometry(
            *(2, 2 * PANEL, (height, width), 2 * PANEL, out),
            *((3, 3), (stride, stride), (1, 1), (1, 1), 2 * PANEL // share),
        )
        five = 5 * WIDTH  # more than are copied together, and not so many times more
        geometries.append(geometry)
        if five % share == 0:
            groups = five // share
            geometries.append(replace(geometry, channels=five, out_channels=five, groups=groups))
    # Groups whose outputs and inputs begin anywhere in a vector, and as many as fill whole ones.
    for (share, out_share), size, stride in product(in_windows(), sizes, (1, 2)):
        out = (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1
        geometry = Geometry(
            *(2, WIDTH * share, size, WIDTH * out_share, out),
            *((3, 3), (stride, stride), (1, 1), (1, 1), WIDTH),
        )
        geometries.append(geometry)
    convolutions = [kind for kind, kernel in kernels.KERNELS.items() if kernel.cost]
    candidates = product(convolutions, geometries)
    return [(kind, geometry) for kind, geometry in candidates if kernels.can_run(kind, geometry)]


def in_windows() -> list[tuple[int, int]]:
    """Inputs and outputs of a group that do not lie side by side in a vector."""
    return [(3, 3), (1, 2), (4, 1), (3 * WIDTH // 2, 3 * WIDTH // 2)]


def shares() -> list[int]:
    """Channels of a group that some vectors hold several of, one, or a part of."""
    return [share for share in (1, 2, 4, 8, 16, 32) if PANEL % share == 0]


@pytest.mark.parametrize(("kind", "geometry"), cases())
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_convolution_stays_in_bounds(
    kind: Kind, geometry: Geometry, threads: int, check_guards: Callable[[], None]
) -> None:
    channels, out_channels, kernel = geometry.channels, geometry.out_channels, geometry.kernel
    groups = geometry.groups
    share = channels // groups
    weight = torch.randn(2, out_channels, share, *kernel) / (share * kernel[0] * kernel[1]) ** 0.5
    placed = vector_layout.weight_in_vectors(weight, kind, groups) if groups > 1 else weight
    packed = inside_guards(kernels.pack(placed, kind).float()).to(
        torch.bfloat16 if kind == Kind.DIRECT_BF16 else torch.float32
    )
    step = Step(kind, geometry, 0, 9, 1, packed, inside_guards(torch.zeros(2, out_channels)))
    x, other = (
        torch.randn(2, geometry.images, channels, *geometry.size),
        torch.randn(2, geometry.images, out_channels, *geometry.out_size),
    )
    found = run_between_guards([step], [x, other], threads, check_guards)
    options: Any = geometry.stride, geometry.padding, geometry.dilation, groups
    expected = torch.stack(
        [
            torch.nn.functional.conv2d(batch, filters, None, *options)
            for batch, filters in zip(x, weight, strict=True)
        ]
    )
    limit = 1e-4 if kind != Kind.DIRECT_BF16 else 3e-2
    assert float((found - expected - other).abs().max() / expected.abs().max()) < limit
    if kernels.KERNELS[kind].fuses_activations:
        active = replace(step, activation=Activation.HARDSWISH)
        again = run_between_guards([active], [x, other], threads, check_guards)
        torch.testing.assert_close(again, FUNCTIONS[active.activation](found), rtol=1e-5, atol=1e-5)


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: torch.relu,
    Activation.RELU6: torch.nn.functional.relu6,
    Activation.SIGMOID: torch.sigmoid,
    Activation.SILU: torch.nn.functional.silu,
    Activation.HARDSIGMOID: torch.nn.functional.hardsigmoid,
    Activation.HARDSWISH: torch.nn.functional.hardswish,
    Activation.LEAKY_RELU: lambda x: torch.nn.functional.leaky_relu(x, 0.25),
    Activation.TANH: torch.tanh,
    Activation.GELU: torch.nn.functional.gelu,
    Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def like(channels: int, size: tuple[int, int], images: int = 2) -> Geometry:
    one = (1, 1)
    filled = -(-channels // PANEL) * PANEL
    return Geometry(images, filled, size, filled, size, one, one, (0, 0), one)


def run_between_guards(
    steps: list[Step],
    inputs: list[Tensor],
    threads: int,
    check: Callable[[], None],
    cache: CacheSizes | None = None,
) -> Tensor:
    """The value 9 of a program on the values 0, 1, ..."""
    run = program.Program(
        steps,
        inputs=list(range(len(inputs))),
        outputs=[9],
        num_models=2,
        threads=threads,
        dtype=torch.float32,
        cache=cache,
    )
    (found,) = run(*inputs)
    check()
    return found


CHANNELS = (1, WIDTH - 1, WIDTH, PANEL, 2 * PANEL + 3)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (13, 9)])
@pytest.mark.parametrize("threads", [1, 3])
def test_elementwise_steps_stay_in_bounds(
    channels: int, size: tuple[int, int], threads: int, check_guards: Callable[[], None]
) -> None:
    geometry = like(channels, size)
    x, other = torch.randn(2, 2, 2, channels, *size)
    real: dict[str, Any] = {"channels": channels, "out_channels": channels}
    for function, exact in FUNCTIONS.items():
        values = 4 * x
        values[0, 0, 0, 0, 0], values[1, 1, -1, -1, -1] = 200, -200
        step = Step(Kind.ACTIVATION, geometry, 0, 9, activation=function, scalar=0.25, **real)
        found = run_between_guards([step], [values], threads, check_guards)
        expected = exact(values.double()).float()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        values[0, 0, 0, 0, 0] = torch.nan
        found = run_between_guards([step], [values], threads, check_guards)
        assert int(found.isnan().sum()) == 1
    step = Step(Kind.SUM, geometry, 0, 9, 1, relu=True, **real)
    found = run_between_guards([step], [x, other], threads, check_guards)
    torch.testing.assert_close(found, (x + other).relu())
    factors = torch.randn(2, 2, channels, 1, 1)
    step = Step(Kind.SCALE, geometry, 0, 9, 1, **real)
    found = run_between_guards([step], [x, factors], threads, check_guards)
    torch.testing.assert_close(found, x * factors)
    scale, shift = torch.randn(2, 2, channels)
    per_channel = (2, 1, channels, 1, 1)
    for groups in {1, channels}:
        step = group_norm_step(x, scale, shift, groups, 1e-2)
        found = run_between_guards([replace(step, x=0, out=9)], [x], threads, check_guards)
        plain = torch.nn.functional.group_norm(x.flatten(0, 1), groups, eps=1e-2).view(x.shape)
        expected = plain * scale.view(per_channel) + shift.view(per_channel)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    step = layer_norm_step(x, scale, shift, 1e-2)
    found = run_between_guards([replace(step, x=0, out=9)], [x], threads, check_guards)
    plain = torch.nn.functional.layer_norm(x.movedim(2, -1), [channels], eps=1e-2).movedim(-1, 2)
    expected = plain * scale.view(per_channel) + shift.view(per_channel)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for taps in (1, 5, 2 * WIDTH + 1):
        weight, offset = torch.randn(2, taps), torch.randn(2, 1)
        step = channel_conv_step(x, weight, offset)
        found = run_between_guards([replace(step, x=0, out=9)], [x], threads, check_guards)
        expected = torch.vmap(channel_conv)(x.double(), weight.double(), offset.double())
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    step = affine_step(x, scale, shift)
    found = run_between_guards([replace(step, x=0, out=9)], [x], threads, check_guards)
    torch.testing.assert_close(found, x * scale.view(per_channel) + shift.view(per_channel))


@pytest.mark.parametrize("counts", [(1, 1), (PANEL, 3), (3, WIDTH, 2), (WIDTH + 1, PANEL - 1, 5)])
@pytest.mark.parametrize("threads", [1, 3])
def test_concatenations_stay_in_bounds(
    counts: tuple[int, ...], threads: int, check_guards: Callable[[], None]
) -> None:
    total, first, copies = sum(counts), 0, []
    for index, count in enumerate(counts):
        geometry = replace(like(count, (3, 5)), out_channels=like(total, (3, 5)).channels)
        options: dict[str, Any] = {"option": first, "channels": count, "out_channels": total}
        copies.append(Step(Kind.COPY, geometry, index, 8, **options))
        first += count
    # What fills up the last panel must be nothing: the next step reads it as well.
    real: dict[str, Any] = {"channels": total, "out_channels": total}
    read = Step(Kind.ACTIVATION, like(total, (3, 5)), 8, 9, activation=Activation.RELU, **real)
    inputs = [torch.randn(2, 2, count, 3, 5) for count in counts]
    found = run_between_guards([*copies, read], inputs, threads, check_guards)
    torch.testing.assert_close(found, torch.cat(inputs, 2).relu())


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(4, 5), (13, 9)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [([2, 2], [2, 2], [0, 0]), ([3, 3], [1, 1], [1, 1]), ([3, 2], [2, 3], [1, 0])],
)
def test_pooling_stays_in_bounds(
    channels: int,
    size: tuple[int, int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    check_guards: Callable[[], None],
) -> None:
    x = torch.randn(2, 2, channels, *size)
    options = kernel, stride, padding
    for zeros, ceil in product((False, True), repeat=2):
        step = replace(average_pool2d_step(x, *options, ceil, zeros), x=0, out=9)
        found = run_between_guards([step], [x], 3, check_guards)
        expected = torch.nn.functional.avg_pool2d(x.flatten(0, 1), *options, ceil, zeros)
        torch.testing.assert_close(found, expected.unflatten(0, (2, 2)))
    for ceil in (False, True):
        step = replace(max_pool2d_step(x, *options, ceil), x=0, out=9)
        found = run_between_guards([step], [x], 3, check_guards)
        expected = torch.nn.functional.max_pool2d(x.flatten(0, 1), *options, ceil_mode=ceil)
        torch.testing.assert_close(found, expected.unflatten(0, (2, 2)), rtol=0, atol=0)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_gathers_stay_in_bounds(
    channels: int, threads: int, check_guards: Callable[[], None]
) -> None:
    x, every = torch.randn(2, 2, channels, 4, 5), list(range(channels))
    rows, columns = [3, -1, 0, 1, 1], [4, 0, -1]
    for taken in (every, every[::-1], [-1, *every, -1], every[channels // 2 :], [*every, *every]):
        for where in ((rows, columns), (list(range(4)), list(range(5)))):
            step = replace(gather_step(x, *where, taken), x=0, out=9)
            found = run_between_guards([step], [x], threads, check_guards)
            expected = plain_gather(x, *where, taken)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("block", [[1, 1], [2, 2], [3, 1]])
@pytest.mark.parametrize("threads", [1, 3])
def test_pixel_shuffles_stay_in_bounds(
    channels: int, block: list[int], threads: int, check_guards: Callable[[], None]
) -> None:
    x = torch.randn(2, 2, channels * block[0] * block[1], 4, 5)
    for first, cut in (([0, 0], 0), ([1, 2], 0), ([1, 0], block[0] - 1)):
        size = [(4 - first[0]) * block[0] - cut, (5 - first[1]) * block[1]]
        step = replace(pixel_shuffle_step(x, block, first, size), x=0, out=9)
        found = run_between_guards([step], [x], threads, check_guards)
        torch.testing.assert_close(found, by_loops(x, block, first, size), rtol=0, atol=0)


def by_loops(x: Tensor, block: list[int], first: list[int], size: list[int]) -> Tensor:
    """A pixel shuffle, pixel by pixel."""
    channels = x.shape[2] // (block[0] * block[1])
    result = x.new_empty(*x.shape[:2], channels, *size)
    for row, column in product(range(size[0]), range(size[1])):
        part = row % block[0] * block[1] + column % block[1]
        source = x[..., first[0] + row // block[0], first[1] + column // block[1]]
        result[..., row, column] = source[:, :, part * channels : (part + 1) * channels]
    return result


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(1, 1), (4, 5)])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_bilinear_interpolation_stays_in_bounds(
    channels: int,
    size: tuple[int, int],
    align_corners: bool,
    threads: int,
    check_guards: Callable[[], None],
) -> None:
    x, wanted = torch.randn(2, 2, channels, *size), (7, 3)
    places = [
        coordinates(*lengths, align_corners, None) for lengths in zip(size, wanted, strict=True)
    ]
    step = replace(resample_step(x, *places), x=0, out=9)
    found = run_between_guards([step], [x], threads, check_guards)
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": align_corners}
    expected = torch.nn.functional.interpolate(x.flatten(0, 1), wanted, **options)
    torch.testing.assert_close(found, expected.unflatten(0, (2, 2)), rtol=1e-5, atol=1e-6)


def test_memory_planning_keeps_live_values_apart(check_guards: Callable[[], None]) -> None:
    """Three convolutions, of which the last adds the first's result, pooling, a linear layer."""
    plain = Geometry(1, PANEL, (9, 7), PANEL, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1))
    pooled = Geometry(1, PANEL, (9, 7), PANEL, (5, 4), (3, 3), (2, 2), (1, 1), (1, 1))
    top = Geometry(1, PANEL, (5, 4), PANEL, (1, 1), (5, 4), (1, 1), (0, 0), (1, 1))
    weights = torch.randn(3, 2, PANEL, PANEL, 3, 3) / PANEL
    last, bias = torch.randn(2, PANEL, PANEL, 5, 4) / PANEL, torch.zeros(2, PANEL)
    kinds = (Kind.DIRECT, Kind.WINOGRAD_4, Kind.WINOGRAD_2)
    packed = [pack_weight(w, kind) for w, kind in zip(weights, kinds, strict=True)]
    chain = [
        Step(kinds[0], plain, 0, 1, None, packed[0], bias, True),
        Step(kinds[1], plain, 1, 2, None, packed[1], bias, True),
        Step(kinds[2], plain, 2, 3, 1, packed[2], bias, True),
        Step(Kind.MAX_POOL, pooled, 3, 4),
        Step(kinds[0], top, 4, 5, None, pack_weight(last, kinds[0]), bias),
    ]
    run = program.Program(
        chain, inputs=[0], outputs=[5], num_models=2, threads=2, dtype=torch.float32
    )
    x = torch.randn(1, PANEL, 9, 7)
    (found,) = run(x)
    check_guards()
    conv2d = torch.nn.functional.conv2d
    for model in range(2):
        one = conv2d(x, weights[0, model], padding=1).relu()
        two = conv2d(one, weights[1, model], padding=1).relu()
        three = (conv2d(two, weights[2, model], padding=1) + one).relu()
        pooled_three = torch.nn.functional.max_pool2d(three, 3, 2, 1)
        torch.testing.assert_close(found[model], conv2d(pooled_three, last[model]))


@pytest.mark.slow
def test_another_process_reads_the_kernels_from_the_cache() -> None:
    """They take 15 s and more; what a function closes over must not make it another each time."""
    code = (
        "import torch\n"
        "from ensemble.compiler.codegen.simd import WIDTH\n"
        "from ensemble.compiler.operators import pooling\n"
        "from ensemble.compiler.runtime import entry_points\n"
        "x = torch.zeros(1, 1, WIDTH, 4, 4)\n"
        "pooling.stacked_max_pool2d(x, [2, 2], [2, 2], [0, 0])\n"
        "print(sum(entry_points.run.stats.cache_hits.values()))"
    )
    for _ in range(2):  # whoever comes first may compile them
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
    assert found.stdout == "1\n"


def test_the_cache_key_covers_every_source_of_generated_code() -> None:
    """Else a change to a source would run stale kernels."""
    module = sys.modules["ensemble.compiler.runtime.entry_points"]
    found, new = set[str](), {module.__name__}
    while new - found:
        name = (new - found).pop()
        found.add(name)
        source = Path(str(sys.modules[name].__file__)).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
                "ensemble.compiler"
            ):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                new |= {str(node.module), *names} & sys.modules.keys() - {"ensemble.compiler"}
    files = {Path(str(sys.modules[name].__file__)) for name in found}
    assert {"simd.py", "depthwise.py", "winograd.py"} <= {file.name for file in files}
    assert files <= set(module._FILES)


WIDTHS = {4: ("nehalem", "+sse4.2"), 8: ("haswell", "+sse4.2,+avx,+avx2,+fma")}


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="features of x86")
@pytest.mark.parametrize("width", [width for width in WIDTHS if width < WIDTH])
def test_the_kernels_work_with_narrower_vectors(width: int) -> None:
    """The tests of the kernels, in a process that is told which features to compile for."""
    name, features = WIDTHS[width]
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    environment |= {"NUMBA_OPT": "1"}  # what is compiled is the same, a quarter sooner
    code = "from ensemble.compiler.codegen import simd; print(simd.WIDTH)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert found.stdout == f"{width}\n", found.stderr
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    tests = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert tests.returncode == 0, tests.stdout[-3000:]
