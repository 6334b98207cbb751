"""Random nets by every strategy: equal to the float64 loop, or a clear refusal.

By hand, for as long as wanted: `python -m tests.test_property --minutes 20`.
"""

import argparse
import copy
import faulthandler
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ensemble
from ensemble.compiler.planning import row_tiling
from ensemble.errors import UnavailableError
from ensemble.strategies import BEST, STRATEGIES
from tests import nets
from tests.nets import Described, Net
from tests.programs import assert_passes

NETS = 120  # of the short profile
HANG_S = 120  # of one strategy's build and calls

# Seconds a net: these are drawn now and then, and in the long profile only.
SLOW = [
    name
    for name, strategy in STRATEGIES.items()
    if strategy.module in ("peers", "chunked", "exported", "best") or "compiled" in name
]
QUICK = [name for name in STRATEGIES if name not in SLOW]

# Of a model's largest logit. A net that is itself worse conditioned than that is allowed so many
# times what the plain loop loses in the same dtype; in 16 bits that loss is one draw of few
# roundings (torch's own vmap was once off by 3.1 times as much).
LIMITS = {torch.float32: (1e-4, 100), torch.bfloat16: (3e-2, 5)}
# The plain loop's own error that makes a net useless for comparison.
USELESS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True, repr=False)
class Case(Described):
    """A net and how it is run. `slow`: one strategy that takes seconds, beside the quick ones."""

    net: Net
    num_models: int = 2
    batch_size: int = 1
    per_model: bool = False
    dtype: str = "float32"
    threads: int = 1
    default_dtype: str = "float32"
    channels_last: bool = False
    slow: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What every strategy is given, and what it is compared with."""

    models: list[nn.Module]
    example: Tensor
    inputs: list[Tensor]
    expected: list[Tensor]
    limit: float


def cases(*, slow: bool) -> st.SearchStrategy[Case]:
    """Cases for hypothesis; `slow`: one in 20 of them with a strategy that takes seconds."""
    return st.builds(
        Case,
        net=nets.nets(),
        num_models=st.sampled_from([2, 1, 3, 5]),
        batch_size=st.integers(1, 3),
        per_model=st.booleans(),
        dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
        threads=st.sampled_from([1, 2, 4]),
        default_dtype=st.sampled_from(["float32"] * 4 + ["float64", "bfloat16"]),
        channels_last=st.sampled_from([False, False, True]),
        slow=st.sampled_from([None] * 20 + SLOW[: 20 * slow]) if slow else st.none(),
    )


def prepare(case: Case) -> Prepared | None:
    """Models, inputs and the float64 loop; None where rounding alone makes the net useless."""
    dtype = getattr(torch, case.dtype)
    models = nets.models(case.net, case.num_models, dtype)
    own_images = (case.num_models,) if case.per_model else ()
    shape = (*own_images, case.batch_size, 3, *case.net.size)
    generator = torch.Generator().manual_seed(0)
    example, *inputs = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if case.channels_last:
        inputs = [x.movedim(-3, -1).contiguous().movedim(-1, -3) for x in inputs]
    doubled = [copy.deepcopy(model).double() for model in models]
    expected = [loop(doubled, x.double()) for x in inputs]
    losses = [relative_error(loop(models, x), y) for x, y in zip(inputs, expected, strict=True)]
    loss = float(torch.tensor(losses).max())  # NaN where a model's logits are all 0
    if not loss <= USELESS[dtype]:
        return None
    least, factor = LIMITS[dtype]
    return Prepared(models, example, inputs, expected, max(least, factor * loss))


def loop(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What each model makes of its own input, without any code of `ensemble`."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    with torch.no_grad():
        return torch.stack([model(batch) for model, batch in zip(models, inputs, strict=True)])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the models, of each model's largest logit; NaN counts."""
    if found.shape != expected.shape:
        return float("nan")
    differences = (found.double() - expected).abs().flatten(1).amax(1)
    return float((differences / expected.abs().flatten(1).amax(1)).max())


def run(name: str, case: Case, prepared: Prepared) -> str | None:
    """Build and call a strategy; the reason where it refuses, None where all is right.

    Raises:
        AssertionError: it is wrong, or leaves something changed.
        Exception: whatever else it raises, which is a failure as well.
    """
    before = [_state(model) for model in prepared.models]
    given = [x.clone() for x in prepared.inputs]
    # Memory that was freed, or is used again, is overwritten by the later calls.
    calls = list(zip(prepared.inputs, prepared.expected, strict=True)) * 2
    found, refusal = list[Tensor](), None
    with _settings(case):
        outside = _outside()
        try:
            forward = ensemble.build(name, prepared.models, prepared.example)
            found = [forward(x) for x, _ in calls]
        except (UnavailableError, ValueError) as error:
            refusal = str(error)
        assert refusal is None or len(refusal.splitlines()) == 1, f"{name} refuses: {refusal}"
        assert _outside() == outside, f"{name} changes settings: {outside}, {_outside()}"
    for logits, (_, expected) in zip(found, calls, strict=refusal is None):
        off = relative_error(logits, expected)
        assert logits.dtype == prepared.example.dtype, f"{name} gives {logits.dtype}"
        assert off <= prepared.limit, f"{name} is off by {off:.1e}, limit {prepared.limit:.1e}"
    for x, original in zip(prepared.inputs, given, strict=True):
        assert torch.equal(x, original), f"{name} writes over its input"
    for model, state in zip(prepared.models, before, strict=True):
        _check_same(state, _state(model), name)
    return refusal


def _check_same(
    before: dict[str, tuple[int, Tensor]], after: dict[str, tuple[int, Tensor]], name: str
) -> None:
    assert after.keys() == before.keys(), f"{name} changes which tensors a model has"
    for key, (address, values) in before.items():
        assert torch.equal(values, after[key][1]), f"{name} changes a model's {key}"
        assert address == after[key][0], f"{name} moves a model's {key}"


def _state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {
        name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()
    }


def _outside() -> tuple[int, int, torch.dtype, bool]:
    """Settings of the process: threads here and in a new thread, dtype, gradients."""
    threads: list[int] = []
    new = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    new.start()
    new.join()
    return torch.get_num_threads(), threads[0], torch.get_default_dtype(), torch.is_grad_enabled()


@contextmanager
def _settings(case: Case) -> Iterator[None]:
    """The case's threads and default dtype, a limit to hanging, and warnings as errors."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    torch.set_num_threads(case.threads)
    torch.set_default_dtype(getattr(torch, case.default_dtype))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _warnings_of(name: str) -> Iterator[None]:
    """Warnings are errors, but for those of compilers and packages about themselves."""
    if name in SLOW:
        torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in SLOW else "error")
        warnings.filterwarnings("ignore", ".*batching rule")  # torch's own, of its vmap
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel")  # of the net itself
        yield


def check(case: Case, counts: Counter[str]) -> None:
    """Run a case by every strategy that it asks for; `counts` gets what was run and refused."""
    prepared = prepare(case)
    if prepared is None:
        counts["useless"] += 1
        return
    counts["nets"] += 1
    for name in [*QUICK, *([case.slow] if case.slow else [])]:
        with _warnings_of(name):
            refusal = run(name, case, prepared)
        counts["refused" if refusal else "pairs"] += 1
        if refusal:
            counts[f"{name} refused: {refusal[:100]}"] += 1
        assert name not in ("loop", BEST) or not refusal, f"{name} refuses: {refusal}"


def explore(
    counts: Counter[str],
    *,
    examples: int,
    seed: int | None,
    until: Callable[[], bool],
    verbose: bool,
) -> None:
    """Check so many nets; raises for the simplest that fails. Without a seed always the same."""

    @settings(
        max_examples=examples,
        derandomize=seed is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @hypothesis.given(cases(slow=seed is not None))
    def checked(case: Case) -> None:
        if until():
            return
        if verbose:
            print(case, flush=True)
        check(case, counts)

    (checked if seed is None else hypothesis.seed(seed)(checked))()


@pytest.mark.slow
def test_random_nets_equal_the_loop_by_every_strategy() -> None:
    assert_passes("tests.test_property")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="the long profile, for so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the long profile")
    options = parser.parse_args(argv)
    faulthandler.enable()
    row_tiling.CACHE = row_tiling.CacheSizes(0, 4096)  # so that small nets are row-tiled too
    counts: Counter[str] = Counter()
    if options.minutes is None:
        explore(counts, examples=NETS, seed=None, until=lambda: False, verbose=True)
    else:
        end, seed = time.monotonic() + 60 * options.minutes, options.seed
        while time.monotonic() < end:
            until = lambda: time.monotonic() > end  # noqa: E731
            explore(counts, examples=200, seed=seed, until=until, verbose=False)
            seed += 1
    for what, count in counts.most_common():
        print(f"{count} {what}")


if __name__ == "__main__":
    main()
