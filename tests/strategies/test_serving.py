"""A built forward later: other shapes, an exchanged model, calls from threads, a report."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensemble
from ensemble.errors import UnavailableError
from ensemble.models.stacking import set_tensors, stacked_state
from ensemble.strategies import BEST, STRATEGIES
from ensemble.strategies.call_gate import CallGate
from ensemble.strategies.lowered_serving import CompiledModels
from ensemble.strategies.serving import Rebuilding, bytes_of, held_bytes, weight_bytes
from tests.tiny import TinyNet, independent, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = [
    name
    for name, strategy in STRATEGIES.items()
    if strategy.module not in ("peers", "cudagraph", "exported") and "compiled" not in name
]
by_every_strategy = pytest.mark.parametrize("name", OWN)
SHAPES = [(1, 3, 8, 8), (5, 3, 8, 8), (3, 2, 3, 8, 8), (2, 3, 6, 10), (3, 4, 3, 7, 7)]


def check(forward: Callable[[Tensor], Tensor], models: list[nn.Module], *shape: int) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(forward(x), independent(models, x), rtol=1e-4, atol=1e-4)


@by_every_strategy
def test_a_forward_takes_any_batch_shared_or_per_model_and_any_size(name: str) -> None:
    models = tiny_models(3)
    forward = ensemble.build(name, models, torch.randn(2, 3, 8, 8), max_batch=5)
    for shape in [*SHAPES, *SHAPES]:  # when it is met first, and later
        check(forward, models, *shape)


@by_every_strategy
def test_a_forward_built_per_model_takes_shared_images_too(name: str) -> None:
    models = tiny_models(3)
    forward = ensemble.build(name, models, torch.randn(3, 1, 3, 8, 8), max_batch=5)
    for shape in SHAPES:
        check(forward, models, *shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 3, 8, 8),
            "expected up to 2 images a model, got 3; build the forward with max_batch=3",
        ),
        ((3, 3, 3, 8, 8), "expected up to 2 images a model, got 3"),
        ((2, 1, 8, 8), r"expected shape \(B, 3, H, W\) or \(3, B, 3, H, W\), got \(2, 1, 8, 8\)"),
        ((2, 2, 3, 8, 8), r"got \(2, 2, 3, 8, 8\)"),
        ((3, 8, 8), r"got \(3, 8, 8\)"),
        ((0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        ((1, 3, 0, 8), r"got \(1, 3, 0, 8\)"),
    ],
    ids=str,
)
@by_every_strategy
def test_a_shape_that_no_input_may_have_is_rejected(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    forward = ensemble.build(name, tiny_models(3), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=f"x: .*{message}"):
        forward(torch.randn(shape))
    with pytest.raises(ValueError, match=message):
        forward.prepare([shape])


@pytest.mark.parametrize("bad", [0, 1, -3, 2.5, "4", True])
def test_max_batch_is_at_least_that_of_the_example(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_batch: expected at least the example's 2, got"):
        ensemble.build("loop", tiny_models(1), torch.randn(2, 3, 8, 8), max_batch=bad)


class CountsImages(nn.Module):
    """Centers the images of a batch: each result depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(0))


def coupled(count: int) -> list[nn.Module]:
    models: list[nn.Module] = [CountsImages().eval() for _ in range(count)]
    for model, tiny in zip(models, tiny_models(count), strict=True):
        model.net = tiny
    return models


@by_every_strategy
def test_models_whose_images_depend_on_each_other_are_never_padded(name: str) -> None:
    models = coupled(2)
    forward = ensemble.build(name, models, torch.randn(4, 3, 8, 8), max_batch=6)
    forward.prepare([6])
    for batch_size in (2, 3, 5, 6):
        check(forward, models, batch_size, 3, 8, 8)


class Recording:
    """A strategy of the user's, whose forwards record the batches that they are called with."""

    def __init__(self) -> None:
        self.built: list[int] = []
        self.called: list[int] = []

    def build(self, models: Any, example: Tensor) -> Callable[[Tensor], Tensor]:
        size = example.shape[-4]
        self.built.append(size)

        def forward(x: Tensor) -> Tensor:
            assert x.shape[-4] == size
            self.called.append(size)
            return independent(models, x)

        return forward


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    from ensemble.strategies import user

    found = Recording()
    monkeypatch.setattr(user, "load", lambda path, function: found.build)
    return found


def test_a_batch_between_prepared_ones_takes_the_next(recording: Recording) -> None:
    models = tiny_models(2)
    forward = ensemble.build("mine.py:build", models, torch.randn(2, 3, 8, 8), max_batch=8)
    forward.prepare([4, 8])
    assert recording.built == [2, 4, 8]
    recording.called.clear()
    for batch_size in (1, 2, 3, 4, 5, 7, 8):
        check(forward, models, batch_size, 3, 8, 8)
    assert recording.built == [2, 4, 8]
    # The first of each size is compared with the model's own, on noise or the input itself.
    assert sorted(set(recording.called)) == [2, 4, 8]
    assert recording.called.count(8) >= 3


def test_shapes_that_calls_have_planned_are_dropped_from_the_oldest_on(
    recording: Recording,
) -> None:
    models = tiny_models(1)
    forward = ensemble.build("mine.py:build", models, torch.randn(1, 3, 8, 8))
    for width in range(9, 29):
        check(forward, models, 1, 3, 8, width)
    assert len(forward.shapes) == 17
    assert (1, 3, 8, 8) in forward.shapes
    assert (1, 3, 8, 9) not in forward.shapes
    assert (1, 3, 8, 28) in forward.shapes


def test_a_shape_that_gives_another_result_than_the_models_is_unavailable(
    recording: Recording,
) -> None:
    forward = ensemble.build("mine.py:build", tiny_models(2), torch.randn(2, 3, 8, 8), max_batch=9)
    wrong = lambda models, example: lambda x: independent(models, x) + 1  # noqa: E731
    recording.build = wrong  # type: ignore[method-assign]
    from ensemble.strategies import user

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "load", lambda path, function: wrong)
        with pytest.raises(UnavailableError, match="give another result than the models do"):
            forward(torch.randn(9, 3, 8, 8))


def test_padding_is_compared_where_it_would_be_the_largest_or_the_smallest(
    recording: Recording,
) -> None:
    class Scaled(TinyNet):
        def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.reduce = reduce

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.reduce(x)

    for reduce in (torch.amax, torch.amin):
        torch.manual_seed(0)
        models = [Scaled(reduce).eval() for _ in range(2)]
        forward = ensemble.build("mine.py:build", models, torch.randn(1, 3, 8, 8), max_batch=8)
        forward.prepare([8])
        for x in (torch.rand(4, 3, 8, 8) + 0.1, -torch.rand(4, 3, 8, 8) - 0.1):
            torch.testing.assert_close(forward(x), independent(models, x), rtol=1e-4, atol=1e-4)


class BranchesOnBatch(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return 2 * found if len(x) > 2 else found


@by_every_strategy
def test_code_that_depends_on_the_batch_size_is_served_by_another_trace(name: str) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [BranchesOnBatch().eval() for _ in range(2)]
    forward = ensemble.build(name, models, torch.randn(2, 3, 8, 8), max_batch=8)
    for batch_size in (1, 2, 3, 4, 8):
        check(forward, models, batch_size, 3, 8, 8)


class Total(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum()


@by_every_strategy
def test_outputs_without_a_batch_dimension_are_never_cut(name: str) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [Total().eval() for _ in range(2)]
    forward = ensemble.build(name, models, torch.randn(2, 3, 8, 8), max_batch=8)
    forward.prepare([8])
    check(forward, models, 4, 3, 8, 8)


class Upsampled(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        return super().forward(x)


@by_every_strategy
def test_constants_of_a_shape_that_depend_on_no_weight_are_made_for_it(name: str) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [Upsampled().eval() for _ in range(2)]
    forward = ensemble.build(name, models, torch.randn(1, 3, 8, 8), max_batch=4)
    check(forward, models, 4, 3, 8, 8)
    check(forward, models, 2, 3, 10, 6)
    forward.replace(0, models[1])
    check(forward, [models[1], models[1]], 2, 3, 10, 6)


@pytest.mark.parametrize("bad", [[-1], [True], [2.0], 8, ["12"], [(1, 3)], None])
def test_shapes_that_are_none_cannot_be_prepared(bad: Any) -> None:
    forward = ensemble.build("loop", tiny_models(1), torch.randn(1, 3, 8, 8), max_batch=9)
    with pytest.raises(ValueError, match="expected"):
        forward.prepare(bad)


# Exchange


def test_a_plan_that_a_call_makes_while_a_model_is_staged_gets_the_new_model(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    *models, new = tiny_models(3)
    forward = ensemble.build("mine.py:build", models, torch.randn(2, 3, 8, 8), max_batch=5)
    build, during = recording.build, torch.randn(5, 3, 8, 8)

    def calls_meanwhile(models: Any, example: Tensor) -> Callable[[Tensor], Tensor]:
        from ensemble.strategies import user

        monkeypatch.setattr(user, "load", lambda path, function: build)
        caller = threading.Thread(target=lambda: forward(during))
        caller.start()
        caller.join()
        return build(models, example)

    from ensemble.strategies import user

    monkeypatch.setattr(user, "load", lambda path, function: calls_meanwhile)
    forward.replace(1, new)
    torch.testing.assert_close(forward(during), independent([models[0], new], during))


@pytest.mark.parametrize("name", ["vmap", "folded_loop", "lowered_vmap"])
def test_an_exchange_that_is_interrupted_while_it_writes_is_undone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.strategies import serving

    models, new = tiny_models(2), tiny_models(3)[2]
    forward = ensemble.build(name, models, torch.randn(1, 3, 8, 8))
    copy = serving._copy

    def interrupted(pairs: Any) -> None:
        monkeypatch.setattr(serving, "_copy", copy)
        copy(list(pairs)[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward.replace(1, new)
    check(forward, models, 1, 3, 8, 8)


class Transposed(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.up(x))


@by_every_strategy
def test_models_whose_packing_merges_the_models_are_exchanged_too(name: str) -> None:
    torch.manual_seed(0)
    *models, new = (Transposed().eval().requires_grad_(False) for _ in range(4))
    forward = ensemble.build(name, models, torch.randn(1, 3, 8, 8))
    forward.replace(2, new)
    check(forward, [*models[:2], new], 1, 3, 8, 8)


def test_a_state_dict_without_non_persistent_buffers_is_complete() -> None:
    class Counted(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.ones(1), persistent=False)

    torch.manual_seed(0)
    *models, new = (Counted().eval().requires_grad_(False) for _ in range(3))
    forward = ensemble.build("vmap", models, torch.randn(1, 3, 8, 8))
    forward.replace(0, new.state_dict())
    check(forward, [new, models[1]], 1, 3, 8, 8)


@pytest.mark.parametrize("bad", [None, "model.pth", [1], 2.0])
def test_what_is_no_model_cannot_take_a_place(bad: Any) -> None:
    forward = ensemble.build("loop", tiny_models(1), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="model: expected a module or a state dict, got"):
        forward.replace(0, bad)
    for index in ("0", None, 1.0, True):
        with pytest.raises(ValueError, match="index: expected 0 to 0, got"):
            forward.replace(index, tiny_models(1)[0])  # type: ignore[arg-type]
    for value in (1.0, torch.zeros(5, device="meta")):
        state = tiny_models(1)[0].state_dict() | {"fc.bias": value}
        with pytest.raises(ValueError, match=r"expected fc\.bias to be a dense tensor"):
            forward.replace(0, state)


@by_every_strategy
def test_an_exchanged_model_serves_the_next_call_and_others_stay(name: str) -> None:
    *models, new, other = tiny_models(5)
    forward = ensemble.build(name, models, torch.randn(2, 3, 8, 8), max_batch=4)
    check(forward, models, 4, 3, 8, 8)
    check(forward, models, 1, 3, 6, 9)
    forward.replace(1, new)
    models[1] = new
    for shape in [(2, 3, 8, 8), (4, 3, 8, 8), (1, 3, 6, 9), (3, 3, 3, 8, 8)]:
        check(forward, models, *shape)
    forward.replace(0, other.state_dict())
    models[0] = other
    for shape in [(2, 3, 8, 8), (4, 3, 8, 8), (1, 3, 6, 9), (2, 3, 12, 12)]:
        check(forward, models, *shape)


@by_every_strategy
def test_an_exchange_leaves_the_models_themselves_as_they_are(name: str) -> None:
    models = tiny_models(3)
    before = [{key: value.clone() for key, value in m.state_dict().items()} for m in models]
    forward = ensemble.build(name, models, torch.randn(1, 3, 8, 8))
    forward.replace(0, models[2])
    forward.replace(1, tiny_models(5)[4].state_dict())
    for model, state in zip(models, before, strict=True):
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["vmap", "chunked_vmap"])
def test_an_exchange_leaves_the_stack_that_load_models_gives_as_it_is(name: str) -> None:
    from ensemble.models import stacking

    models = stacking.cast(tiny_models(3), torch.float32)
    before = [{key: value.clone() for key, value in m.state_dict().items()} for m in models]
    forward = ensemble.build(name, models, torch.randn(1, 3, 8, 8))
    new = tiny_models(4)[3]
    forward.replace(1, new)
    check(forward, [models[0], new, models[2]], 1, 3, 8, 8)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Parts(TinyNet):
    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return {"logits": found, "twice": 2 * found}


def test_an_exchanged_model_gives_the_selected_output_too() -> None:
    models: list[nn.Module] = [Parts().eval().requires_grad_(False) for _ in range(4)]
    x = torch.randn(1, 3, 8, 8)
    forward = ensemble.build("lowered_vmap", models[:2], x, output="twice")
    forward.replace(0, models[2])
    forward.replace(1, models[3].state_dict())
    expected = torch.stack([model(x)["twice"] for model in models[2:]])
    torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-4)


class Wider(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)


@pytest.mark.parametrize("name", ["vmap", "folded_loop", "lowered_vmap", "prepacked_concurrent"])
def test_a_model_that_does_not_fit_is_rejected_and_the_old_one_stays(name: str) -> None:
    models = tiny_models(2)
    forward = ensemble.build(name, models, torch.randn(1, 3, 8, 8))
    state = models[0].state_dict()
    short = {key: value for key, value in state.items() if key != "fc.bias"}
    cases: list[tuple[Any, str]] = [
        (Wider().eval(), "expected TinyNet like model 0, got Wider"),
        (tiny_models(1)[0].train(), "expected eval mode"),
        (short, "fc.bias"),
        (state | {"extra": torch.zeros(1)}, "extra"),
        (state | {"fc.bias": torch.zeros(7)}, r"expected fc.bias to be \(5,\) torch.float32"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            forward.replace(1, bad)
    for index in (-1, 2):
        with pytest.raises(ValueError, match="index: expected 0 to 1, got"):
            forward.replace(index, models[0])
    check(forward, models, 1, 3, 8, 8)


def test_an_exchange_whose_result_is_wrong_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ensemble.compiler.shared_weights import WeightMap

    models, new = tiny_models(2), tiny_models(3)[2]
    forward = ensemble.build("lowered_vmap", models, torch.randn(1, 3, 8, 8))
    constants_of = WeightMap.constants_of

    def doubled(self: WeightMap, *arguments: Any) -> dict[str, Tensor]:
        return {key: 2 * value for key, value in constants_of(self, *arguments).items()}

    monkeypatch.setattr(WeightMap, "constants_of", doubled)
    with pytest.raises(UnavailableError, match="disagrees with the new model, so the old one"):
        forward.replace(1, new)
    check(forward, models, 1, 3, 8, 8)


@pytest.mark.parametrize("name", ["loop", "vmap", "folded_vmap", "lowered_vmap", "prepacked_loop"])
def test_no_call_sees_a_part_of_an_exchange(name: str) -> None:
    models, new = tiny_models(2), tiny_models(3)[2]
    x = torch.randn(2, 3, 8, 8)
    forward = ensemble.build(name, models, x)
    allowed = [independent([one, models[1]], x) for one in (models[0], new)]
    wrong, stop = list[Tensor](), threading.Event()

    def serve() -> None:
        while not stop.is_set():
            found = forward(x)
            if not any(torch.allclose(found, each, rtol=1e-4, atol=1e-4) for each in allowed):
                wrong.append(found)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            forward.replace(0, new)
            forward.replace(0, models[0])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_an_exchange_waits_for_running_calls_and_later_calls_wait_for_it() -> None:
    gate, order = CallGate(), list[str]()
    inside, may_leave, closing = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        with gate:
            inside.set()
            may_leave.wait()
            order.append("first call")

    def exchange() -> None:
        inside.wait()
        closing.set()
        with gate.closed():
            order.append("exchange")

    def later() -> None:
        closing.wait()
        while not gate._is_closed:
            pass
        with gate:
            order.append("later call")

    threads = [threading.Thread(target=work) for work in (call, exchange, later)]
    for thread in threads:
        thread.start()
    closing.wait()
    while not gate._is_closed:
        pass
    may_leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first call", "exchange", "later call"]


# Report


def compiled_models(forward: Any) -> CompiledModels:
    """What `lowered_vmap` holds."""
    found: CompiledModels = forward.serving.stage.__self__
    return found


def test_the_report_of_best_has_the_times_of_all_candidates_and_what_was_picked() -> None:
    forward = ensemble.build(BEST, tiny_models(2), torch.randn(2, 3, 8, 8))
    report = forward.report
    assert report.strategy in STRATEGIES
    assert report.strategy in report.times_s
    assert "loop" in report.times_s
    assert all(seconds > 0 for seconds in report.times_s.values())
    assert f"ensemble.build({report.strategy!r}, models, example, max_batch=2)" in repr(forward)


def test_the_report_of_a_compiled_forward_counts_its_kernels_and_its_memory() -> None:
    models = tiny_models(3)
    forward = ensemble.build("lowered_vmap", models, torch.randn(1, 3, 8, 8), max_batch=64)
    before = forward.report
    assert sum(before.kernels.values()) >= 2
    assert before.memory_bytes == forward.memory_bytes
    packed = compiled_models(forward)._first.found.weights.constants
    weights = sum(tensor.nbytes for tensor in packed.values())
    forward.prepare([64])
    assert before.memory_bytes is not None
    assert forward.memory_bytes is not None
    assert weights < before.memory_bytes < forward.memory_bytes


def test_a_further_model_adds_its_packed_weights_and_no_working_memory() -> None:
    x = torch.randn(1, 3, 8, 8)
    few, many = (ensemble.build("lowered_vmap", tiny_models(n), x) for n in (2, 5))
    assert few.memory_bytes is not None
    assert few.bytes_per_model is not None
    assert many.memory_bytes is not None
    assert many.bytes_per_model is not None
    added = (many.memory_bytes - few.memory_bytes) / 3
    # A few constants are shared by all models.
    assert added <= many.bytes_per_model <= few.bytes_per_model < 1.05 * added


def test_memory_is_of_the_models_that_a_forward_has_not_of_the_stack_that_they_are_slices_of() -> (
    None
):
    stack = {name: tensor.clone() for name, tensor in stacked_state(tiny_models(4)).items()}
    models = tiny_models(4)
    for index, model in enumerate(models):
        set_tensors(model, {name: tensor[index] for name, tensor in stack.items()})
    for name in ("loop", "vmap"):
        forward = ensemble.build(name, models[1:3], torch.randn(1, 3, 8, 8))
        size = sum(tensor.nbytes for tensor in stack.values())
        assert (forward.memory_bytes, forward.bytes_per_model) == (size // 2, size // 4)


def test_bytes_of_overlapping_tensors_count_once() -> None:
    x = torch.zeros(4, 6)
    assert bytes_of([x, x[1:], x.T, x[:, 2], torch.zeros(0)]) == 96
    assert bytes_of([x[0], x[2]]) == 48
    assert bytes_of([torch.zeros(3), torch.zeros(3)]) == 24
    packed = torch.randn(8, 8).to_mkldnn()
    assert bytes_of([packed, packed, x]) == 256 + 96


def test_memory_that_another_runtime_holds_is_unknown() -> None:
    def build(models: Any, example: Tensor) -> Any:
        return lambda x: torch.zeros(2, len(x), 5)

    models, x = tiny_models(2), torch.randn(1, 3, 8, 8)
    rebuilding = Rebuilding(build, models, build(models, x), x)
    assert weight_bytes([rebuilding.serving]) is None
    assert held_bytes([rebuilding.serving]) is None


def test_further_shapes_share_the_packed_weights() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 512, 3), nn.Conv2d(512, 256, 3)).eval() for _ in range(2)]
    x = torch.randn(1, 3, 8, 8)
    forward = ensemble.build("lowered_vmap", models, x, max_batch=4)
    forward.prepare([2, 4, (1, 3, 12, 12)])
    forward(torch.randn(3, 3, 9, 9))
    compiled = compiled_models(forward)
    stored = {t.data_ptr() for t in compiled._first.found.weights.constants.values()}
    large = [
        step.weight.data_ptr()
        for program in compiled._programs()
        for step in program.steps
        if step.weight is not None and step.weight.numel() > 100_000
    ]
    assert len(large) >= 5
    assert set(large) <= stored
