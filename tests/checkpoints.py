"""Independently constructed torchvision models and their state dicts, for tests to compare with."""

import copy
import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from ensemble.models.vision import torchvision

SMALL = "shufflenet_v2_x0_5"  # 1.4 MB with 10 classes, batch norm included


def trained(arch: str, *, classes: int, seed: int) -> nn.Module:
    """An eval-mode torchvision model whose weights and batch statistics are all its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(arch, weights=None, num_classes=classes).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.requires_grad_(False)


def on_meta(arch: str, *, classes: int) -> nn.Module:
    """A torchvision model without memory."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet's and Inception's
        return torchvision.models.get_model(arch, weights=None, num_classes=classes).eval()


def hollow(arch: str, *, classes: int) -> dict[str, Tensor]:
    """A state dict with every name, shape and dtype of `arch`; one number a tensor is stored."""
    state = on_meta(arch, classes=classes).state_dict()
    return {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()}


def lively(arch: str, seed: int) -> nn.Module:
    """A model whose batch norms have statistics and scales that differ from the identity's.

    A VGG gets one linear layer: its three are 119 million numbers, and no convolution.
    """
    model = _drawn(arch, seed)
    return copy.deepcopy(model)  # a test may change it


@lru_cache(maxsize=4)
def _drawn(arch: str, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(arch, weights=None, num_classes=7)
        if arch.startswith("vgg"):
            model.classifier = nn.Linear(512 * 7 * 7, 7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 2, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    assert tensor is not None
                    tensor.normal_(0, 0.3, generator=generator)
    return model.eval()
