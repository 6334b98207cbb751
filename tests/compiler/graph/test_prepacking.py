"""Prepacked and fused convolutions compute the same."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ensemble.compiler.graph import batch_norm_folding, prepacking
from ensemble.errors import UnavailableError
from ensemble.models.vision import torchvision
from tests.checkpoints import lively


def pack(model: nn.Module, x: Tensor) -> prepacking.Packed:
    (packed,) = prepacking.pack([model], batch_norm_folding.channels_last(x))
    return packed


def calls(packed: prepacking.Packed) -> list[tuple[object, Sequence[object]]]:
    nodes = packed.run.graph.nodes
    return [(node.target, node.args) for node in nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("resnet18", 21),
        pytest.param("resnet50", 54, marks=pytest.mark.slow),  # resnext has such blocks too
        ("resnext50_32x4d", 54),
        pytest.param("wide_resnet50_2", 54, marks=pytest.mark.slow),
        pytest.param("vgg11_bn", 9, marks=pytest.mark.slow),
        ("mobilenet_v2", 53),
        pytest.param("densenet121", 121, marks=pytest.mark.slow),
        ("squeezenet1_0", 26),
    ],
)
def test_a_prepacked_model_computes_the_same_with_every_layer_packed(
    arch: str, layers: int
) -> None:
    model, x = lively(arch, 0), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.double()(x.double())
        ready = pack(model.float(), x)
        targets = [target for target, _ in calls(ready)]
        assert targets.count(prepacking.packed_conv2d) == layers
        assert torch.ops.aten.convolution.default not in targets
        for _ in range(2):  # a call may overwrite only its own memory
            found = ready(batch_norm_folding.channels_last(x)).double()
            assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_norms_relu_and_residual_of_a_resnet_are_fused_away() -> None:
    packed = pack(lively("resnet18", 0), torch.randn(1, 3, 64, 64))
    others = [target for target, _ in calls(packed) if target is not prepacking.packed_conv2d]
    assert len(others) == 3  # two poolings, and a reshape behind the linear layer
    sums = [
        args for target, args in calls(packed) if target is prepacking.packed_conv2d and args[3]
    ]
    assert len(sums) == 8
    assert all(args[-1] for args in sums)  # each overwrites its residual


def test_models_of_one_architecture_share_a_graph_and_others_have_their_own() -> None:
    x = batch_norm_folding.channels_last(torch.randn(1, 3, 32, 32))
    alike = prepacking.pack([lively("resnet18", seed) for seed in range(2)], x)
    assert alike[0].run is alike[1].run
    other = prepacking.pack([lively("resnet18", 0), lively("squeezenet1_0", 0)], x)
    assert other[0].run is not other[1].run


def test_a_residual_that_is_read_again_is_not_overwritten() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (self.b(x) + y) * y

    torch.manual_seed(0)
    model, x = Twice().eval().requires_grad_(False), torch.randn(1, 3, 4, 4)
    ready = pack(model, x)
    torch.testing.assert_close(ready(batch_norm_folding.channels_last(x)), model(x))


def test_the_input_is_never_overwritten() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + x).relu()

    model, x = Residual().eval().requires_grad_(False), torch.randn(1, 3, 4, 4)
    x = batch_norm_folding.channels_last(x)
    before = x.clone()
    torch.testing.assert_close(pack(model, x)(x), model(x))
    assert torch.equal(x, before)


def test_missing_operators_of_torch_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = torchvision.models.resnet18(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    with pytest.raises(UnavailableError, match="does not have oneDNN's packed convolution"):
        pack(model, x)


def test_another_device_than_the_cpu_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"oneDNN's, for the CPU, not meta"):
        prepacking.pack([nn.Conv2d(3, 3, 1)], torch.empty(1, 3, 4, 4, device="meta"))


def test_a_nan_comes_out_as_nan_through_a_fused_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    ready = pack(model, x)
    x[0] = float("nan")
    found = ready(batch_norm_folding.channels_last(x))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], model(x)[1])


def test_prepacking_needs_no_other_module_to_register_its_operators() -> None:
    code = "import ensemble.compiler.graph.prepacking"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
