"""Adversarial models for the graph passes: every strategy computes what the models compute."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ensemble
from ensemble.errors import UnavailableError
from tests.marks import some_slow

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 32
REWRITING = ["vmap", "folded_loop", "prepacked_loop", "lowered_vmap"]
CASES: dict[str, type["Net"]] = {}


class Net(nn.Module):
    """Convolutions of CHANNELS to CHANNELS, norms, and more; a subclass has its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(3))
        self.bare = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.norm, self.other_norm = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.act = nn.ReLU(inplace=True)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(CHANNELS, 5)
        self.same = nn.Identity()
        self.names, self.named = list[Tensor](), dict[str, Tensor]()
        self.prepare()

    def prepare(self) -> None:
        """What a case changes about its modules."""

    def body(self, x: Tensor) -> Tensor:
        """x: `(B, CHANNELS, 8, 8)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def case(body: Callable[[Any, Tensor], Tensor]) -> None:
    """A net with this body."""
    CASES[body.__name__] = type(body.__name__, (Net,), {"body": body})


def prepared(prepare: Callable[[Any], None]) -> Callable[..., None]:
    """The same, for a net that is changed so first."""

    def decorate(body: Callable[[Any, Tensor], Tensor]) -> None:
        CASES[body.__name__] = type(body.__name__, (Net,), {"body": body, "prepare": prepare})

    return decorate


def models_of(net: type[nn.Module], count: int) -> list[nn.Module]:
    models: list[nn.Module] = []
    for seed in range(count):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weight_norm is deprecated, and still in use
            model = net().requires_grad_(False).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.bias.normal_()
        models.append(model)
    return models


def independent(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(x.clone()) for model in models])


# Sums


@case
def sum_with_a_factor(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.a(x), self.b(x), alpha=2)


@case
def sum_with_factor_one(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.a(x), self.b(x), alpha=1)


@case
def sum_with_itself(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return y + y


@case
def sum_with_a_number(self: Any, x: Tensor) -> Tensor:
    return (self.a(x) + 1).relu() + torch.add(self.b(x), 2)


@case
def sum_with_its_own_input(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x) + x


@case
def sum_with_what_a_view_reads_later(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    flat = y.flatten(1)
    return (self.b(x) + y).flatten(1) + 3 * flat


@case
def sum_with_a_part_that_is_read_later(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    parts = y.chunk(2, 1)
    return torch.cat([self.b(x) + y, parts[1]], 1)


@case
def sum_with_what_an_inplace_relu_gave_on(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    z = self.act(y)
    return (self.b(x) + y) * z


@case
def sum_with_what_is_returned_too(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return torch.cat([self.b(x) + y, y], 1)


@case
def sum_of_one_pixel_and_all(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.mean(self.b(x)) + functional.max_pool2d(self.c(x), 8)


@case
def sum_of_all_and_one_pixel(self: Any, x: Tensor) -> Tensor:
    return self.a(functional.max_pool2d(x, 8)) + self.b(x)


@case
def sum_of_a_pooled_one_pixel(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + nn.functional.max_pool2d(self.pool(self.b(x)), 4)


@case
def sum_in_another_dtype(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.b(x).double()


@case
def halves_among_floats(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    half = torch.relu((self.b(y) > 0).half())  # 0 and 1, that no rounding tells apart
    both = torch.cat([y + half, half], 1)[:, CHANNELS // 2 :][:, :CHANNELS]
    return self.c(both * half[..., :1, :1].sigmoid())


@case
def a_forward_that_keeps_what_it_forms(self: Any, x: Tensor) -> Tensor:
    self.kept = self.a(x)
    self.names.append(self.kept)
    self.named["kept"] = self.kept
    return self.kept


@prepared(lambda self: setattr(self, "ramp", None))
def a_forward_that_forms_a_constant_once(self: Any, x: Tensor) -> Tensor:
    if self.ramp is None:
        self.ramp = torch.linspace(0, 1, x.shape[-1])
    return self.a(x) * self.ramp


@prepared(lambda self: setattr(self, "pool", nn.MaxPool2d((2,), (2,))))
def pools_of_one_size_in_a_tuple(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.a(x))


@case
def sum_with_what_the_input_of_another_was(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    z = self.b(x)
    late = self.c(y)
    return late + (z + y)


@case
def sum_after_its_input_was_changed(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self.act(x)
    return y + self.b(x)


@case
def sum_after_its_input_was_changed_by_a_method(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    x.mul_(2)
    return y + self.b(x)


@case
def sum_into_what_is_read_again(self: Any, x: Tensor) -> Tensor:
    y = z = self.a(x)
    z += self.b(x)
    return y * 2


@case
def sum_with_a_shape(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + x.shape[1]


@case
def sum_into_a_tuple(self: Any, x: Tensor) -> Tensor:
    halves = self.a(x).chunk(2, 1) + self.b(x).chunk(2, 1)
    return torch.cat(halves, 1)


@case
def linear_of_two_images_side_by_side(self: Any, x: Tensor) -> Tensor:
    half = self.bare(torch.cat([x, x.flip(3)]))[:, : CHANNELS // 2]
    return self.fc(half.mean((2, 3)).reshape(x.shape[0], -1))


@case
def linear_of_an_image_in_two_parts(self: Any, x: Tensor) -> Tensor:
    parts = self.a(x).reshape(2 * x.shape[0], CHANNELS // 2, 8, 8)
    return self.fc(parts.mean((2, 3)).reshape(x.shape[0], CHANNELS))


def sum_to_nothing(self: Any) -> None:
    with torch.no_grad():
        self.a.weight -= self.a.weight.mean((2, 3), keepdim=True)


@prepared(sum_to_nothing)
def winograd_refused_for_a_weight_in_parts(self: Any, x: Tensor) -> Tensor:
    weight = torch.cat(self.a.weight.chunk(2))
    return functional.conv2d(self.bare(x).relu() + 30, weight, padding=1)[:, :, 1:-1, 1:-1]


@prepared(lambda self: self.to(memory_format=torch.channels_last))
def weights_with_channels_last(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.a(x))
    return self.b(y) * self.mean(y).sigmoid()


@case
def norm_of_each_pixel(self: Any, x: Tensor) -> Tensor:
    y = functional.layer_norm(self.a(x).permute(0, 2, 3, 1), [CHANNELS])
    return self.b(y.permute(0, 3, 1, 2)) * self.mean(y.permute(0, 3, 1, 2))


@case
def factors_and_summands_of_every_kind(self: Any, x: Tensor) -> Tensor:
    y = 3 * (self.a(x) / 2 - 1) + self.norm.bias[:, None, None]
    z = (self.b(x) * self.norm.weight.view(1, -1, 1, 1) - x) / self.norm.running_var[:, None, None]
    rows = self.c(x) * torch.linspace(0.5, 1.0, x.shape[-1])  # not of channels
    counted = ((y > 0).long() * 16777217 + 1).remainder(3)  # more than a float holds
    return y + z + rows + counted + 1 / (2 + x.square())


@case
def divided_by_nothing(self: Any, x: Tensor) -> Tensor:
    nothing = self.norm.bias[:, None, None] * 0
    return torch.sigmoid(self.a(x) / 0) + torch.sigmoid(self.c(x) / nothing) + self.b(x)


@case
def functions_with_borders_in_words(self: Any, x: Tensor) -> Tensor:
    y = functional.conv2d(x, self.a.weight, self.a.bias, padding="valid")
    return functional.conv2d(y, self.b.weight, None, 1, "same", (1, 2))


# Changes in place that nothing reads


@case
def relu_as_a_statement(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self.act(y)
    return y


@case
def method_as_a_statement(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y.clamp_(-0.1, 0.1)
    return y


# Modules with more or fewer calls, results and readers than one


@prepared(lambda self: setattr(self, "pool", nn.MaxPool2d(2, return_indices=True)))
def pool_with_indices(self: Any, x: Tensor) -> Tensor:
    values, indices = self.pool(self.a(x))
    return values + indices


@case
def pool_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.a(self.pool(self.b(x))))


@case
def linear_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.fc(torch.flatten(self.mean(self.a(x)), 1)) + self.fc(x.mean((2, 3)))


@case
def linear_after_a_changed_map(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    pooled = self.mean(y)
    y.zero_()
    return self.fc(torch.flatten(pooled, 1)) + y.mean()


@case
def pooling_read_twice(self: Any, x: Tensor) -> Tensor:
    pooled = self.mean(self.a(x))
    return self.fc(torch.flatten(pooled, 1)) + pooled.mean()


@case
def convolution_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.a(self.norm(self.a(x))) + self.b(x)


@case
def norm_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.norm(self.b(x))


@case
def nothing_called(self: Any, x: Tensor) -> Tensor:
    return x.relu()


@case
def weight_read_beside(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.a.weight.sum()


@case
def statistics_read_beside(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.norm.running_mean.sum()


@case
def bias_looked_at(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.bare(x))
    return y if self.bare.bias is None else -y


@case
def modules_looked_at(self: Any, x: Tensor) -> Tensor:
    for layer in (self.a, self.norm, self.act):
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            x = x + 1
    return x


@case
def norm_setting_read(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.norm.eps


@case
def called_by_name(self: Any, x: Tensor) -> Tensor:
    return self.act(input=self.norm(input=self.a(input=x))) + self.same(input=self.b(x))


@case
def one_image_at_a_time(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.a(x[0]), self.b(x[1]) + self.c(x[1])])


@case
def switched_dropout(self: Any, x: Tensor) -> Tensor:
    return functional.dropout(self.a(x), 0.5, training=self.training)


# Tied tensors, hooks, custom classes


def tie(self: Any) -> None:
    self.b.weight = self.a.weight


@prepared(tie)
def tied_weights(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.b(x)


def tie_to_a_module_that_is_not_called(self: Any) -> None:
    self.a.weight = self.c.weight
    self.aaa = self.c


@prepared(tie_to_a_module_that_is_not_called)
def tied_to_what_is_not_called(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x))


@prepared(lambda self: setattr(self, "again", self.norm))
def norm_with_two_names(self: Any, x: Tensor) -> Tensor:
    return self.again(self.a(x))


@prepared(lambda self: setattr(self, "again", nn.BatchNorm2d(CHANNELS, affine=False)))
def norm_without_scale(self: Any, x: Tensor) -> Tensor:
    return self.again(self.a(x))


def without_statistics(self: Any) -> None:
    self.norm = nn.BatchNorm2d(CHANNELS, track_running_stats=False)


@prepared(without_statistics)
def norm_of_the_batch(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x))


def hook_each(self: Any) -> None:
    self.a.register_forward_hook(double_result)
    self.norm.register_forward_pre_hook(double_input)
    self.act.register_forward_hook(double_result)
    self.same.register_forward_hook(double_result)
    self.pool.register_forward_hook(double_result)


def double_result(module: nn.Module, arguments: object, result: Tensor) -> Tensor:
    return 2 * result


def double_input(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * arguments[0],)


@prepared(hook_each)
def hooks(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.act(self.norm(self.a(x)) + self.same(self.b(x))))


@prepared(lambda self: self.norm.register_forward_hook(double_result))
def hook_of_a_norm(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x))


@prepared(lambda self: nn.utils.weight_norm(self.a))
def weight_norm_by_hook(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.b(x)


@prepared(lambda self: nn.utils.spectral_norm(self.a))
def spectral_norm_by_hook(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.b(x)


@prepared(lambda self: nn.utils.parametrizations.weight_norm(self.a))
def weight_norm_by_parametrization(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.b(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledPool(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@prepared(lambda self: setattr(self, "a", DoubledConv(CHANNELS, CHANNELS, 1)))
def convolution_of_its_own_class(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.b(x)


@prepared(lambda self: setattr(self, "pool", DoubledPool(2)))
def pool_of_its_own_class(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.pool(self.a(x)))


def override(self: Any) -> None:
    self.a.forward = torch.neg
    self.norm.forward = torch.neg


@prepared(override)
def forwards_of_their_own(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.a(x)) + self.norm(self.b(x))


# Tensors of the net itself


@prepared(lambda self: self.register_buffer("place", torch.randn(CHANNELS, 1, 1)))
def buffer_added(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.place


@prepared(lambda self: setattr(self, "place", nn.Parameter(torch.randn(1, CHANNELS, 8, 8))))
def parameter_added(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.place


@prepared(lambda self: setattr(self, "place", torch.arange(float(CHANNELS))[:, None, None]))
def constant_added(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.place + torch.full((1,), 2.0)


def _circular(net: Net) -> None:
    net.first = nn.Conv2d(3, CHANNELS, 3, padding=1, padding_mode="circular")


@prepared(_circular)
def circular_padding_of_a_shared_image(
    self: Any, x: Tensor
) -> Tensor:  # torch writes it into memory piece by piece
    return self.a(x)


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize(  # lowered_vmap captures the graph that prepacked_loop does
    "strategy", some_slow(["lowered_vmap", "folded_loop", "vmap", "prepacked_loop"], quick=2)
)
@pytest.mark.parametrize("name", CASES)
def test_an_adversarial_model_computes_the_same_by_every_strategy(name: str, strategy: str) -> None:
    models, (x, other) = models_of(CASES[name], 3), torch.randn(2, 2, 3, 8, 8)
    forward = ensemble.build(strategy, models, x)
    for images in (other, x, other):  # what a call leaves in memory is not what the next one needs
        expected = independent(models, images)
        atol = max(1e-4, 1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(forward(images.clone()), expected, rtol=1e-4, atol=atol)


class WritesIntoShared(Net):
    """It adds what differs by model, in place, to what all models make of a shared image."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        shared = functional.relu(x)
        shared += self.norm(x)
        return self.fc(self.mean(self.first(shared)).flatten(1))


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("strategy", [*REWRITING, "compiled_vmap", "best"])
def test_what_vmap_cannot_write_is_computed_or_refused_in_words(
    strategy: str, batch_size: int
) -> None:
    models, x = models_of(WritesIntoShared, 3), torch.randn(batch_size, 3, 8, 8)
    if strategy in ("vmap", "compiled_vmap"):
        words = "compile cannot trace|compiled_vmap cannot run|vmap cannot write"  # by torch's age
        with pytest.raises(UnavailableError, match=words):
            ensemble.build(strategy, models, x)(x)
        return
    found = ensemble.build(strategy, models, x)(x)
    torch.testing.assert_close(found, independent(models, x), rtol=1e-4, atol=1e-4)


def test_a_norm_of_its_own_class_is_not_folded() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * nn.functional.batch_norm(x, self.running_mean, self.running_var)

    class Own(Net):
        def prepare(self) -> None:
            self.norm = Doubled(CHANNELS)

        def body(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x))

    models, x = models_of(Own, 2), torch.randn(2, 3, 8, 8)
    for name in REWRITING:
        found = ensemble.build(name, models, x)(x)
        torch.testing.assert_close(found, independent(models, x), rtol=1e-4, atol=1e-4)


class Asking(Net):
    """It asks whether it was given a tensor."""

    def body(self, x: Tensor) -> Tensor:
        return self.a(x) if isinstance(x, Tensor) else self.b(x)


class Hooked(Net):
    def prepare(self) -> None:
        self.register_forward_hook(double_result)

    def body(self, x: Tensor) -> Tensor:
        return self.a(x)


class Branching(Net):
    """What it does depends on the shape of what it is given."""

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) if x.shape[-1] > 4 and len(x) == 2 else self.b(x)


@pytest.mark.parametrize("strategy", REWRITING)
@pytest.mark.parametrize("net", [Asking, Hooked, Branching])
def test_what_a_symbolic_trace_could_not_follow_is_computed(net: type[Net], strategy: str) -> None:
    models, x = models_of(net, 2), torch.randn(2, 3, 8, 8)
    found = ensemble.build(strategy, models, x)(x)
    torch.testing.assert_close(found, independent(models, x), rtol=1e-4, atol=1e-4)


class ByValues(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class ByMask(Net):
    def body(self, x: Tensor) -> Tensor:
        half = self.a(x)[:, torch.arange(CHANNELS) % 2 == 0]
        return self.fc(half.flatten(2).mean(2).repeat(1, 2))


class InMemory(Net):
    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        batch, channel, row, column = y.stride()
        return torch.as_strided(y, y.shape, (batch, channel, column, row))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (ByMask, "a size in it depends on values"),
        (ByValues, "its code asks for values that depend on its input"),
        (InMemory, "the order in which it lies in mem"),
    ],
)
def test_what_no_trace_can_hold_is_refused_in_words(net: type[Net], reason: str) -> None:
    for strategy in ("lowered_vmap", "prepacked_loop"):
        with pytest.raises(UnavailableError, match=reason):
            ensemble.build(strategy, models_of(net, 2), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["constant_added", "a_forward_that_keeps_what_it_forms"])
@pytest.mark.parametrize("strategy", ["folded_loop", "prepacked_loop", "lowered_vmap"])
def test_a_build_leaves_the_model_as_it_was(name: str, strategy: str) -> None:
    (model,) = models_of(CASES[name], 1)
    before, names = dict(vars(model)), [*vars(model)["names"]]
    ensemble.build(strategy, [model], torch.randn(2, 3, 8, 8))
    assert vars(model) == before
    assert model.names == names
