"""A run on a GPU, of minutes: everything that only a GPU can show, written after every step.

    python -m tests.gpu_run --out FOLDER

needs no further arguments. Each step is a process with a time limit of its own, and adds lines of
JSON to FOLDER/gpu_run.jsonl as it goes: what a step has measured survives its end. `--dry` runs the
same steps on the CPU, with tiny networks, as the test suite does. `python -m tests.studies.cuda
FOLDER` makes the page of what came back.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.bench.host_copies import from_host, pinned
from ensemble.compiler.cuda.problem import ConvProblem
from ensemble.compiler.cuda.tiles import Tile
from ensemble.machine import memory
from ensemble.machine.devices import l2_flush, synchronize
from ensemble.machine.timing import Sample, event_maker, time_call
from ensemble.statistics import median
from tests.compiler.cuda.layers import RESNET18, Operands

ROOT = Path(__file__).parents[1]
LINES = "gpu_run.jsonl"
SECONDS = 560.0  # of the whole run: a command on the machines at hand may take 600
PATIENCE = 10  # a dry run may meet a busy machine
CALLS = 30  # timed, of each forward
COUNTS = (4, 16, 32)  # of models, in step 2
STREAMS = (1, 2, 4, 8, 16)
DTYPES = ("bfloat16", "tf32", "float32")
TAIL = 6000  # characters of a command's output that are kept


@dataclass(frozen=True)
class Context:
    """Where a step runs and writes."""

    out: Path
    is_dry: bool
    deadline: float  # of time.time()

    @property
    def device(self) -> str:
        return "cpu" if self.is_dry else "cuda"

    def left(self) -> float:
        """Seconds until the step ends."""
        return self.deadline - time.time()

    def write(self, **values: Any) -> None:
        """Add a line to what comes back."""
        with (self.out / LINES).open("a") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())


# The steps


def state(context: Context) -> None:
    """The machine: driver, clocks, power, other processes, versions."""
    versions = {name: _version(name) for name in ("torch", "triton", "jax", "tensorrt", "numba")}
    context.write(step="state", python=sys.version, versions=versions, cores=os.cpu_count())
    query = (
        "name,driver_version,pstate,clocks.sm,clocks.mem,power.draw,clocks_throttle_reasons.active"
    )
    for _ in range(2):
        text = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
        context.write(step="state", nvidia_smi=text)
        time.sleep(0.0 if context.is_dry else 0.5)
    context.write(step="state", topology=_output(["nvidia-smi", "-q", "-d", "CLOCK,POWER"])[-TAIL:])


def tests(context: Context) -> None:
    """Tests that use a GPU, those of the kernels first; without what Inductor compiles: minutes."""
    kernels = "tests/compiler/cuda"
    chosen = ["-k", "1x1"] if context.is_dry else ["-m", "cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [*chosen, "--durations=5"]
    half = replace(context, deadline=time.time() + context.left() / 2)
    _command(half, "tests", "kernels", [*command, f"{kernels}/test_implicit_gemm.py"])
    if not context.is_dry:
        others = ["tests", f"--ignore={kernels}", "-k", "not compiled and not best"]
        _command(context, "tests", "others", [*command, *others])


def strategies(context: Context) -> None:
    """Wall and event time of the strategies, warm and after a flush of the L2, with copies."""
    names = ("loop", "vmap", "cudagraph_loop", "cudagraph_vmap", "lowered_vmap")
    counts = (2,) if context.is_dry else COUNTS
    for dtype in DTYPES[-1:] if context.is_dry else DTYPES:
        for num_models in counts:
            models, x = _models(context, num_models, dtype)
            for name in names:
                _time_strategy(context, "strategies", name, models, x, dtype)


def streams(context: Context) -> None:
    """The captured streams: how many are best."""
    from ensemble.strategies import concurrent

    for count in STREAMS[:1] if context.is_dry else STREAMS:
        setattr(concurrent, "MAX_STREAMS", count)  # noqa: B010
        models, x = _models(context, 2 if context.is_dry else 16, "bfloat16")
        name = "concurrent" if context.is_dry else "cudagraph_concurrent"
        _time_strategy(context, "streams", name, models, x, "bfloat16", streams=count)


def ceilings(context: Context) -> None:
    """The measured limits of the device: products, and memory."""
    from ensemble.bench.roofline import READ_BYTES, measure_limits

    for dtype in ("bfloat16", "float32"):
        device, kind = torch.device(context.device), getattr(torch, dtype)
        found = measure_limits(device, kind, read_bytes=2**20 if context.is_dry else READ_BYTES)
        context.write(step="ceilings", dtype=dtype, limits=repr(found))


def layers(context: Context) -> None:
    """Each layer of a ResNet-18 by the Triton kernel: its error, and the time of each tile."""
    from ensemble.compiler.cuda import launch, tuning
    from ensemble.compiler.cuda.tiles import candidate_tiles

    device = torch.device(context.device)
    formats = (
        ("bfloat16", "ieee"),
        ("float32", "tf32x3"),
        ("float32", "tf32"),
        ("float32", "ieee"),
    )
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    chosen = formats[-1:] if context.is_dry else formats
    names = list(RESNET18)[-1:] if context.is_dry else list(RESNET18)
    counts = (2,) if context.is_dry else (4, 32)
    # The default tile of all layers and formats first: each is compiled, and the time is short.
    for rank, (dtype, precision), name, num_models in product(range(4), chosen, names, counts):
        one = replace(RESNET18[name], dtype=dtype, precision=precision, num_models=num_models)
        problem = one.problem()
        for tile in candidate_tiles(problem, launch.limits_of(device))[rank : rank + 1]:
            about = {"dtype": dtype, "precision": precision, "num_models": num_models}
            about |= {"layer": name, "tile": list(tile.fields)}
            with _reported(context, "layers", **about):
                given = one.operands(device)
                exact, run = one.exact(given), partial(_launched, problem, given)
                error = (run(tile).double() - exact).abs().max() / exact.abs().max()
                seconds = None if context.is_dry else tuning.seconds_per_launch(run, tile)
                context.write(step="layers", **about, error=float(error), seconds=seconds)


def command(context: Context) -> None:
    """The default command, its lines stamped."""
    options = [*_tiny(), "--processes", "1"] if context.is_dry else []
    export = str(context.out / "default.json")
    _program(context, "command", "default", ["--num_models", "4", *options], export)


def max_autotune(context: Context) -> None:
    """im2col by Inductor's max-autotune with prologue fusion: an implicit GEMM for free?"""
    os.environ["TORCHINDUCTOR_PROLOGUE_FUSION"] = "1"
    from ensemble.compiler.pipeline import compile_vmapped

    dtype = "float32" if context.is_dry else "bfloat16"
    models, x = _models(context, 2 if context.is_dry else 32, dtype)
    with torch.inference_mode():
        graph = compile_vmapped(models, x, threads=1).forward
        run: Callable[[], object] = partial(graph, x)
        if not context.is_dry:  # the graph of the CPU has programs in it
            mode = "max-autotune-no-cudagraphs"
            compiled = torch.compile(graph, fullgraph=True, dynamic=False, mode=mode)
            run = _captured(partial(compiled, x))
        context.write(
            step="max_autotune", dtype=dtype, num_models=len(models), **_times(context, run)
        )


def out_of_memory(context: Context) -> None:
    """Is the text of a row that ran out of memory right?"""
    size = _tiny() if context.is_dry else ["--arch", "resnet18", "--batch_size", "1024"]
    count = "2" if context.is_dry else "32"
    quick = ["--processes", "1", "--min_pairs", "1", "--min_seconds", "0"]
    names = ["--strategies", "loop", "vmap"]
    _program(context, "out_of_memory", "rows", ["--num_models", count, *size, *quick, *names])


def peers(context: Context) -> None:
    """The other runtimes, each as a row or the reason why not."""
    size = [*_tiny(), "--processes", "1"] if context.is_dry else ["--processes", "2"]
    names = [
        "--strategies",
        "loop",
        "jax",
        "onnxruntime",
        *([] if context.is_dry else ["tensorrt"]),
    ]
    export = str(context.out / "peers.json")
    _program(context, "peers", "rows", ["--num_models", "4", *size, *names], export)


def load(context: Context) -> None:
    """Tenants under load, and one rank of torchrun."""
    size = _tiny() if context.is_dry else []
    tenants = ["--num_models", "4" if context.is_dry else "16", "--inputs", "per_model"]
    names = ["--strategies", "loop", "vmap"]
    scenario = ["--scenario", "offline", "--processes", "1"]
    _program(context, "load", "tenants", [*tenants, *size, *names, *scenario])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
    arguments = ["resnet_vmap.py", "--num_models", "4", *size, *names, *_device(context)]
    _command(context, "load", "torchrun", [*torchrun, *arguments])


def sweep(context: Context) -> None:
    """The stored grid, the most telling dtype first, until the time is over."""
    names = ["loop", "vmap", "cudagraph_loop", "cudagraph_vmap", "lowered_vmap", "best"]
    counts = ["2"] if context.is_dry else ["32", "16", "4", "1"]
    grid = ["--num_models", *counts, "--strategies", *(names[:2] if context.is_dry else names)]
    for dtype in DTYPES[-1:] if context.is_dry else DTYPES:
        minutes = max(0.2, context.left() / 60 - 0.3)
        options = ["--dtype", dtype, "--roofline", "--max_minutes", f"{minutes:.2f}"]
        export = str(context.out / f"sweep_{dtype}.json")
        size = [*_tiny(), "--processes", "1"] if context.is_dry else ["--processes", "2"]
        _program(context, "sweep", dtype, [*grid, *options, *size], export)


def cpu_cores(context: Context) -> None:
    """The CPU kernels over the cores of this machine."""
    for threads in (1,) if context.is_dry else (1, 2, 4, 8, 16):
        size = _tiny() if context.is_dry else []
        options = ["--num_models", "4", "--threads", str(threads), "--processes", "1", *size]
        names = ["--strategies", "loop", "lowered_vmap", "--device", "cpu"]
        export = str(context.out / f"cpu_{threads}.json")
        _program(context, "cpu_cores", str(threads), [*options, *names], export)


@dataclass(frozen=True)
class Step:
    """A step, and the seconds that it may take."""

    run: Callable[[Context], None]
    seconds: float


# In the order of their worth; the sweep takes what is left.
STEPS = {
    "state": Step(state, 15),
    "tests": Step(tests, 90),
    "strategies": Step(strategies, 110),
    "layers": Step(layers, 60),
    "command": Step(command, 75),
    "ceilings": Step(ceilings, 15),
    "streams": Step(streams, 30),
    "max_autotune": Step(max_autotune, 60),
    "out_of_memory": Step(out_of_memory, 30),
    "peers": Step(peers, 60),
    "load": Step(load, 60),
    "sweep": Step(sweep, 300),
    "cpu_cores": Step(cpu_cores, 60),
}


# The parts of steps


def _launched(problem: ConvProblem, given: Operands, tile: Tile) -> Tensor:
    from ensemble.compiler.cuda import launch

    return launch.conv2d(problem, tile, *given.of_launch)  # type: ignore[arg-type]


def _models(context: Context, num_models: int, dtype: str) -> tuple[list[nn.Module], Tensor]:
    """N ResNet-18 with random weights, and an image, on the device."""
    templates, image = _templates(num_models, context.is_dry)
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    device = torch.device(context.device)
    # Copies: `to` casts in place, and what was bfloat16 once is exact in TF32.
    models = [copy.deepcopy(model).to(device, kind) for model in templates]
    return models, image.to(device, kind)


@cache
def _templates(num_models: int, is_dry: bool) -> tuple[list[nn.Module], Tensor]:
    import torchvision

    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    layers, size = ([1, 1, 1, 1], 32) if is_dry else ([2, 2, 2, 2], 224)
    models = [torchvision.models.ResNet(block, layers).eval() for _ in range(num_models)]
    return models, torch.rand(1, 3, size, size)


def _time_strategy(
    context: Context,
    step: str,
    name: str,
    models: Sequence[nn.Module],
    x: Tensor,
    dtype: str,
    **more: Any,
) -> None:
    """A line for a strategy: its times, or why it has none."""
    from ensemble.machine.precision import Float32Precision, float32_precision
    from ensemble.strategies import build_unverified

    about = {"strategy": name, "num_models": len(models), "dtype": dtype, **more}
    precision = Float32Precision.TF32 if dtype == "tf32" else Float32Precision.IEEE
    with _reported(context, step, **about), float32_precision(precision):
        begin = time.perf_counter()
        built = build_unverified(name, models, x, tune_seconds=20.0)
        logits = built.forward(x)
        build_s = time.perf_counter() - begin
        with float32_precision(Float32Precision.IEEE), torch.inference_mode():
            exact = torch.stack([_double(model)(x.double())[0] for model in models])
        error = float((logits[:, 0].double() - exact).abs().max() / exact.abs().max())
        found = _times(context, partial(built.forward, x))
        if not context.is_dry:
            found |= _with_copies(built.forward, x)
        notes = [built.note, built.details, built.choice.tried if built.choice else ""]
        context.write(step=step, **about, build_s=build_s, error=error, notes=notes, **found)


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _times(context: Context, run: Callable[[], object]) -> dict[str, float | None]:
    """The median wall and event time of a call, and the event time after a flush of the L2."""
    device = torch.device(context.device)
    for _ in range(3):
        run()
    warm = _samples(run, device, 3 if context.is_dry else CALLS)
    found = {"wall_s": median([sample.seconds for sample in warm])}
    if context.is_dry:
        return found
    cold = _samples(run, device, CALLS, before=l2_flush(device))
    for name, samples in (("event_s", warm), ("cold_event_s", cold)):
        found[name] = median([one.device_seconds or 0.0 for one in samples])
    return found | {"reserved_bytes": memory.reserved_bytes(device)}


def _samples(
    run: Callable[[], object],
    device: torch.device,
    count: int,
    before: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Timed calls, each after `before`."""
    make_event, found = event_maker(device), list[Sample]()
    for _ in range(count):
        before()
        events = (make_event(), make_event()) if make_event else None
        found.append(time_call(run, synchronize=lambda: synchronize(device), events=events))
    return found


def _with_copies(forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float | None]:
    """From an image on the host to logits there, from pinned memory and not."""
    found, call = {}, from_host(forward, x.device)
    for name, image in (("pageable", x.cpu()), ("pinned", pinned(x))):
        run = partial(call, image)
        run()
        found[f"{name}_s"] = median([one.seconds for one in _samples(run, x.device, CALLS)])
    return found


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of a call."""
    from ensemble.machine import cuda_graphs

    graph, _ = cuda_graphs.capture(run, torch.device("cuda"), warmup=3)
    return graph.replay


@contextlib.contextmanager
def _reported(context: Context, step: str, **about: Any) -> Iterator[None]:
    """What fails within becomes a line."""
    try:
        yield
    except Exception as error:
        context.write(step=step, **about, error_text=f"{type(error).__name__}: {error}"[:TAIL])


def _tiny() -> list[str]:
    """Options for a test of the script."""
    return ["--image_size", "32", "--min_pairs", "2", "--min_seconds", "0"]


def _device(context: Context) -> list[str]:
    return ["--device", "cpu"] if context.is_dry else []


def _program(
    context: Context, step: str, name: str, options: Sequence[str], export: str | None = None
) -> None:
    """Run this program, and keep what it prints."""
    device = [] if "--device" in options else _device(context)
    files = ["--export_json", export] if export else []
    command = [sys.executable, "resnet_vmap.py", *options, *device, *files]
    _command(context, step, name, command)


def _command(context: Context, step: str, name: str, command: Sequence[str]) -> None:
    """Run a command until the step ends; its output, with the second of each line, is a line."""
    begin = time.time()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []
    # Interrupted, pytest and this program still say what they have found.
    with (
        process,
        _ended_at(process, context.deadline - 8, signal.SIGINT),
        _ended_at(process, context.deadline - 3),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(f"{time.time() - begin:6.1f} {line.rstrip()}")
    code = process.wait()
    context.write(
        step=step,
        name=name,
        command=" ".join(command[1:]),
        exit_code=code,
        seconds=time.time() - begin,
        output="\n".join(lines)[-TAIL:],
    )


@contextlib.contextmanager
def _ended_at(
    process: subprocess.Popen[Any], deadline: float, number: signal.Signals = signal.SIGKILL
) -> Iterator[None]:
    """Send a signal to a process and all that it started at a time of `time.time()`."""
    import threading

    def end() -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    timer = threading.Timer(max(0.1, deadline - time.time()), end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


# The run


def main() -> int:
    """Run all steps, or one of them in this process; the exit code is 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_run")))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--step", choices=STEPS, help="run one in this process")
    parser.add_argument("--deadline", type=float, help="of that step, in seconds of the epoch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        STEPS[options.step].run(Context(options.out, options.dry, options.deadline))
        return 0
    failed = [name for name in options.steps if not _run_step(name, options)]
    return 1 if failed else 0


def _run_step(name: str, options: argparse.Namespace) -> bool:
    """Run a step in a process of its own, and write how it ended."""
    begin = time.time()
    limit = STEPS[name].seconds * (PATIENCE if options.dry else 1)
    seconds = min(limit, START + options.seconds - begin)
    context = Context(options.out, options.dry, begin + seconds)
    if seconds < 5:
        context.write(step=name, status="skipped: the time of the run is over")
        return True
    command = [sys.executable, "-m", "tests.gpu_run", "--step", name, "--out", str(options.out)]
    command += ["--deadline", str(context.deadline), *["--dry"] * options.dry]
    with (options.out / "gpu_run.log").open("a") as log:
        # Without a GPU, Triton's interpreter runs the kernels.
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if options.dry else {})
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        with _ended_at(process, context.deadline):
            code = process.wait()
    is_over = time.time() >= context.deadline
    status = "ok" if not code else "out of time" if is_over else f"exit code {code}"
    context.write(step=name, status=status, seconds=time.time() - begin)
    print(f"{time.time() - START:6.1f} s  {name}: {status}", flush=True)
    return not code or is_over


START = time.time()

if __name__ == "__main__":
    sys.exit(main())
