"""A fuzzer of `ensemble.build`: every quick strategy keeps its contract on odd nets, or refuses.

To run it for longer: `python -m tests.test_contract --minutes 20`. It continues after a failure and
prints the simplest case of each kind.
"""

import argparse
import contextlib
import faulthandler
import itertools
import random
import re
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ensemble
from ensemble.errors import UnavailableError
from ensemble.machine import timing
from ensemble.strategies import BEST, STRATEGIES, autotune
from tests import odd_nets
from tests.nets import Described
from tests.odd_nets import Net
from tests.programs import assert_passes

NETS, FEW = 30, 16  # of the slow test and of the quick one
HANG_S = 120  # timeout of one strategy's build and calls
TUNE_S = 0.2

QUICK = [
    name
    for name, strategy in STRATEGIES.items()
    if strategy.module not in ("peers", "cudagraph", "exported")
    and "compiled" not in name
    and name != BEST
]
MAPPED = ("vmap", "chunked_vmap", "folded_vmap")  # these may refuse at their first call
TRACED = ("lowered_vmap", "prepacked_loop", "prepacked_concurrent")
SEEING = ("loop", "vmap", "chunked_vmap", BEST)  # these may see weights that are changed in place
NO_TENSOR = "expected one tensor|expected one dense tensor|expected outputs of"
UNLIKE = "expected .* like model 0|expected .* to be|cannot be copied|differ in"

# As in `tests.test_property`, by the dtype of the output.
LIMITS = {torch.float32: (1e-4, 100), torch.float64: (1e-4, 100), torch.bfloat16: (3e-2, 5)}
USELESS = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2}
# Warnings of torch about its own speed and state.
TORCHS_OWN = (
    "was resized|batching rule|non-contiguous|support is experimental|Sparse .* tensor support"
)
# Of weights and inputs: what changes an answer by more than USELESS, a class say, is not compared.
NUDGES = {"float32": 1e-6, "float64": 1e-6, "bfloat16": 4e-3}


def _last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "negative": lambda x: -x.abs() - 0.1,
    "positive": lambda x: x.abs() + 0.1,
    "zeros": torch.zeros_like,
    "large": lambda x: x * 30,
    "nan": lambda x: x.flatten().index_fill(0, torch.tensor(0), float("nan")).reshape(x.shape),
    "inf": lambda x: x.flatten().index_fill(0, torch.tensor(1), float("inf")).reshape(x.shape),
}
# Memory layouts; those that expand repeat values as well.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": _last,
    "transposed": lambda x: x.mT.contiguous().mT,
    "reversed": lambda x: (
        x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    ),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten(), x.new_zeros(2)])[1:-2].view(
        x.shape
    ),
    "stepped": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    "one image": lambda x: x[..., :1, :, :, :].expand(x.shape),
    "one row": lambda x: x[..., :1, :].expand(x.shape),
    "one number": lambda x: x.flatten()[0].expand(x.shape),
    "conjugated": lambda x: torch._neg_view(-x),
    "subclass": lambda x: x.as_subclass(odd_nets.Image),
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "with gradient": lambda x: x.clone().requires_grad_(),
    "inference": _inference,
}
# Other shapes than the example's: what the models give for them, or an error.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "one image": lambda x: x[..., :1, :, :, :],
    "three images": lambda x: torch.cat([x, x.flip(-1), x], -4)[..., :3, :, :, :],
    "larger": lambda x: torch.nn.functional.pad(x, (0, 1)),
    "doubled": lambda x: torch.cat([x, x], -1),
    "transposed": lambda x: x.mT,
    "row": lambda x: x.flatten(-2)[..., None, :],
}
BAD: dict[str, Callable[[Tensor], Any]] = {
    "batch": lambda x: torch.cat([x] * 4, -4),
    "missing": lambda x: x[..., 0, :, :, :][0] if x.dim() == 5 else x[0],
    "extra": lambda x: x[None, None],
    "for each": lambda x: x[None].expand(7, *x.shape),
    "channels": lambda x: torch.cat([x, x], -3),
    "channels last": lambda x: x.movedim(-3, -1),
    "double": lambda x: x.to(torch.float64 if x.dtype != torch.float64 else torch.float32),
    "half": lambda x: x.half(),
    "bytes": lambda x: x.to(torch.uint8),
    "complex": lambda x: torch.complex(x.float(), x.float()),
    "meta": lambda x: x.to("meta"),
    "gradient": lambda x: x.clone().requires_grad_(),
    "part of a graph": lambda x: x.clone().requires_grad_() * 2,
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "empty": lambda x: x[..., :0],
    "list": lambda x: x.tolist(),
    "array": lambda x: x.float().numpy(),
    "none": lambda x: None,
    "number": lambda x: 1.0,
    "tuple": lambda x: (x,),
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "thread": nullcontext,  # see `_called`
    "threads": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@dataclass(frozen=True, repr=False)
class Case(Described):
    """A net and how it is run. inputs, example: keys of VALUES and LAYOUTS."""

    net: Net
    num_models: int = 2
    per_model: bool = False
    threads: int = 0  # of torch; 0: as many as there are
    example: tuple[str, str] = ("random", "contiguous")
    inputs: tuple[tuple[str, str], ...] = (("random", "contiguous"),)
    bad: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    around_build: str = "nothing"
    around_call: str = "nothing"
    stacked: bool = False  # the models' tensors are slices of one stack
    same: bool = False  # the models have the same weights
    repeated: bool = False  # the last model is the first one once more
    trained: bool = False  # their parameters require gradients
    best: bool = False


@dataclass(frozen=True)
class Input:
    """x and the models' outputs, None where they raise. limit: of the relative error."""

    name: str
    x: Tensor
    expected: Tensor | None
    limit: float


@dataclass(frozen=True)
class Prepared:
    """What every strategy is given, and what its results are compared with."""

    models: list[nn.Module]
    example: Tensor
    inputs: list[Input]
    dtype: torch.dtype | None  # of the output; None: the models raise or give no single tensor
    shape: tuple[int, ...]
    random: bool  # equal calls differ
    independent: bool  # random, and models with equal weights differ
    keeps: bool  # a call changes the models
    messages: frozenset[str]  # warnings of the models' own


def draw(rng: random.Random) -> Case:
    """A random case."""

    def image() -> tuple[str, str]:
        usual = ("random", "contiguous")
        names = (rng.choice([usual[0]] * 5 + [*VALUES]), rng.choice([usual[1]] * 5 + [*LAYOUTS]))
        return names if rng.random() < 0.7 else usual

    def rarely() -> bool:
        return rng.random() < 0.2

    around = ["nothing"] * 6 + ["threads"] * 2 + [*AROUND]
    return Case(
        net=odd_nets.draw(rng),
        num_models=rng.choice([2, 2, 1, 3, 4]),
        per_model=rng.random() < 0.5,
        threads=rng.choice([0, 0, 0, 1, 3]),
        example=image() if rarely() else ("random", "contiguous"),
        inputs=tuple(image() for _ in range(rng.choice([1, 2, 3]))),
        bad=tuple(rng.choice([*BAD]) for _ in range(rng.choice([0, 0, 1, 2]))),
        shapes=tuple(rng.choice([*SHAPES]) for _ in range(rng.choice([0, 1, 2]))),
        around_build=rng.choice(around),
        around_call=rng.choice(around),
        stacked=rarely(),
        same=rarely(),
        repeated=rarely(),
        trained=rarely(),
        best=rng.random() < 0.12,
    )


def prepare(case: Case) -> Prepared | None:
    """Models, inputs and expected outputs; None where rounding alone makes the net useless."""
    inputs = [_input(case, index, *names) for index, names in enumerate(case.inputs)]
    _, given = _input(case, 99, *case.example)
    example = _plain(given)
    models = _models(case)
    fresh = _models(case)
    before = _state(fresh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = [_eager(fresh, example) for _ in range(4)]
    keeps = _changed(before, _state(fresh)) is not None
    messages = frozenset(str(warning.message) for warning in caught)
    first = again[0]
    common = (models, given)
    if not all(isinstance(found, Tensor) for found in again):
        return Prepared(*common, [], None, (), False, False, keeps, messages)
    assert isinstance(first, Tensor)
    if not all(torch.equal(_bits(first), _bits(found)) for found in again[1:]):
        independent = case.same and all(
            not torch.equal(a, b) for f in again for i, a in enumerate(f) for b in f[:i]
        )
        sure = all(not torch.equal(a, b) for i, a in enumerate(again) for b in again[:i])
        if not sure:
            return None
        served = [
            Input(name, x, None, 0.0)
            for name, x in inputs
            if isinstance(_eager(fresh, _plain(x)), Tensor)
        ]
        return Prepared(
            *common, served, first.dtype, tuple(first.shape), True, independent, keeps, messages
        )
    if odd_nets.draws_numbers(case.net):
        return None  # a rare draw may show in the output yet
    reference = _Reference(case)
    made = []
    for name, x in inputs:
        if case.net.attends and not bool(torch.isfinite(x).all()):
            continue  # torch's own kernels of attention differ in where they have NaN
        found = _compared(case, fresh, reference, name, x)
        if found is not None:
            made.append(found)
    if not made:
        return None
    return Prepared(*common, made, first.dtype, tuple(first.shape), False, False, keeps, messages)


def _models(case: Case) -> list[nn.Module]:
    models = odd_nets.models(case.net, case.num_models, same=case.same)
    if case.repeated:
        models[-1] = models[0]
    if case.stacked and not case.repeated:
        with contextlib.suppress(RuntimeError):  # models that are not alike have no stack
            for tensors in zip(*(_tensors(model) for model in models), strict=True):
                stack = torch.stack([tensor.detach() for tensor in tensors])
                for tensor, part in zip(tensors, stack, strict=True):
                    tensor.data = part
    for model in models:
        for parameter in model.parameters():
            parameter.requires_grad_(case.trained and parameter.is_floating_point())
    return models


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _images(case: Case, seed: int) -> Tensor:
    return odd_nets.images(case.net, seed=seed, models=case.num_models if case.per_model else None)


def _input(case: Case, seed: int, values: str, layout: str) -> tuple[str, Tensor]:
    if case.net.is_bytes:
        floats = odd_nets.images(
            replace(case.net, dtype="float32"),
            seed=seed,
            models=case.num_models if case.per_model else None,
        )
        x = odd_nets.of_dtype(VALUES[values](floats), case.net)
        layout = "contiguous" if layout in ("with gradient", "conjugated") else layout
    else:
        x = VALUES[values](_images(case, seed))
    return f"{values}, {layout}", LAYOUTS[layout](x)


def _plain(x: Tensor) -> Tensor:
    return x.detach().as_subclass(Tensor).resolve_neg()


class _Reference:
    """The models' outputs in float64, and with small errors in the weights and the input.

    Nets of uint8 images compute in float32 whatever they are given; their small errors are those of
    each operation.
    """

    def __init__(self, case: Case) -> None:
        self._dtype, self._is_bytes = case.net.dtype, case.net.is_bytes
        self._exact, *self._nudged = (_models(case) for _ in range(3))
        if self._is_bytes:
            return
        for models in (self._exact, *self._nudged):
            for model in models:
                model.double()
        for seed, models in enumerate(self._nudged):
            for model in models:
                _nudge(model, NUDGES[self._dtype], seed)

    def exact(self, x: Tensor) -> Any:
        return _eager(self._exact, x if self._is_bytes else x.double())

    def nudged(self, x: Tensor) -> list[Any]:
        found = []
        for seed, models in enumerate(self._nudged):
            generator = torch.Generator().manual_seed(seed)
            if self._is_bytes:
                with _Rounding(generator):
                    found.append(_eager(models, x))
                continue
            noise = NUDGES[self._dtype] * _noise(x.double(), generator)
            found.append(_eager(models, x.double() * (1 + noise)))
        return found


class _Rounding(TorchDispatchMode):
    """Within, each operation makes a relative error of about 1e-6."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is not Tensor or func.is_view or func._schema.is_mutable:
            return result
        if not result.is_floating_point() or not result.dim():
            return result
        return result * (1 + 1e-6 * _noise(result, self._generator))


def _nudge(model: nn.Module, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in _tensors(model):
            if tensor.is_floating_point():
                tensor.mul_(1 + size * _noise(tensor, generator))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _compared(
    case: Case, models: Sequence[nn.Module], reference: _Reference, name: str, x: Tensor
) -> Input | None:
    """An input with its expected output; None where no strategy can be held to it."""
    plain = _plain(x)
    found = _eager(models, plain)
    if isinstance(found, Exception):
        return Input(name, x, None, 0.0)
    if not isinstance(found, Tensor):
        return None
    exact = reference.exact(plain)
    expected = exact if _is_alike(exact, found) else found
    nudges = reference.nudged(plain)
    found_alike = [each for each in nudges if _is_alike(each, found)]
    if len(found_alike) < len(nudges) and _is_alike(exact, found):
        return None
    assert isinstance(expected, Tensor)
    loss = relative_error(found, expected)
    change = max([relative_error(each, expected) for each in found_alike], default=0.0)
    of_dtype = torch.bfloat16 if case.net.dtype == "bfloat16" else found.dtype
    least, factor = LIMITS.get(of_dtype, (0.0, 0))
    useless = USELESS.get(of_dtype, 0.0)
    if not loss <= useless or not change <= useless:
        return None
    return Input(name, x, expected, max(least, factor * loss, 10 * change))


def _is_alike(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape


def _eager(models: Sequence[nn.Module], x: Tensor) -> Any:
    """The outputs of each model for its own copy of the input, stacked, without any code of
    `ensemble`; the exception that is raised, and a list of outputs that cannot be stacked."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    try:
        with torch.no_grad():
            outputs = [model(one.clone()) for model, one in zip(models, inputs, strict=True)]
    except Exception as error:
        return error
    if not all(map(_is_dense, outputs)):
        return outputs
    if len({(output.shape, output.dtype) for output in outputs}) != 1:
        return outputs
    return torch.stack([_plain(output).clone().resolve_conj() for output in outputs])


def _is_dense(output: object) -> bool:
    if not isinstance(output, Tensor) or output.layout != torch.strided:
        return False
    return not output.is_quantized and not output.is_nested


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.double().nan_to_num(7e77, 8e88, -8e88)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the models, relative to each model's largest number; infinite
    where shapes, NaN and infinities, or integers differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    exact = not found.is_floating_point()
    found, expected = (tensor.double().reshape(len(tensor), -1) for tensor in (found, expected))
    finite = expected.isfinite()
    if exact or not torch.equal(found.isfinite(), finite):
        return 0.0 if torch.equal(found, expected) else float("inf")
    others = (tensor.masked_fill(finite, 0).nan_to_num(7, 8, 9) for tensor in (found, expected))
    if not torch.equal(*others):
        return float("inf")
    found, expected = (tensor.masked_fill(~finite, 0) for tensor in (found, expected))
    differences, largest = (found - expected).abs().amax(1), expected.abs().amax(1)
    return float((differences.sub(1e-6).clamp_min(0) / largest.clamp_min(1e-6)).max())


State = dict[str, tuple[object, ...]]


def _state(models: Sequence[nn.Module]) -> State:
    """The whole state of models: tensors by address and value, attributes, modes, hooks."""
    state: State = {}
    for index, model in enumerate(models):
        for path, module in model.named_modules(remove_duplicate=False):
            for name, value in vars(module).items():
                entries = value.items() if isinstance(value, dict) else [("", value)]
                for key, entry in entries:
                    state[f"{index}.{path}.{name}.{key}"] = _entry(entry)
    return state


def _entry(value: object) -> tuple[object, ...]:
    if isinstance(value, Tensor):
        return value, value.data_ptr(), value.stride(), value.requires_grad, value.clone().detach()
    if isinstance(value, list):
        return value, *value
    return (value,)


def _changed(before: State, after: State) -> str | None:
    """The first that differs."""
    for name in before.keys() | after.keys():
        one, other = before.get(name, ()), after.get(name, ())
        if len(one) != len(other) or not all(map(_is_same, one, other)):
            return name
    return None


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one is not other:
        return torch.equal(_bits(one), _bits(other))
    return one is other or (isinstance(one, int | float | str | tuple) and one == other)


def _outside() -> tuple[object, ...]:
    """Settings of the process."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        nn.Module.__call__,
        faulthandler.is_enabled(),
        [each for each in warnings.filters if each[1:4] == (None, Warning, None)],
    )


def _memory(x: Tensor) -> Tensor:
    """All bytes of the memory that x lies in."""
    if not x.untyped_storage().nbytes():
        return torch.empty(0)
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()


class Refused(Exception):  # noqa: N818
    """A strategy refuses a net, by the error that is its cause."""


def run(name: str, case: Case, prepared: Prepared, counts: Counter[str]) -> str | None:
    """Build and call a strategy. Returns its reason where it refuses the net, else None.

    Raises:
        AssertionError: the contract is broken.
        Exception: whatever else a strategy raises, which breaks it as well.
    """
    before = None if prepared.keeps else _state(prepared.models)
    given = [(each.x, _memory(each.x)) for each in prepared.inputs]
    given.append((prepared.example, _memory(prepared.example)))
    outside = _outside()
    refusal = None
    try:
        _hold(name, case, prepared, counts)
    except Refused as error:
        refusal = str(error)
        assert refusal.strip(), f"{name} refuses without a word"
        assert len(refusal.splitlines()) == 1, f"{name} refuses: {refusal}"
        _check_refusal(name, case, prepared, error.__cause__)
    else:
        _check_served(name, case, prepared)
    assert _outside() == outside, f"{name} changes settings: {outside}, {_outside()}"
    for x, bytes_before in given:
        assert torch.equal(_memory(x), bytes_before), f"{name} writes over its input"
    if before is not None:
        changed = _changed(before, _state(prepared.models))
        assert changed is None, f"{name} changes a model's {changed}"
    return refusal


def _check_refusal(name: str, case: Case, prepared: Prepared, error: BaseException | None) -> None:
    where = f"{name} refuses by {type(error).__name__}: {error}"
    if prepared.dtype is None:
        found = _eager(prepared.models, _plain(prepared.example))
        if isinstance(found, list) and not any(map(_is_dense, found)):
            assert isinstance(error, ValueError), where
            assert re.search(NO_TENSOR, str(error)), where
        return
    assert name != "loop", where
    if prepared.random and name == BEST:
        assert isinstance(error, ValueError), where
    if re.search(UNLIKE, str(error)):
        return
    has_tensors = any(_tensors(model) for model in prepared.models)
    if not has_tensors and not case.per_model:
        assert name not in ("vmap", "chunked_vmap", BEST) or prepared.random, where


def _check_served(name: str, case: Case, prepared: Prepared) -> None:
    if prepared.dtype is None:
        return
    if name in TRACED:
        reading = [step for step in odd_nets.fitting(case.net) if step.table == "READING"]
        assert not reading, f"{name} traces code that reads memory: {reading}"
        assert not prepared.random, f"{name} traces a random net"
    if name == BEST:
        own = any(step.how in odd_nets.OTHER_RANDOM for step in case.net.steps)
        assert own or not prepared.random, f"{name} serves a random net"


def _hold(name: str, case: Case, prepared: Prepared, counts: Counter[str]) -> None:
    """Build; call with bad inputs and good ones; call again after the weights changed."""
    counts["builds"] += 1
    forward = _built(name, case, prepared)
    for how in case.bad:
        _check_refused(forward, how, _plain(prepared.example))
    if prepared.dtype is None:
        _check_no_tensor(name, forward, prepared)
        return
    if prepared.random:
        _check_random(name, case, forward, prepared)
        return
    results: list[tuple[Input, Tensor, Tensor]] = []
    for index, each in enumerate([*prepared.inputs, *prepared.inputs]):
        other = prepared.inputs[(index + 1) % len(prepared.inputs)]
        for one, found in _called(name, case, prepared, forward, each, other):
            _check(name, one, found, prepared)
            results.append((one, found, found.clone()))
            counts["calls compared"] += 1
    for _, found, kept in results:
        assert torch.equal(_bits(found), _bits(kept)), f"{name} writes over an earlier result"
        _write_over(name, found, prepared)
    for each in prepared.inputs:
        for one, found in _called(name, case, prepared, forward, each, each):
            _check(f"{name} after its results were written over", one, found, prepared)
    for how in () if prepared.keeps else case.shapes:
        _check_other_shape(name, forward, how, prepared)
    if not prepared.keeps:
        _check_changed_weights(name, case, forward, prepared)


def _check_other_shape(name: str, forward: Any, how: str, prepared: Prepared) -> None:
    """Another shape gives what the models give for it, twice; or an error."""
    x = SHAPES[how](_plain(prepared.example)).clone()
    expected = _eager(prepared.models, x)
    for _ in range(2):
        try:
            with torch.no_grad():
                found = forward(x)
        except UnavailableError:
            assert name != "loop", f"loop is unavailable for another shape ({how})"
            return
        except Exception:
            assert not isinstance(expected, Tensor), f"{name} fails for another shape ({how})"
            return
        what = f"{name}, another shape ({how}) {tuple(x.shape)}"
        assert isinstance(expected, Tensor), f"{what}: the models fail, it does not"
        assert found.shape == expected.shape, f"{what} gives {tuple(found.shape)}"
        off = relative_error(found, expected)
        limit = max(each.limit for each in prepared.inputs)
        assert off <= max(limit, 1e-3), f"{what} is off by {off:.1e}"


def _built(name: str, case: Case, prepared: Prepared) -> Any:
    def build() -> Any:
        with AROUND[case.around_build]():
            return ensemble.build(
                name,
                prepared.models,
                prepared.example,
                max_batch=max(3, prepared.example.shape[-4]),
                tune_seconds=TUNE_S,
            )

    try:
        return _in_thread(build) if case.around_build in ("thread", "threads") else build()
    except (UnavailableError, ValueError) as error:
        raise Refused(str(error)) from error


def _in_thread(function: Callable[[], Any]) -> Any:
    (result,) = _at_once([function])
    return result


def _at_once(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each gives, called in a separate thread; what the first raises that does."""
    results: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}
    barrier = threading.Barrier(len(functions))

    def work(index: int, function: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            results[index] = function()
        except BaseException as error:
            errors[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors.values():
        raise error
    return [results[index] for index in range(len(functions))]


def _called(
    name: str, case: Case, prepared: Prepared, forward: Any, each: Input, other: Input
) -> list[tuple[Input, Tensor]]:
    """The result of a call for an input, none where the models raise as well. Threads: two call
    the forward at once with an input each, while a third builds another strategy."""

    def call(each: Input) -> list[tuple[Input, Tensor]]:
        try:
            with AROUND[case.around_call]():
                if each.x.requires_grad:
                    with torch.no_grad():
                        result = forward(each.x)
                else:
                    result = forward(each.x)
        except UnavailableError:
            raise
        except Exception:
            if each.expected is None and not prepared.random:
                return []
            raise
        assert isinstance(result, Tensor), f"{name} gives a {type(result).__name__}"
        return [(each, result)]

    def call_thrice(each: Input) -> list[tuple[Input, Tensor]]:
        return [pair for _ in range(3) for pair in call(each)]

    def build() -> list[tuple[Input, Tensor]]:
        another = QUICK[(QUICK.index(name) + 1) % len(QUICK)] if name in QUICK else name
        with contextlib.suppress(UnavailableError, ValueError):
            ensemble.build(another, prepared.models, prepared.example, tune_seconds=TUNE_S)
        return []

    try:
        if case.around_call == "threads" and not case.net.sets_itself:
            calls: list[Callable[[], Any]] = [
                partial(call_thrice, each),
                partial(call_thrice, other),
                build,
            ]
            return [pair for pairs in _at_once(calls) for pair in pairs]
        return _in_thread(partial(call, each)) if case.around_call == "thread" else call(each)
    except UnavailableError as error:
        if name in MAPPED:
            raise Refused(str(error)) from error
        raise


def _check(name: str, each: Input, found: Tensor, prepared: Prepared) -> None:
    what = f"{name} ({each.name})"
    assert type(found) is Tensor, f"{what} gives a {type(found).__name__}"
    assert found.device.type == "cpu", f"{what} gives a tensor on {found.device}"
    assert found.layout == torch.strided, f"{what} gives layout {found.layout}"
    assert found.dtype == prepared.dtype, f"{what} gives {found.dtype}, not {prepared.dtype}"
    assert not found.requires_grad, f"{what} gives a gradient"
    assert not found.is_inference(), f"{what} gives an inference tensor"
    assert not found.is_conj(), f"{what} gives a conjugated view"
    assert not found.is_neg(), f"{what} gives a negative view"
    if each.expected is None:
        return
    shapes = f"{tuple(found.shape)}, not {tuple(each.expected.shape)}"
    assert found.shape == each.expected.shape, f"{what} gives shape {shapes}"
    off = relative_error(found, each.expected)
    assert off <= each.limit, f"{what} is off by {off:.1e}, limit {each.limit:.1e}"


def _write_over(name: str, result: Tensor, prepared: Prepared) -> None:
    """The result belongs to the caller: it shares memory with nothing else."""
    tensors = [each.x for each in prepared.inputs] + [prepared.example]
    tensors += [tensor for model in prepared.models for tensor in _tensors(model)]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    address = result.untyped_storage().data_ptr()
    assert not address or address not in pointers, f"{name} hands out memory of another tensor"
    if result.dtype != torch.bool:
        result += 1
    result.zero_()
    if result.is_floating_point():
        result.fill_(float("nan"))
        result.requires_grad_()


def _check_no_tensor(name: str, forward: Any, prepared: Prepared) -> None:
    """The models raise, or give no single tensor: so must the forward."""
    example = _plain(prepared.example)
    try:
        found = forward(example)
    except (ValueError, UnavailableError) as error:
        raise Refused(str(error)) from error
    except Exception as error:
        if isinstance(_eager(prepared.models, example), Exception):
            return  # as the models do
        raise AssertionError(f"{name} raises {type(error).__name__}: {error}") from error
    expected = _eager(prepared.models, example)
    if isinstance(expected, Exception):
        return  # a trace may run what eager torch refuses, a write to an expanded tensor
    shown = type(expected[0]).__name__ if isinstance(expected, list) else repr(expected)[:60]
    raise AssertionError(f"{name} gives {tuple(found.shape)} of models that give {shown}")


def _check_random(name: str, case: Case, forward: Any, prepared: Prepared) -> None:
    for each in prepared.inputs:
        called = [_called(name, case, prepared, forward, each, each) for _ in range(5)]
        found = [one for pairs in called for _, one in pairs]
        for one in found:
            assert tuple(one.shape) == prepared.shape, f"{name} gives shape {tuple(one.shape)}"
            _check(name, each, one, prepared)
        if not each.name.startswith("random, contiguous"):
            continue
        first = found[0]
        differ = any(not torch.equal(first, one) for one in found[1:])
        assert differ, f"{name} draws the same numbers at each call"
        if prepared.independent and len(first) > 1:
            alike = all(torch.equal(one[0], one[1]) for one in found)
            assert not alike, f"{name} draws the same numbers for each model"


def _check_refused(forward: Any, how: str, example: Tensor) -> None:
    if not example.is_floating_point() and how in ("gradient", "part of a graph"):
        return
    bad = BAD[how](example.clone())
    if isinstance(bad, Tensor) and bad.layout == torch.strided and not bad.requires_grad:
        like = (bad.shape, bad.dtype, bad.device) == (example.shape, example.dtype, example.device)
        if like:
            return
    try:
        with torch.enable_grad():
            found = forward(bad)
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, f"x ({how}) is refused by: {message}"
        assert "expected" in message, f"x ({how}) is refused by: {message}"
        if not (isinstance(bad, Tensor) and bad.requires_grad):
            assert "got" in message, f"x ({how}) is refused by: {message}"
        return
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"x, {how}, is refused by {kind}: {error}") from error
    raise AssertionError(f"x ({how}) is not refused: {tuple(found.shape)}")


def _check_changed_weights(name: str, case: Case, forward: Any, prepared: Prepared) -> None:
    """Weights that are changed in place are seen wholly or not at all, by SEEING alone."""
    usable = [
        each for each in prepared.inputs if each.expected is not None and not each.x.requires_grad
    ]
    if not usable:
        return
    each = usable[0]
    unchanged = forward(each.x)
    tensors = {id(t): t for model in prepared.models for t in _tensors(model)}
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    kept = [tensor.detach().clone() for tensor in floating]
    try:
        with torch.no_grad():
            for tensor in floating:
                tensor.mul_(1.5).add_(0.125)
        found = forward(each.x)
        expected = _eager(prepared.models, _plain(each.x))
    finally:
        with torch.no_grad():
            for tensor, values in zip(floating, kept, strict=True):
                tensor.copy_(values)
    if torch.equal(_bits(found), _bits(unchanged)) and name != "loop":
        return
    where = f"{name} ({each.name}) after the weights were changed in place"
    assert name in SEEING, f"{where}: is off by {relative_error(found, unchanged):.1e}"
    if not _is_alike(expected, found):
        return
    assert isinstance(expected, Tensor)
    off = relative_error(found, expected)
    loose = max(each.limit, 1e-3)
    assert off <= loose, f"{where}: is off the new by {off:.1e}, the old by " + (
        f"{relative_error(found, unchanged):.1e}"
    )


@contextlib.contextmanager
def _watched(messages: frozenset[str]) -> Iterator[None]:
    """A timeout; and no warnings but the models' own."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    for warning in caught:
        message = str(warning.message)
        known = message in messages or re.search(TORCHS_OWN, message)
        assert known, f"a warning: {message.splitlines()[0]}"


def _harmless(case: Case) -> Case:
    """The case without contexts that change the outputs of the models themselves."""
    for field in ("around_build", "around_call"):
        around = getattr(case, field)
        if around not in ("float64", "bfloat16", "meta"):
            continue
        x = _images(case, 0)
        found = _eager(_models(case), x)
        models = _models(case)
        with AROUND[around]():
            inside = _eager(models, x)
        same = isinstance(found, Tensor) and isinstance(inside, Tensor)
        same = same and inside.device == found.device and inside.dtype == found.dtype
        if not same or not torch.equal(_bits(found), _bits(inside)):
            changed: Any = {field: "nothing"}
            case = replace(case, **changed)
    return case


@dataclass(frozen=True)
class Failure:
    """How a strategy breaks the contract. kind: the same for failures that look alike."""

    strategy: str
    kind: str
    shown: str


def failures(case: Case, counts: Counter[str], only: str | None = None) -> list[Failure]:
    """Run a case by every strategy that it asks for, or by one; `counts` gets what was run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = _harmless(case)
        prepared = prepare(case)
    if prepared is None:
        counts["useless"] += 1
        return []
    counts["nets"] += 1
    kind = "no tensor" if prepared.dtype is None else "random" if prepared.random else "compared"
    counts[f"nets, {kind}"] += 1
    found = []
    for name in [only] if only else [*QUICK, *([BEST] if case.best else [])]:
        try:
            with _watched(prepared.messages), _threads(case.threads):
                refusal = run(name, case, prepared, counts)
        except Exception as error:
            found.append(_failure(name, error))
            continue
        counts["refused" if refusal else "served"] += 1
        if refusal:
            counts[f"refused by {name}: {refusal[:150]}"] += 1
    return found


def _failure(name: str, error: Exception) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if "/ensemble/" in frame.filename][-1:]
    where = f" at {Path(last[0].filename).name} {last[0].name}" if last else ""
    text = re.sub(r"\([^()]*\)", "()", str(error).split("\n")[0])
    text = re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", text)[:90]
    kind = f"{name}: {type(error).__name__}: {text}{where}"
    return Failure(name, kind, "".join(traceback.format_exception(error)))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def simplest(case: Case, failure: Failure) -> tuple[Case, Failure]:
    """The smallest case found within 30 s that still fails in this way."""
    end = time.monotonic() + 30
    found = True
    while found and time.monotonic() < end:
        found = False
        for candidate in _simpler(case):
            alike = failures(candidate, Counter(), failure.strategy)
            if alike and alike[0].kind == failure.kind:
                case, failure, found = candidate, alike[0], True
                break
    return case, failure


def _simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    for field in fields(Case):
        if field.name != "net" and getattr(case, field.name) != field.default:
            changed: dict[str, Any] = {field.name: field.default}
            yield replace(case, **changed)
    for one in case.inputs[: len(case.inputs) - 1]:
        yield replace(case, inputs=(one,))
    net, steps = case.net, case.net.steps
    smaller = [replace(net, steps=steps[:i] + steps[i + 1 :]) for i in range(len(steps))]
    smaller += [replace(net, batch=batch) for batch in (1, 2) if batch < net.batch]
    smaller += [replace(net, size=(4, 4)), replace(net, channels=3)]
    smaller += [] if net.is_bytes else [replace(net, dtype="float32")]
    for each in smaller:
        if each != net:
            yield replace(case, net=each)


def _explore(seeds: Iterable[int], counts: Counter[str]) -> None:
    """Check a case for each seed; raises AssertionError with the simplest of the first failure."""
    for seed in seeds:
        found = failures(case := draw(random.Random(seed)), counts)
        if found:
            case, failure = simplest(case, found[0])
            raise AssertionError(f"seed {seed}: {case}\n{failure.shown}")


def _explore_for(minutes: float, first: int, counts: Counter[str]) -> bool:
    """Print each kind of failure once, by its simplest case. Returns whether there was any."""
    end = time.monotonic() + 60 * minutes
    kinds: Counter[str] = Counter()
    for number in itertools.count(first):
        if time.monotonic() > end:
            break
        case = draw(random.Random(number))
        print(number, case, file=sys.stderr, flush=True)
        for failure in failures(case, counts):
            kinds[failure.kind] += 1
            if kinds[failure.kind] == 1:
                simple, shown = simplest(case, failure)
                print(f"\n=== {failure.kind}\n{simple}\n{shown.shown}", flush=True)
    for what, count in kinds.most_common():
        print(f"{count} failures: {what}")
    return bool(kinds)


def test_odd_nets_are_held_to_the_contract_by_every_strategy() -> None:
    _explore(range(FEW), Counter())


@pytest.mark.slow
def test_many_odd_nets_are_held_to_the_contract_by_every_strategy() -> None:
    assert_passes("tests.test_contract")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="the long profile, for so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the long profile")
    options = parser.parse_args(argv)
    faulthandler.enable()
    timing.SETTLE_S, autotune.MIN_SECONDS, autotune.MAX_SECONDS = 0.0, 0.0, 0.0
    vars(autotune)["release"] = lambda: None
    counts: Counter[str] = Counter()
    has_failed = False
    if options.minutes is None:
        _explore(range(FEW, FEW + NETS), counts)
    else:
        has_failed = _explore_for(options.minutes, 1_000_000 * options.seed, counts)
    for what, count in counts.most_common():
        print(f"{count} {what}")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
