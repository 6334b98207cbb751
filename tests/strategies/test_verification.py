"""Models whose code refers to one of them, or is stateful: correct results or a clear error."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import ensemble
from ensemble.errors import UnavailableError
from ensemble.strategies import BEST
from tests.strategies.test_forward import QUICK, TRACED
from tests.tiny import independent

pytestmark = pytest.mark.usefixtures("one_thread")
by_every_strategy = pytest.mark.parametrize("name", [*QUICK, BEST])
OPTIONS: dict[str, Any] = {"tune_seconds": 1.0}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A convolution followed by a scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.conv(x) * self.scale
        return scaled


def patched() -> nn.Module:
    model = Base()
    own = model.forward
    model.forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    return model


class WithLambda(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head: Callable[[Tensor], Tensor] = lambda y: y * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


class WithHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, y: y * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.conv(x)
        return scaled


class Child(nn.Module):
    def __init__(self, parent: Base) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        parent = self.parent()
        assert parent is not None
        return x * parent.scale


class WithReference(Base):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.child(self.conv(x))
        return scaled


class Single(nn.Conv2d):
    """A layer whose deep copy is itself."""

    def __deepcopy__(self, memo: object) -> Single:
        return self


def uncopied() -> nn.Module:
    model = Base()
    model.conv = Single(3, 8, 3, padding=1)
    return model


def from_a_factory() -> nn.Module:
    factor = random.Random(float(torch.rand(()))).uniform(1, 2)

    class Times(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * factor

    return nn.Sequential(Base(), Times())


class Gain:
    """A hook with a `name`, like those of torch that recompute a weight."""

    name = "gain"

    def __call__(self, module: nn.Module, args: object) -> None: ...


class WithNamedHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = float(torch.rand(()))
        self.register_forward_pre_hook(Gain())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Strided(Base):
    """Valid only for channels-first images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.as_strided((2, 3, 6, 5), (192, 64, 8, 1)))


class ByOrder(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.is_contiguous() else x * 3)


class ByOrderWithin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.is_contiguous() else y * 3


class OwnParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.Parameter(x, requires_grad=False))


@functools.cache
def grid(height: int, width: int) -> Tensor:
    return torch.linspace(0, 1, height * width).view(1, 1, height, width)


class WithCache(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * grid(*x.shape[-2:])


class Late(Base):
    """Lazily initialized in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ramp is None:
            self.ramp = torch.linspace(0, 1, x.shape[-1])
        return super().forward(x) * self.ramp


class Assigning(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("assigned", torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.get_buffer("assigned") * 1
        self.assigned = mean
        return super().forward(x) - mean


class SettingParameter(Base):
    """Temporarily replaces a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.conv.weight
        self.conv.weight = nn.Parameter(before * 2, requires_grad=False)
        try:
            return super().forward(x)
        finally:
            self.conv.weight = before


class Viewing(Base):
    """Requires contiguous results."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(len(x), -1)


class KeepingFeatures(Base):
    """Feature extraction by a hook that is a closure over the model."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.conv.register_forward_hook(lambda module, args, y: self.kept.__setitem__("y", y))

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self.kept["y"] * 2


class Experts(Base):
    """One of two convolutions, depending on x, followed by batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean = torch.randn(8)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.conv if x.mean() > 0.5 else self.other
        normed: Tensor = self.norm(chosen(x))
        return normed


class Labels(Base):
    """Integer outputs, from code that refers to one model."""

    def __init__(self) -> None:
        super().__init__()
        self.head = weakref.ref(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.head()
        assert scale is not None
        return (self.conv(x) * scale).argmax(1)


def clipping() -> nn.Module:
    """A separate class per model, with a limit that few images reach."""
    limit = 3.0 + float(torch.rand(()))

    class Clip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(-limit, limit)

    return nn.Sequential(Base(), Clip())


class Conjugated(Base):
    """Complex outputs with a lazy conjugation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(super().forward(x)).conj()


class LoudAndQuiet(Base):
    """A scale per model, in a partial function."""

    def __init__(self) -> None:
        super().__init__()
        loudness = 10.0 ** float(torch.randint(0, 5, ()))
        self.loud = functools.partial(torch.mul, other=loudness)

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(super().forward(x))


class Scaled(Base):
    """Group norm of images with a large mean, which loses half of the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x + 100))


KINDS: list[Callable[[], nn.Module]] = [
    patched,
    WithLambda,
    WithHook,
    WithReference,
    uncopied,
    from_a_factory,
    WithNamedHook,
    Strided,
    ByOrder,
    ByOrderWithin,
    OwnParameter,
    WithCache,
    Late,
    Assigning,
    SettingParameter,
    Viewing,
    KeepingFeatures,
    Experts,
    Labels,
    clipping,
    Conjugated,
    LoudAndQuiet,
    Scaled,
]


def made(kind: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [kind().eval() for _ in range(count)]


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    grid.cache_clear()
    yield
    grid.cache_clear()


def served(name: str, models: list[Any], example: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The results for each input; empty if the strategy rejects the models."""
    try:
        with unchanged(models):
            forward = ensemble.build(name, models, example, **OPTIONS)
        return [forward(x) for x in inputs]
    except (ValueError, UnavailableError) as error:
        if name in ("loop", BEST) or "\n" in str(error):
            raise
        return []


@contextlib.contextmanager
def unchanged(models: list[nn.Module]) -> Iterator[None]:
    """Asserts that the models' tensors and their values are not changed within."""
    before = [{n: (t, t.clone()) for n, t in model.state_dict().items()} for model in models]
    try:
        yield
    finally:
        for model, tensors in zip(models, before, strict=True):
            for name, tensor in model.state_dict().items():
                assert tensor.data_ptr() == tensors[name][0].data_ptr() or name == "assigned"
                assert torch.equal(tensor, tensors[name][1])


@by_every_strategy
@pytest.mark.parametrize("kind", KINDS)
def test_code_that_refers_to_one_model_is_correct_or_unavailable(
    name: str, kind: Callable[[], nn.Module]
) -> None:
    models = made(kind)
    inputs = [X, X * 5 + 3, X]
    expected = [independent(models, x) for x in inputs]  # some change in the first call
    for logits, right in zip(served(name, models, X, *inputs), expected, strict=False):
        for of_model, expected_of_it in zip(logits, right, strict=True):
            largest = float(expected_of_it.abs().max())
            torch.testing.assert_close(of_model, expected_of_it, rtol=1e-4, atol=1e-5 * largest)
        assert type(logits) is Tensor


@by_every_strategy
def test_models_that_cached_a_tensor_during_a_build_can_still_be_trained(name: str) -> None:
    models = made(WithCache)
    ensemble.build(name, models, X, **OPTIONS)(X)
    grid.cache_clear()  # inference tensors, cached during the build
    models[0](X).sum().backward()
    assert next(models[0].parameters()).grad is not None


class Average(Base):
    """State in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        average = self.get_buffer("average").mul_(0.5)
        return y - average.add_(0.5 * y.mean((0, 2, 3), keepdim=True))


class Counter(Base):
    """State in an int."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Recurrent(Base):
    """State: the last result."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.last is not None:
            y = y + self.last / 2
        self.last = y
        return y


class Initialized(Base):
    """State: statistics of the first images."""

    mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.mean is None:
            self.mean = y.mean()
        return y - self.mean


class WarmingUp(Base):
    """Changes its behavior in the fifth call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (2 if self.calls > 4 else 1)


@by_every_strategy
@pytest.mark.parametrize("kind", [Average, Counter, Recurrent, Initialized, WarmingUp])
def test_stateful_models_are_run_sequentially_or_unavailable(
    name: str, kind: Callable[[], nn.Module]
) -> None:
    models = made(kind)
    copies = copy.deepcopy(models)
    if name not in ("loop", BEST):
        with (
            unchanged(models),
            pytest.raises(UnavailableError, match="does not support stateful models"),
        ):
            ensemble.build(name, models, X)
        return
    with unchanged(models):
        forward = ensemble.build(name, models, X, **OPTIONS)
    assert all(getattr(model, "calls", 0) == 0 for model in models)
    for x in (X, X + 1, X - 1):
        torch.testing.assert_close(forward(x), independent(copies, x))


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python's", "NumPy's"])
def test_draws_of_pythons_and_numpys_generators_are_detected(
    name: str, draw: Callable[[], float]
) -> None:
    models = made(lambda: Wrapping(lambda y: (y * 0 + draw()).to(torch.int8)))
    with pytest.raises(UnavailableError, match="draws random numbers at each call"):
        ensemble.build(name, models, X)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python's", "NumPy's"])
def test_vmap_does_not_share_one_python_draw_among_models(draw: Callable[[], float]) -> None:
    models = made(lambda: Wrapping(lambda y: y + draw()))
    with pytest.raises(UnavailableError, match="does not support stateful models"):
        ensemble.build("vmap", models, X)


@pytest.mark.parametrize("name", ["prepacked_loop", "prepacked_concurrent", "lowered_vmap", "vmap"])
def test_a_view_of_a_result_works_for_any_memory_format(name: str) -> None:
    models = made(Viewing)
    found = ensemble.build(name, models, X)(X)
    torch.testing.assert_close(found, independent(models, X), rtol=1e-4, atol=1e-4)


class Promoting(Base):
    """vmap stacks a 0-dim tensor to a vector, which takes part in type promotion."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.tensor(-100.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean() > -100, super().forward(x), self.get_buffer("least"))


@by_every_strategy
def test_results_have_the_dtype_of_the_models(name: str) -> None:
    models = made(Promoting)
    for found in served(name, models, X, X):
        assert found.dtype == torch.float32
    if name == "vmap":
        with pytest.raises(
            UnavailableError, match=r"returns torch\.float64, but the models return"
        ):
            ensemble.build(name, models, X)


class WithGradients(Base):
    """Computes a derivative, which is zero without autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.autograd.functional.jvp(super().forward, x, torch.ones_like(x))[1]


@by_every_strategy
@pytest.mark.filterwarnings("ignore:.*jvp")
def test_models_that_compute_gradients_are_unavailable(name: str) -> None:
    with pytest.raises(UnavailableError, match="compute gradients in their forward"):
        ensemble.build(name, made(WithGradients), X)


@by_every_strategy
def test_errors_of_strategies_are_one_line(name: str) -> None:
    """The model disables inference mode within its forward."""

    class Graded(Base):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                y = super().forward(x.clone().requires_grad_())
                return torch.autograd.grad(y.sum(), [self.conv.weight])[0].detach()[None]

    models = made(Graded)
    for model in models:
        model.requires_grad_(True)
    try:
        ensemble.build(name, models, X, **OPTIONS)
    except (ValueError, UnavailableError) as error:
        if "\n" in str(error):
            raise


def test_a_build_does_not_touch_the_global_random_state() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for name in ("vmap", "lowered_vmap", BEST):
        ensemble.build(name, made(Base), X, **OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), before)


class Doubling(Base):
    """Writes to its input without incrementing the version counter."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return super().forward(x)


class Halving(Base):
    def forward(self, x: Tensor) -> Tensor:
        values = x.numpy()
        values /= 2
        return super().forward(x)


@by_every_strategy
@pytest.mark.parametrize("kind", [Doubling, Halving])
def test_untracked_input_writes_do_not_reach_other_models_or_the_caller(
    name: str, kind: Callable[[], nn.Module]
) -> None:
    """The first input is all zeros, which the writes do not change."""
    models, zeros, x = made(kind), torch.zeros_like(X), X.clone()
    expected = torch.stack([model(X.clone()) for model in models]).detach()
    for found in served(name, models, zeros, zeros, x)[1:]:
        assert torch.equal(x, X)
        torch.testing.assert_close(found, expected)


@by_every_strategy
def test_torchscript_models_are_run_sequentially_or_unavailable(name: str) -> None:
    with pytest.warns((FutureWarning, DeprecationWarning)):
        models = [torch.jit.trace(model, X) for model in made(Base)]
    for found in served(name, models, X, X):
        torch.testing.assert_close(found, independent(models, X))


@by_every_strategy
def test_exported_models_are_run_sequentially_or_unavailable(name: str) -> None:
    """Such a module has the mode in which it was exported, and no `eval`."""
    models = [torch.export.export(model, (X,)).module() for model in made(Base)]
    for found in served(name, models, X, X):
        torch.testing.assert_close(found, independent(models, X))


@by_every_strategy
def test_parametrize_cached_is_rejected(name: str) -> None:
    def normed() -> nn.Module:
        model = Base()
        parametrizations.weight_norm(model.conv)
        return model

    models = made(normed)
    forward = ensemble.build(name, models, X, **OPTIONS)
    expected = independent(models, X)
    with parametrize.cached():
        with pytest.raises(UnavailableError, match=r"parametrize\.cached"):
            ensemble.build(name, models, X)
        with pytest.raises(UnavailableError, match=r"parametrize\.cached"):
            forward(X)
    torch.testing.assert_close(forward(X), expected, rtol=1e-4, atol=1e-4)


class Wrapping(Base):
    """Returns an output that cannot be stacked."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class Named(Tensor):
    """A subclass without behavior."""


@by_every_strategy
def test_outputs_of_a_subclass_become_ordinary_tensors(name: str) -> None:
    models = made(lambda: Wrapping(lambda y: y.as_subclass(Named)))
    for found in served(name, models, X, X):
        assert type(found) is Tensor
        torch.testing.assert_close(found, independent(models, X).as_subclass(Tensor))


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "quantized": lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8),
    "nested": lambda y: torch.nested.as_nested_tensor(y, layout=torch.jagged),
    "list": lambda y: [y],
    "none": lambda y: None,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz.*")
@by_every_strategy
@pytest.mark.parametrize("wrap", WRAPS)
def test_outputs_that_are_not_dense_tensors_are_rejected(name: str, wrap: str) -> None:
    models = made(lambda: Wrapping(WRAPS[wrap]))
    with pytest.raises(ValueError, match="expected one"):
        ensemble.build(name, models, X, **OPTIONS)(X)


class MaskedEncoder(nn.Module):
    """Tokens `(B, 1, T, 6)`, of which all-zero ones are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed = nn.Linear(6, 16)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, 0]
        padding = (tokens == 0).all(-1)
        encoded = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        logits: Tensor = self.head(encoded.mean(1))
        return logits


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("is_padded", [False, True])
@by_every_strategy
def test_attention_with_a_padding_mask_is_correct_or_unavailable(
    name: str, is_padded: bool
) -> None:
    """torch selects nested tensors by the values of the mask, and never under a function mode."""
    models = made(MaskedEncoder)
    full = torch.randn(4, 1, 7, 6)
    padded = full.clone()
    padded[0, :, 4:], padded[2, :, 2:] = 0, 0
    try:
        forward = ensemble.build(name, models, padded if is_padded else full, **OPTIONS)
    except UnavailableError:
        assert name not in ("loop", BEST)
        return
    torch.testing.assert_close(forward(padded), independent(models, padded), rtol=1e-4, atol=1e-5)


class GroupNormAct(nn.GroupNorm):
    """As timm's: a subclass of group norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def functional_group_norm() -> nn.Module:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.group_norm(x, 2)

    return Functional()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "subclass": lambda: GroupNormAct(2, 8),
    "function": functional_group_norm,
    "batch statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "InstanceNorm": lambda: nn.InstanceNorm2d(8),
}


@pytest.mark.parametrize("norm", list(NORMS))
@by_every_strategy
def test_norms_keep_their_digits_for_images_far_from_zero(name: str, norm: str) -> None:
    """Built with images around 0: torch's norms lose all digits channels-last at a mean of 1000."""
    models: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](), nn.Conv2d(8, 5, 1)).eval()
        for _ in range(2)
    ]
    try:
        forward = ensemble.build(name, models, X, **OPTIONS)
    except UnavailableError:
        assert name not in ("loop", BEST)
        return
    far = X + 1000
    torch.testing.assert_close(forward(far), independent(models, far), rtol=1e-3, atol=1e-3)


class SlowMean(Base):
    """Updates a running mean so slowly that two calls do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = (1 - 1e-4) * self.mean + 1e-4 * x.mean((0, 2, 3))[:, None, None]
        return super().forward(x - self.mean)


@by_every_strategy
def test_buffers_that_change_slowly_make_a_model_stateful(name: str) -> None:
    models = made(SlowMean)
    if name not in ("loop", BEST):
        with pytest.raises(UnavailableError, match="does not support stateful models"):
            ensemble.build(name, models, X, **OPTIONS)
        return
    assert ensemble.build(name, models, X, **OPTIONS).strategy == "loop"


class MixedPrecision(Base):
    """A bfloat16 head of a float32 body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x).mean((2, 3))
        return self.head(features.to(self.head.weight.dtype)).float()


@by_every_strategy
def test_models_in_mixed_precision_are_correct_or_unavailable(name: str) -> None:
    models = made(MixedPrecision)
    try:
        forward = ensemble.build(name, models, X, **OPTIONS)
    except UnavailableError:
        assert name not in ("loop", BEST)
        return
    torch.testing.assert_close(forward(X), independent(models, X), rtol=2e-2, atol=2e-2)
