"""N models as one stack: values, aliasing, and mismatches."""

import copy
import re
import types
from collections import deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ensemble.compiler.graph import batch_norm_folding
from ensemble.models import stacking
from ensemble.models.vision import torchvision
from tests.checkpoints import SMALL, trained
from tests.tiny import TinyNet, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
State = dict[str, Tensor]


def values(models: list[nn.Module]) -> list[State]:
    return [
        {name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models
    ]


def assert_values(state: State, expected: list[State]) -> None:
    """Slice n of every stacked tensor equals the tensor of model n."""
    assert state.keys() == expected[0].keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, torch.stack([tensors[name] for tensors in expected])), name


def addresses(state: State) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in state.items()}


def allocated(count: int) -> list[nn.Module]:
    """Models of `allocate` with different values."""
    models = stacking.allocate(TinyNet(), count, device=CPU)
    for model, source in zip(models, tiny_models(count), strict=True):
        model.load_state_dict(source.state_dict())
    return models


# Allocated models


@pytest.mark.parametrize("count", [1, 3])
def test_the_stack_of_allocated_models_aliases_their_memory(count: int) -> None:
    models = allocated(count)
    state = stacking.stacked_state(models)
    assert addresses(state) == addresses(models[0].state_dict())
    assert_values(state, values(models))


def test_the_stack_of_the_first_models_is_a_prefix_of_the_full_stack() -> None:
    models = allocated(4)
    expected = values(models)
    state = stacking.stacked_state(models[:2])
    assert addresses(state) == addresses(stacking.stacked_state(models))
    assert_values(state, expected[:2])


def test_allocated_models_do_not_overlap_and_predict_what_their_sources_predict() -> None:
    sources = [trained(SMALL, classes=10, seed=seed) for seed in range(3)]
    models = stacking.allocate(sources[0], 3, device=CPU)
    for model, source in zip(models, sources, strict=True):
        model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for model, source in zip(models, sources, strict=True):
        assert torch.equal(model(x), source(x))


def test_allocated_models_are_in_eval_mode_and_do_not_require_grad() -> None:
    template = TinyNet().train()
    (model,) = stacking.allocate(template, 1, device=CPU)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert template.training


def test_allocated_models_have_the_given_dtype_and_counters_keep_theirs() -> None:
    (model,) = stacking.allocate(TinyNet(), 1, device=CPU, dtype=torch.bfloat16)
    counters = {"bn.num_batches_tracked"}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name in counters else torch.bfloat16), name


# Separately created models


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_separately_created_models_are_copied_into_one_stack_and_unchanged(
    memory_format: torch.memory_format,
) -> None:
    models = [model.to(memory_format=memory_format) for model in tiny_models(3)]
    expected, before = values(models), [addresses(model.state_dict()) for model in models]
    state = stacking.stacked_state(models)
    assert_values(state, expected)
    assert [addresses(model.state_dict()) for model in models] == before
    for tensor in state.values():
        tensor.zero_()
    for model, tensors in zip(models, expected, strict=True):
        assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())


def test_a_single_model_is_stacked_without_copying() -> None:
    models = tiny_models(1)
    before, expected = addresses(models[0].state_dict()), values(models)
    state = stacking.stacked_state(models)
    assert addresses(state) == before
    assert_values(state, expected)


@pytest.mark.parametrize("order", [slice(None, None, -1), slice(None, None, 2)])
def test_allocated_models_in_another_order_are_stacked_in_that_order(order: slice) -> None:
    models = allocated(3)[order]
    expected = values(models)
    assert_values(stacking.stacked_state(models), expected)
    for model, tensors in zip(models, expected, strict=True):
        assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())


def test_models_of_two_stacks_are_copied_into_one() -> None:
    models = allocated(2) + allocated(2)
    models[3].get_parameter("fc.bias").fill_(9)
    expected = values(models)
    state = stacking.stacked_state(models)
    assert_values(state, expected)
    assert addresses(state).keys() == expected[0].keys()
    assert not set(addresses(state).values()) & {
        address for model in models for address in addresses(model.state_dict()).values()
    }


class Odd(nn.Module):
    """Tied, empty, expanded, strided and 0-dim tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("wide", torch.randn(4, 1, generator=generator).expand(4, 8))
        self.register_buffer("turned", torch.randn(3, 5, generator=generator).T)
        self.register_buffer("every_other", torch.randn(8, generator=generator)[::2])
        self.register_buffer("counter", torch.tensor(seed))
        self.register_buffer("flag", torch.tensor(seed % 2 == 0))
        self.requires_grad_(False).eval()


def test_tensors_of_unusual_layouts_are_stacked_by_value() -> None:
    models: list[nn.Module] = [Odd(seed) for seed in range(3)]
    expected = [{n: t.clone() for n, t in stacking.named_tensors(m).items()} for m in models]
    assert_values(stacking.stacked_state(models), expected)


def test_overlapping_slices_are_stacked_by_value() -> None:
    line = torch.arange(10.0)
    for step, length in [(1, 4), (3, 3), (2, 1), (0, 4)]:
        models: list[nn.Module] = []
        for index in range(3):
            model = nn.Module().eval()
            model.register_buffer("part", line[index * step : index * step + length])
            models.append(model)
        state = stacking.stacked_state(models)
        assert torch.equal(state["part"], torch.stack([m.get_buffer("part") for m in models]))


def test_a_tied_tensor_stays_tied_in_allocated_models() -> None:
    (model,) = stacking.allocate(Odd(0), 1, device=CPU)
    assert model.get_parameter("a.weight") is model.get_parameter("b.weight")
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_models_that_require_grad_can_be_stacked_and_still_do() -> None:
    models: list[nn.Module] = [TinyNet().eval() for _ in range(2)]
    expected = values(models)
    state = stacking.stacked_state(models)
    assert_values(state, expected)
    assert not any(tensor.requires_grad for tensor in state.values())
    assert all(parameter.requires_grad for model in models for parameter in model.parameters())


def test_models_can_be_stacked_under_inference_mode_and_used_outside_of_it() -> None:
    models = tiny_models(2)
    expected = values(models)
    with torch.inference_mode():
        state = stacking.stacked_state(models)
    assert_values(state, expected)
    assert not any(tensor.is_inference() for tensor in state.values())


# Errors


def with_more_channels(model: nn.Module) -> None:
    model.fc = nn.Linear(8, 6).eval()


def with_train_mode(model: nn.Module) -> None:
    model.bn.train()  # type: ignore[union-attr]


def with_another_dtype(model: nn.Module) -> None:
    model.bfloat16()


def with_another_tensor(model: nn.Module) -> None:
    model.register_buffer("extra", torch.zeros(1))


def with_another_device(model: nn.Module) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_more_channels, "expected fc.weight to be (5, 8) torch.float32 on cpu, got (6, 8) "),
        (with_train_mode, "expected eval mode, got train mode"),
        (with_another_dtype, "expected conv.weight to be (8, 3, 3, 3) torch.float32 on cpu, got"),
        (with_another_tensor, "expected the tensors of model 0, but they differ in extra"),
        (with_another_device, "torch.float32 on cpu, got (8, 3, 3, 3) torch.float32 on meta"),
    ],
)
def test_a_mismatching_model_is_named(change: Callable[[nn.Module], object], message: str) -> None:
    models = tiny_models(3)
    change(models[2])
    before = addresses(models[0].state_dict())
    with pytest.raises(ValueError, match=f"^model 2: .*{re.escape(message)}"):
        stacking.stacked_state(models)
    assert addresses(models[0].state_dict()) == before


def test_models_of_different_classes_are_rejected() -> None:
    class OtherNet(TinyNet):
        pass

    with pytest.raises(ValueError, match="model 1: expected TinyNet like model 0, got Other"):
        stacking.stacked_state([TinyNet().eval(), OtherNet().eval()])


def test_an_empty_list_of_models_is_rejected() -> None:
    with pytest.raises(ValueError, match="expected at least one model, got none"):
        stacking.stacked_state([])


# Casting, skeletons, sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_models_are_rounded_copies_in_one_stack(dtype: torch.dtype) -> None:
    models = tiny_models(3)
    expected = values(models)
    copies = stacking.cast(models, dtype)
    rounded = [
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        for tensors in expected
    ]
    state = stacking.stacked_state(copies)
    assert_values(state, rounded)
    assert addresses(state) == addresses(copies[0].state_dict())
    assert_values(stacking.stacked_state(models), expected)


def test_a_skeleton_has_no_memory_and_leaves_the_model_unchanged() -> None:
    model = trained(SMALL, classes=10, seed=0).requires_grad_(True)
    before, memory = copy.deepcopy(model.state_dict()), addresses(model.state_dict())
    found = stacking.skeleton(model)
    assert {n: (t.shape, t.dtype, t.device.type) for n, t in found.state_dict().items()} == {
        n: (t.shape, t.dtype, "meta") for n, t in before.items()
    }
    assert [type(m) for m in found.modules()] == [type(m) for m in model.modules()]
    assert addresses(model.state_dict()) == memory
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_skeleton_keeps_non_persistent_buffers() -> None:
    model = TinyNet()
    model.register_buffer("table", torch.ones(3), persistent=False)
    found = stacking.skeleton(model)
    assert stacking.named_tensors(found)["table"].is_meta
    assert "table" not in found.state_dict()


def test_weight_bytes_counts_parameters_and_buffers() -> None:
    # conv 8 * 3 * 3 * 3, batch norm 4 * 8 and an int64 counter, linear 8 * 5 + 5
    assert stacking.weight_bytes(TinyNet()) == 4 * (216 + 32 + 45) + 8


# Fake tensors


def test_stacking_on_cuda_works_under_fake_tensors() -> None:
    with FakeTensorMode():
        with torch.device("cuda"):
            models: list[nn.Module] = [
                torchvision.models.resnet18(num_classes=7).eval() for _ in range(3)
            ]
        for stacked in (models, stacking.allocate(models[0], 3, device=torch.device("cuda"))):
            state = stacking.stacked_state(stacked)
            assert state.keys() == models[0].state_dict().keys()
            for name, tensor in models[0].state_dict().items():
                found = state[name]
                assert isinstance(found, FakeTensor)
                assert (found.device.type, found.dtype) == ("cuda", tensor.dtype)
                assert found.shape == (3, *tensor.shape)


def test_models_that_differ_in_their_repr_are_rejected() -> None:
    models = tiny_models(2)
    conv = models[1].get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    conv.stride = (2, 2)
    with pytest.raises(
        ValueError, match=r"model 1: expected a module structure \(repr\) like model 0"
    ):
        stacking.stacked_state(models)


class Slots:
    """An object without `__dict__`."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


def pass_by(module: nn.Module, arguments: object) -> None:
    return None


CHANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "scale": ("expected scale to be None, got 2.0", lambda m: setattr(m, "scale", 2.0)),
    "of a part": ("expected bn.name to be", lambda m: setattr(m.bn, "name", "a")),
    "a function": ("expected act to be", lambda m: setattr(m, "act", torch.tanh)),
    "a lambda": ("expected act to be", lambda m: setattr(m, "act", lambda x: 2 * x)),
    "a list": ("expected taps to be", lambda m: setattr(m, "taps", [1, 2])),
    "a constant": ("expected table to be", lambda m: setattr(m, "table", torch.ones(2))),
    "an array": ("expected table to be", lambda m: setattr(m, "table", numpy.ones(2))),
    "a number of numpy": ("expected scale to be", lambda m: setattr(m, "scale", numpy.float32(2))),
    "a decimal": ("expected scale to be", lambda m: setattr(m, "scale", Decimal(2))),
    "a queue": ("expected taps to be", lambda m: setattr(m, "taps", deque([1, 2]))),
    "slots": ("expected taps to be", lambda m: setattr(m, "taps", Slots(2))),
    "a hook": ("conv._forward_pre_hooks", lambda m: m.conv.register_forward_pre_hook(pass_by)),
    "hidden": ("expected hidden to be", lambda m: setattr(m, "hidden", [nn.Linear(2, 2)])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "use",
    [stacking.stacked_state, partial(batch_norm_folding.folded, example=torch.randn(1, 3, 8, 8))],
)
def test_models_that_differ_in_attributes_or_hooks_are_rejected(
    change: str, use: Callable[[Sequence[nn.Module]], object]
) -> None:
    models = tiny_models(2)
    for model in models:
        vars(model).update(act=torch.relu, taps=[1], table=torch.zeros(2), hidden=[])
    message, apply = CHANGES[change]
    use(models)
    apply(models[1])
    with pytest.raises(ValueError, match=f"model 1: .*{re.escape(message)}"):
        use(models)


def test_equivalent_attributes_are_accepted() -> None:
    models = tiny_models(3)
    for model in models:
        model.act = lambda x: x + 1  # type: ignore[assignment]
        model.parts = [model.conv, model.fc]  # type: ignore[assignment]
        model.table, model.limit = torch.arange(3), float("nan")  # type: ignore[assignment]
        vars(model).update(config=types.SimpleNamespace(width=8, model=model), slots=Slots(3))
        vars(model).update(array=numpy.arange(3.0), part=Decimal("0.5"), queue=deque([model.fc]))
        model.get_submodule("bn").register_forward_pre_hook(pass_by)
    stacking.check_same_architecture(models)


def test_differently_tied_tensors_are_rejected() -> None:
    models: list[nn.Module] = []
    for source in ("a", "b"):
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"}).eval()
        model["c"].weight = model[source].weight
        models.append(model)
    with pytest.raises(
        ValueError, match="model 1: expected the tensors of model 0, but they differ"
    ):
        stacking.stacked_state(models)
