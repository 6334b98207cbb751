"""Packed and fused convolutions compute the same."""

import pytest
import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.models.vision import torchvision
from ensemble.passes import folding, packing
from tests.checkpoints import lively


def pack(model: nn.Module, x: Tensor) -> nn.Module:
    return packing.pack(folding.folded([model])[0], folding.channels_last(x))


@pytest.mark.parametrize(
    ("arch", "convolutions"),
    [
        ("resnet18", 20),
        ("resnet50", 53),
        ("resnext50_32x4d", 53),
        pytest.param("wide_resnet50_2", 53, marks=pytest.mark.slow),
        pytest.param("vgg11_bn", 8, marks=pytest.mark.slow),
        ("mobilenet_v2", 52),
        pytest.param("densenet121", 120, marks=pytest.mark.slow),
        ("squeezenet1_0", 26),
    ],
)
def test_a_packed_model_computes_the_same_with_every_convolution_packed(
    arch: str, convolutions: int
) -> None:
    model, x = lively(arch, 0), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.double()(x.double())
        ready = pack(model.float(), x)
        packed = [part for part in ready.modules() if isinstance(part, packing.PackedConv2d)]
        assert len(packed) == convolutions
        assert not any(isinstance(part, nn.Conv2d) for part in ready.modules())
        for _ in range(2):  # what a call overwrites must be its own
            found = ready(folding.channels_last(x)).double()
            assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_relu_and_residual_of_a_resnet_are_fused_away() -> None:
    model, x = lively("resnet18", 0), torch.randn(1, 3, 64, 64)
    packed = packing.pack(folding.folded([model])[0], folding.channels_last(x))
    called = [str(node.target) for node in packed.graph.nodes if node.op.startswith("call_")]
    assert [name for name in called if "conv" not in name and "downsample" not in name] == [
        "maxpool",
        "avgpool",
        str(torch.flatten),
        "fc",
    ]
    assert len(called) == 20 + 4


def test_a_sum_whose_other_part_is_read_again_is_not_formed_in_its_memory() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (self.b(x) + y) * y

    torch.manual_seed(0)
    model, x = Twice().eval().requires_grad_(False), torch.randn(1, 3, 4, 4)
    ready = packing.pack(model, folding.channels_last(x))
    torch.testing.assert_close(ready(folding.channels_last(x)), model(x))


def test_the_input_is_never_overwritten() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + x).relu()

    model, x = Residual().eval().requires_grad_(False), torch.randn(1, 3, 4, 4)
    x = folding.channels_last(x)
    before = x.clone()
    torch.testing.assert_close(packing.pack(model, x)(x), model(x))
    assert torch.equal(x, before)


def test_where_torch_lacks_the_operators_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = torchvision.models.resnet18(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    with pytest.raises(UnavailableError, match="does not have oneDNN's packed convolution"):
        packing.pack(model, x)


def test_another_device_than_the_cpu_is_said_so() -> None:
    with pytest.raises(UnavailableError, match=r"oneDNN's, for the CPU, not meta"):
        packing.pack(nn.Conv2d(3, 3, 1), torch.empty(1, 3, 4, 4, device="meta"))


def test_a_nan_comes_out_as_nan_through_a_fused_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    ready = packing.pack(model, folding.channels_last(x))
    x[0] = float("nan")
    found = ready(folding.channels_last(x))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], model(x)[1])
