"""The contract of built forwards, for every strategy: inputs, outputs, errors."""

import contextlib
import copy
import gc
import linecache
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import ensemble
from ensemble import strategies
from ensemble.errors import UnavailableError
from ensemble.strategies import BEST, STRATEGIES
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.contexts import execution_context
from tests.marks import some_slow
from tests.tiny import TinyNet, independent, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = [
    name
    for name, strategy in STRATEGIES.items()
    if strategy.module not in ("peers", "cudagraph", "exported")
    and "compiled" not in name
    and name != BEST
]
VMAPS = [name for name in QUICK if name.endswith("vmap") and name != "lowered_vmap"]
TRACED = ["lowered_vmap", "prepacked_loop", "prepacked_concurrent"]
by_every_strategy = pytest.mark.parametrize("name", QUICK)


class Net(nn.Module):
    """A small net whose forward is `use(self, x)`."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc, self.patches = nn.Linear(16, 5), nn.Linear(48, 5)
        self.anchors = nn.Parameter(torch.empty(5, 4))
        self.register_buffer("mean", torch.empty(1, 3, 1, 1))
        self.use = use

    def classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def nets(use: Callable[[Any, Tensor], Any], count: int = 2) -> list[nn.Module]:
    models: list[nn.Module] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model = Net(use).eval().requires_grad_(False)
        for tensor in (*model.parameters(), model.mean):
            tensor.normal_(generator=generator)  # type: ignore[operator]
        models.append(model)
    return models


def check(name: str, models: list[nn.Module], example: Tensor, *inputs: Tensor) -> None:
    """Build, and compare with separate calls of the models."""
    forward = ensemble.build(name, models, example)
    for x in inputs or (example,):
        expected = independent(models, x.clone())
        torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-4)


# Inputs

NORMALIZED = lambda self, x: self.classify((x - self.mean) / 2)  # noqa: E731


@by_every_strategy
@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "in torch.float64 on cpu"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "in torch.uint8 on cpu"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "in torch.float32 on meta"),
        (torch.zeros(2, 3, 8, 8).to_sparse(), "got layout torch.sparse_coo"),
        ([[0.0]], "got list"),
        (torch.zeros(2, 3, 8, 8, requires_grad=True), "does not require grad"),
    ],
    ids=["float64", "uint8", "meta", "sparse", "list", "gradient"],
)
def test_an_invalid_input_is_rejected_with_a_clear_error(name: str, x: Any, found: str) -> None:
    forward = ensemble.build(name, tiny_models(2), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"x: expected a .*tensor") as error:
        forward(x)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


class Image(Tensor):
    """A subclass that behaves like a tensor, as torchvision's `tv_tensors` do."""


def strided() -> dict[str, Tensor]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "expanded": x[:, :1, :1].expand(2, 3, 8, 8),
        "part": torch.randn(2, 3, 10, 12)[..., 1:9, 3:11],
        "negative view": torch.complex(x, x).conj().imag,
        "subclass": x.as_subclass(Image),
        "parameter": nn.Parameter(x, requires_grad=False),
    }


@by_every_strategy
@pytest.mark.parametrize("kind", strided())
def test_an_input_may_have_any_strides(name: str, kind: str) -> None:
    x = strided()[kind]
    before = x.clone()
    check(name, nets(NORMALIZED), torch.randn(2, 3, 8, 8), x)
    assert torch.equal(x, before)


@by_every_strategy
@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.sub_(0.5).div_(0.25),
        lambda x: x.data.mul_(2),
        lambda x: x.mul_(2) if x.sum() < 0 else x,
    ],
    ids=["always", "by data", "in one branch"],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_model_sees_the_callers_values_and_the_input_is_unchanged(
    name: str, write: Callable[[Tensor], Tensor], memory_format: torch.memory_format
) -> None:
    def use(self: Any, x: Tensor) -> Tensor:
        write(x)
        return self.classify(x)

    models, example = nets(use, 3), torch.rand(2, 3, 8, 8)
    example = example.to(memory_format=memory_format)
    given = example.clone()
    try:
        forward = ensemble.build(name, models, example)
        for x in (example, -example, example):
            expected = torch.stack([model(x.clone()) for model in models])
            for _ in range(2):
                torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-4)
    except UnavailableError:
        assert name in (*TRACED, *VMAPS)
    assert torch.equal(example, given)


# Outputs

OUTPUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "logits": lambda self, x: self.classify(x),
    "its own tensor": lambda self, x: self.anchors,
    "made of its own": lambda self, x: self.anchors * 2,
    "the input": lambda self, x: x,
    "of no tensor of its own": lambda self, x: x.mean((2, 3)),
    "constant": lambda self, x: x.new_ones(3),
    "class indices": lambda self, x: self.classify(x).argmax(1),
    "booleans": lambda self, x: self.classify(x) > 0,
    "one number": lambda self, x: self.classify(x).mean(),
    "masked": lambda self, x: self.classify(x).masked_fill(torch.arange(5) == 1, -float("inf")),
    "no class": lambda self, x: self.classify(x)[:, :0],
    "transposed": lambda self, x: self.conv(x).transpose(1, 3),
    "complex": lambda self, x: torch.fft.fft(self.classify(x)),
}


@pytest.mark.parametrize("name", [*QUICK, BEST])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("per_model", some_slow([False, True], quick=1))
def test_a_result_is_an_ordinary_tensor_that_owns_its_memory(
    name: str, output: str, per_model: bool
) -> None:
    models = nets(OUTPUTS[output])
    x = torch.randn((2, 2, 3, 8, 8) if per_model else (2, 3, 8, 8))
    forward = ensemble.build(name, models, x, tune_seconds=1.0)
    expected, before = independent(models, x), x.clone()
    found = forward(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found.is_inference()
    assert not found.requires_grad
    found.zero_()
    torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(independent(models, x), expected)
    assert torch.equal(x, before)


@by_every_strategy
def test_a_head_can_be_trained_on_results(name: str) -> None:
    found = ensemble.build(name, tiny_models(2), torch.randn(2, 3, 8, 8))(torch.randn(2, 3, 8, 8))
    head = nn.Linear(5, 2)
    head(found).sum().backward()
    assert head.weight.grad is not None


class Output(dict[str, Tensor]):
    """A dict subclass."""


@pytest.mark.parametrize("name", [*QUICK, BEST])
@pytest.mark.parametrize("kind", ["dict", "Output", "tuple", "list", "NoneType"])
def test_models_that_do_not_return_a_single_tensor_are_rejected(name: str, kind: str) -> None:
    def use(self: Any, x: Tensor) -> Any:
        y = self.classify(x)
        made = {"dict": {"out": y}, "Output": Output(out=y), "tuple": (y, x), "list": [y, y]}
        return made.get(kind)

    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=f"expected one tensor from each model, got {kind}"):
        ensemble.build(name, nets(use), x, tune_seconds=1.0)(x)


def test_models_with_different_numbers_of_classes_are_named() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.Linear(12, n)).eval() for n in (5, 5, 7)]
    x = torch.randn(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"got \(1, 5\) in .* model 0 and \(1, 7\) in .* model 2"):
        ensemble.build("loop", models, x)(x)


# Limitations of vmap and tracing


class Swish(torch.autograd.Function):
    """Old-style, without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def on_weights(self: Any, x: Tensor) -> Tensor:
    return self.classify(x) / (3 + self.mean.sum().item())


CANNOT: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "branch on the input": (
        lambda self, x: self.classify(x) if x.mean() > 0 else -3 * self.classify(x * x),
        TRACED,
    ),
    "branch on a result": (
        lambda self, x: (y := self.classify(x)) * (2 if y[0, 0] > y[0, 1] else -1),
        [*TRACED, *VMAPS],
    ),
    "item": (on_weights, ["lowered_vmap", *VMAPS]),
    "old autograd function": (lambda self, x: self.classify(Swish.apply(x + self.mean)), VMAPS),
    "writes into what is shared": (
        lambda self, x: self.classify((y := x.relu()).add_(self.mean.expand_as(x))) + y.mean(),
        VMAPS,
    ),
}


@by_every_strategy
@pytest.mark.parametrize("what", CANNOT)
def test_unsupported_models_are_unavailable_and_others_are_correct(name: str, what: str) -> None:
    use, refusing = CANNOT[what]
    models, x = nets(use, 3), torch.rand(1, 3, 8, 8)
    if name not in refusing:
        check(name, models, x, x, -x, torch.randn(1, 3, 8, 8))
        return
    with pytest.raises(UnavailableError) as error:
        ensemble.build(name, models, x)(x)
    assert "\n" not in str(error.value)
    assert "vmap: " not in str(error.value)  # the raw message of torch


@by_every_strategy
def test_random_models_draw_new_numbers_in_each_call_or_are_unavailable(name: str) -> None:
    def use(self: Any, x: Tensor) -> Tensor:
        return self.fc(functional.dropout(self.conv(x).relu().mean((2, 3)), 0.5))

    models = nets(use, 1) * 2
    x = torch.rand(1, 3, 8, 8).expand(4, 3, 8, 8)
    if name in TRACED:
        with pytest.raises(UnavailableError, match="draws random numbers at each call"):
            ensemble.build(name, models, x)
        return
    forward = ensemble.build(name, models, x)
    one, two = forward(x), forward(x)
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0, 0], one[0, 1])


def test_best_reports_that_models_are_random() -> None:
    models = nets(lambda self, x: functional.dropout(self.classify(x), 0.5))
    with pytest.raises(ValueError, match="models that are random in eval mode"):
        ensemble.build(BEST, models, torch.randn(2, 3, 8, 8), tune_seconds=1.0)


@by_every_strategy
def test_errors_of_the_models_propagate(name: str) -> None:
    def use(self: Any, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise LookupError("NaN in the image")
        return self.classify(x)

    x = torch.randn(2, 3, 8, 8)
    if name in TRACED:
        with pytest.raises(UnavailableError, match="its code asks for values"):
            ensemble.build(name, nets(use), x)
        return
    forward = ensemble.build(name, nets(use), x)
    with pytest.raises(LookupError, match="NaN in the image"):
        forward(x * float("nan"))


def test_a_missing_batching_rule_is_a_note_instead_of_a_warning() -> None:
    models = nets(lambda self, x: functional.adaptive_avg_pool2d(self.conv(x), 1).flatten(1))
    x = torch.randn(2, 3, 8, 8)
    built = ensemble.strategies.build_unverified("folded_vmap", models, x)
    for _ in range(2):  # pytest turns warnings into errors
        torch.testing.assert_close(built.forward(x), independent(models, x), rtol=1e-4, atol=1e-4)
    assert "no batching rule for aten::as_strided_: a loop over the models" in built.deferred_note()


def test_global_average_pooling_needs_no_missing_batching_rule() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)).eval() for _ in range(2)]
    built = ensemble.strategies.build_unverified("folded_vmap", models, torch.randn(2, 3, 8, 8))
    built.forward(torch.randn(2, 3, 8, 8))
    assert built.deferred_note() == ""


# Contexts of builds and calls

CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("name", [*QUICK, BEST])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("around", ["build", "call"])
def test_contexts_around_a_build_or_call_have_no_effect(
    name: str, context: str, around: str
) -> None:
    models, x, other = tiny_models(2), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    expected = independent(models, other)
    with CONTEXTS[context]() if around == "build" else contextlib.nullcontext():
        forward = ensemble.build(name, models, x, tune_seconds=1.0)
    with CONTEXTS[context]() if around == "call" else contextlib.nullcontext():
        for given in (other, other.transpose(2, 3).contiguous().transpose(2, 3)):
            found = forward(given)
            assert (found.device.type, found.dtype) == ("cpu", torch.float32)
            torch.testing.assert_close(found.clone(), expected, rtol=1e-4, atol=1e-4)


@by_every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_outputs_of_another_dtype_are_stacked_without_autocast(
    name: str, dtype: torch.dtype
) -> None:
    models, x = nets(lambda self, x: self.classify(x).to(dtype)), torch.randn(2, 3, 8, 8)
    forward = ensemble.build(name, models, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(x)
    torch.testing.assert_close(found, independent(models, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in QUICK if name not in ("loop", *VMAPS[:2])])
@pytest.mark.parametrize("num_models", [1, 2])
def test_later_weight_updates_are_not_partially_visible(name: str, num_models: int) -> None:
    def use(self: Any, x: Tensor) -> Tensor:
        y = functional.layer_norm(self.conv(x), [8, 8], self.own, self.own)
        return torch.cat([self.fc(y.mean((2, 3))), self.anchors[:2, :3] * 2], 1)

    models, x = nets(use, num_models), torch.randn(2, 3, 8, 8)
    for model in models:
        model.register_buffer("own", torch.randn(8, 8))
    forward = ensemble.build(name, models, x)
    before = forward(x)
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.mul_(3)
    assert torch.equal(forward(x), before)


@by_every_strategy
def test_global_module_hooks_are_applied(name: str) -> None:
    def hook(module: nn.Module, arguments: object, result: Any) -> Any:
        return result * 1.5 if isinstance(module, nn.BatchNorm2d) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        check(name, tiny_models(2), torch.randn(2, 3, 8, 8))
    finally:
        handle.remove()


@by_every_strategy
def test_attributes_that_cannot_be_copied_are_supported(name: str) -> None:
    models = tiny_models(2)
    for model in models:
        vars(model).update(lock=threading.Lock(), rng=torch.Generator(), held=[threading.Lock()])
    check(name, models, torch.randn(2, 3, 8, 8))


@by_every_strategy
def test_a_forward_can_be_called_by_several_threads_at_once(name: str) -> None:
    models = tiny_models(2)
    xs = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    expected = [independent(models, x) for x in xs]
    forward, wrong = ensemble.build(name, models, xs[0]), list[str]()

    def work(index: int) -> None:
        try:
            for _ in range(20):
                torch.testing.assert_close(
                    forward(xs[index]), expected[index], rtol=1e-4, atol=1e-4
                )
        except Exception as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize(("caller", "builder"), [("loop", "folded_vmap"), ("vmap", "lowered_vmap")])
def test_calls_are_correct_while_another_thread_builds(caller: str, builder: str) -> None:
    models, others, x = tiny_models(2), tiny_models(2), torch.randn(2, 3, 8, 8)
    forward, expected, wrong = ensemble.build(caller, models, x), independent(models, x), []

    def build() -> None:
        try:
            for _ in range(3):
                ensemble.build(builder, others, x)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    calls = 0
    while calls < 3 or any(thread.is_alive() for thread in threads):
        torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(independent(models, x), expected)
        calls += 1
    assert not wrong, wrong[0]
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"  # no patch remains


# Unsupported uses


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_or_pickling_a_forward_raises_with_advice(copied: Callable[[Any], Any]) -> None:
    forward = ensemble.build("loop", tiny_models(2), torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"cannot be pickled or copied.* call ensemble.build there"):
        copied(forward)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["loop", "concurrent", "lowered_vmap"])
def test_tracing_a_forward_raises(name: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    forward = ensemble.build(name, tiny_models(2), x)
    with pytest.raises(UnavailableError, match="cannot be traced, exported or compiled"):
        make_fx(forward)(x)
    with pytest.raises(UnavailableError, match="cannot be traced, exported or compiled"):
        torch.jit.trace(forward, x)


def test_the_repr_of_a_forward_names_strategy_and_example() -> None:
    forward = ensemble.build("loop", tiny_models(2), torch.randn(2, 3, 8, 8))
    assert repr(forward) == (
        "<loop forward of 2 models, x up to (2, 3, 8, 8) in torch.float32 on cpu; without tuning:"
        " ensemble.build('loop', models, example, max_batch=2)>"
    )


# Arguments of `build`


def two_inputs(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + y


class TwoInputs(TinyNet):
    forward = two_inputs  # type: ignore[assignment]


X = torch.randn(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("models", "example", "message"),
    [
        ([], X, "models: expected at least one model, got none"),
        ("a.pth", X, "models: expected modules, got 'a.pth'; use ensemble.load_models to read"),
        (["a.pth"], X, "models: expected modules, got 'a.pth'; use ensemble.load_models to read"),
        (None, X, "models: expected modules, got NoneType as model 0"),
        ([torch.relu], X, "models: expected modules, got builtin_function_or_method as model"),
        ([torch.compile(TinyNet())], X, r"was returned by torch.compile; pass the original module"),
        ([nn.Module().eval()], X, "models: expected modules with a forward, but model 0 has none"),
        (
            [TwoInputs().eval()],
            X,
            r"that takes one tensor, got forward\(x.*, y.*\).* in model 0",
        ),
        ([nn.LazyConv2d(8, 3).eval()], X, "but model 0 has lazy ones; call it once first"),
        (tiny_models(1), X.numpy(), "example: expected a tensor, got ndarray"),
        (tiny_models(1), (X,), "example: expected a tensor, got tuple"),
        (tiny_models(1), X.to_sparse(), "example: expected a dense tensor, got layout"),
        ([*tiny_models(1), TinyNet().eval().double()], X, "example: expected torch.float64 on cpu"),
    ],
)
def test_invalid_arguments_of_build_are_rejected_by_name(
    models: Any, example: Any, message: str
) -> None:
    for name in ("loop", "lowered_vmap"):
        with pytest.raises(ValueError, match=message) as error:
            ensemble.build(name, models, example)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in QUICK if name not in ("loop", *VMAPS[:2])])
def test_an_example_that_the_models_fail_with_is_rejected_at_build(name: str) -> None:
    with pytest.raises(ValueError, match="example: model 0 fails with it: RuntimeError: Given gr"):
        ensemble.build(name, tiny_models(2), torch.randn(2, 4, 8, 8))


@by_every_strategy
def test_models_without_tensors_are_supported(name: str) -> None:
    check(name, [nn.Sequential(nn.AvgPool2d(2), nn.Flatten()).eval() for _ in range(2)], X)


@pytest.mark.parametrize("name", ["lowered_vmap", "prepacked_loop"])
def test_builds_do_not_leak_graphs_or_sources(name: str) -> None:
    """torch caches the source of every graph, and graphs contain reference cycles."""

    def graphs() -> int:
        return sum(isinstance(each, fx.GraphModule) for each in gc.get_objects())

    models, x = tiny_models(2), torch.randn(2, 3, 8, 8)
    ensemble.build(name, models, x)(x)
    sources = len(fx.graph_module._loader.eval_cache), len(linecache.cache)
    gc.collect()
    gc.disable()
    try:
        before = graphs()
        forward = ensemble.build(name, models, x)
        forward(x)
        gc.collect()  # the cycles of the build
        held = graphs()
        del forward
        assert graphs() == before < held
    finally:
        gc.enable()
    assert (len(fx.graph_module._loader.eval_cache), len(linecache.cache)) == sources


class Devices:
    """In place of `torch.accelerator`'s: which device is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.entered = 0, list[int]()
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_index", self.device_index)

    @contextlib.contextmanager
    def device_index(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        self.entered.append(index)
        try:
            yield
        finally:
            self.current = before


def test_a_forward_is_built_and_called_with_its_device_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = Devices(monkeypatch)
    seen = list[int]()

    def build(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        seen.append(devices.current)

        def run(x: Tensor) -> Tensor:
            seen.append(devices.current)
            return x.new_zeros(len(models), len(x), 5)

        return BuildResult(run)

    monkeypatch.setattr(strategies.Strategy, "builder", lambda self, tune_seconds: build)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    with FakeTensorMode(), torch.device("cuda:1"):
        models = [nn.Conv2d(3, 5, 1).eval() for _ in range(2)]
        x = torch.empty(1, 3, 4, 4)
        forward = strategies.build_unverified("vmap", models, x).forward
        assert devices.current == 0
        forward(x)
    assert (seen, devices.current) == ([1, 1], 0)


def test_on_the_cpu_no_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch)
    with execution_context(torch.device("cpu")):
        pass
    assert devices.entered == []
