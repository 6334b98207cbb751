"""Architectures by name: torchvision's, timm's, and functions of the user."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ensemble
from ensemble.errors import InputError
from ensemble.models import architectures, sources, weights
from ensemble.models.preprocessing import IMAGENET
from ensemble.models.stacking import named_tensors
from ensemble.models.vision import torchvision
from tests import user_models

FILE = user_models.__file__
CPU = torch.device("cpu")
HAS_TIMM = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not HAS_TIMM, reason="needs timm")


def saved(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def new(make: Any, seed: int) -> nn.Module:
    """A model with a state of its own, batch statistics included."""
    torch.manual_seed(seed)
    model: nn.Module = make()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(autouse=True)
def restored_generator() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


# Functions of the user


@pytest.mark.parametrize("arch", [f"{FILE}:gray", "tests.user_models:gray", user_models.gray])
def test_weights_are_loaded_into_the_module_of_a_function(arch: Any, tmp_path: Path) -> None:
    expected = new(user_models.gray, 3)
    path = saved(expected, tmp_path / "gray.pth")
    models = ensemble.load_models(path, arch=arch, device="cpu", num_models=2)
    x = torch.randn(2, 1, 16, 16)
    for model in models:
        assert not model.training
        assert torch.equal(model(x), expected(x))
    # what is not in the state dict comes from the function
    assert named_tensors(models[1])["shift"].tolist() == [0.25]


def test_the_prefix_of_a_wrapped_module_is_stripped_for_functions_too(tmp_path: Path) -> None:
    expected, lines = new(user_models.gray, 4), list[str]()
    path = saved(nn.DataParallel(expected), tmp_path / "wrapped.pth")
    arch = f"{FILE}:gray"
    (model,) = weights.load_models(path, arch=arch, device="cpu", say=lines.append)
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(model(x), expected(x))
    assert lines == [f"{path}: stripped the prefix 'module.' from all 9 keys"]


def test_a_module_of_another_mode_and_dtype_is_evaluated_in_float32() -> None:
    (model,) = weights.random_models(1, arch=f"{FILE}:segmenter", device=CPU, seed=0)
    assert not model.training
    assert {tensor.dtype for tensor in named_tensors(model).values()} == {torch.float32}


def test_tied_weights_have_one_tensor_under_the_names_of_their_state_dict(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        second.weight = first.weight
        return nn.Sequential(first, second)

    expected = new(tied, 5)
    path = saved(expected, tmp_path / "tied.pth")
    (model,) = ensemble.load_models(path, arch=tied, device="cpu")
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x), expected(x))


def test_new_models_of_a_function_have_a_seed_each_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = weights.random_models(2, arch=f"{FILE}:gray", device=CPU, seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    for seed, model in ((8, first), (9, second)):
        torch.manual_seed(seed)
        expected = named_tensors(user_models.gray())
        found = named_tensors(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_files_the_weights_are_as_a_function_constructs_them() -> None:
    lines = list[str]()
    models, source = sources.load(
        None, arch=f"{FILE}:gray", num_models=3, device=CPU, seed=2, say=lines.append
    )
    assert (len(models), source) == (3, "as constructed, seeds 2 to 4")
    assert lines == [f"No --model_path: the weights of {FILE}:gray are {source}"]
    assert sources.is_of_each_rank(source)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (f"{FILE}:grey", f"expected a function grey in {FILE}, got none; did you mean gray?"),
        (f"{FILE}:VALUE", f"expected a function VALUE in {FILE}, got int"),
        (f"{FILE}:", f"expected PATH.py:FUNCTION, got {FILE}:"),
        (FILE, f"expected PATH.py:FUNCTION, got {FILE}"),
        ("nothing.py:make", "expected a file at nothing.py, got none"),
        ("no_module:make", "no_module cannot be imported: ModuleNotFoundError: No module named"),
        ("tests.user_models:grey", "expected a function grey in tests.user_models, got none; did"),
        (":make", "expected MODULE:FUNCTION, got :make"),
        ("tests.user_models:", "expected MODULE:FUNCTION, got tests.user_models:"),
        (f"{FILE}:raises", f"{FILE}:raises failed: KeyError: 'no weights here'"),
        (f"{FILE}:gives_a_number", f"expected {FILE}:gives_a_number to give an nn.Module, got int"),
        (f"{FILE}:is_lazy", f"expected {FILE}:is_lazy to initialize its parameters, got lazy ones"),
        (
            f"{FILE}:needs_arguments",
            f"expected {FILE}:needs_arguments to be called without arguments, got required"
            " arguments width, depth",
        ),
        (
            f"{FILE}:differs_in_each_call",
            f"expected {FILE}:differs_in_each_call to give the same architecture in each call, got"
            " weight of shape",
        ),
    ],
)
def test_a_function_that_cannot_be_used_is_an_error_that_says_why(arch: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        weights.random_models(2, arch=arch, device=CPU, seed=0)
    assert caught.value.argument == "arch"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def make(:", "SyntaxError: "),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_is_no_module_is_an_error_in_each_attempt(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    for _ in range(2):  # a module that failed half way is not kept
        with pytest.raises(InputError, match=re.escape(f"{path} cannot be imported: {reason}")):
            architectures.find(f"{path}:make")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = saved(nn.Conv2d(1, 1, 1), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"expected a Python file, whose name ends in \.py, got"):
        architectures.find(f"{path}:make")


def test_a_file_is_executed_once(tmp_path: Path) -> None:
    path = tmp_path / "counted.py"
    path.write_text(
        "import pathlib, torch\n"
        f"with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('x')\n"
        "def make(): return torch.nn.Conv2d(1, 1, 1)\n"
    )
    for _ in range(3):
        weights.random_models(2, arch=f"{path}:make", device=CPU, seed=0)
    assert (tmp_path / "log").read_text() == "x"


def test_a_module_of_the_working_folder_comes_first_and_hides_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "def make():\n"
        "    import colorsys\n"
        "    assert hasattr(colorsys, 'hls_to_rgb')\n"
        "    return torch.nn.Conv2d(1, 1, 1)\n"
    )
    (tmp_path / "colorsys.py").write_text("")  # of the standard library, too
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    weights.random_models(1, arch="my_nets:make", device=CPU, seed=0)
    assert sys.path[-1] == os.getcwd()


def test_weights_that_do_not_fit_a_function_are_named_like_those_of_torchvision(
    tmp_path: Path,
) -> None:
    arch = f"{FILE}:segmenter"
    path = saved(user_models.gray(), tmp_path / "gray.pth")
    message = f"{path}: expected a state dict of {arch}, got missing keys down.weight and 3 more"
    with pytest.raises(InputError, match=re.escape(message)):
        ensemble.load_models(path, arch=arch, device="cpu")
    state = user_models.Segmenter().state_dict()
    torch.save(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="got unexpected key extra"):
        ensemble.load_models(path, arch=arch, device="cpu")
    torch.save(state | {"out.bias": torch.zeros(5)}, path)
    with pytest.raises(InputError, match=r"expected out.bias of shape \(4,\), got \(5,\)"):
        ensemble.load_models(path, arch=arch, device="cpu")
    torch.save(state | {"out.bias": torch.full((4,), torch.nan)}, path)
    with pytest.raises(InputError, match="expected finite weights, got NaN or infinity in out"):
        ensemble.load_models(path, arch=arch, device="cpu")


# torchvision's segmentation models


def test_a_segmentation_model_with_its_auxiliary_classifier_is_loaded(tmp_path: Path) -> None:
    expected = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    ).eval()
    path = saved(expected, tmp_path / "lraspp.pth")
    (model,) = ensemble.load_models(path, arch="lraspp_mobilenet_v3_large", device="cpu")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x)["out"], expected(x)["out"])
    for auxiliary in (True, False):  # published files have one
        with torch.device("meta"):
            published = torchvision.models.get_model(
                "fcn_resnet50",
                weights=None,
                weights_backbone=None,
                num_classes=5,
                aux_loss=auxiliary or None,
            )
        state = published.state_dict()
        template = weights.template_of_state("fcn_resnet50", state, source="a file").model
        assert template.state_dict().keys() == state.keys()
        assert (template.aux_classifier is not None) is auxiliary


# timm


@needs_timm
def test_timms_models_are_loaded_with_the_classes_and_channels_of_the_file(tmp_path: Path) -> None:
    import timm

    x = torch.randn(1, 1, 64, 64)
    for classes in (5, 0):
        expected = new(lambda: timm.create_model("resnet10t", num_classes=classes, in_chans=1), 1)  # noqa: B023
        path = saved(expected, tmp_path / f"{classes}.pth")
        (model,) = ensemble.load_models(path, arch="timm/resnet10t", device="cpu")
        assert torch.equal(model(x), expected(x))
    state = torch.load(path)
    del state["conv1.0.weight"]
    torch.save(state, path)
    message = "expected a state dict of timm/resnet10t with fc.weight, got 83 tensors starting with"
    with pytest.raises(InputError, match=message):
        ensemble.load_models(path, arch="timm/resnet10t", device="cpu")


@needs_timm
def test_timm_knows_the_preprocessing_and_the_size_of_its_models() -> None:
    found = architectures.find("timm/resnet26t")
    assert found.image_size == 256
    assert found.preprocessing.describe() == (
        "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 0.94, bicubic"
    )
    wide = architectures.find("timm/mixer_b16_224.goog_in21k").preprocessing
    assert wide.mean == (0.5, 0.5, 0.5) != IMAGENET.mean


@needs_timm
def test_an_unknown_name_of_timm_is_an_error_with_the_closest_ones() -> None:
    message = r"arch: expected one of timm's architectures \(resnet26t, .*\), got 'resnet27t'"
    with pytest.raises(InputError, match=message):
        architectures.find("timm/resnet27t")


def test_without_timm_its_names_are_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"arch: timm/... requires the package timm: .*"
    with pytest.raises(InputError, match=message):
        architectures.find("timm/resnet26t")
    assert architectures.find("resnet18").name == "resnet18"


class FakeTimm(ModuleType):
    """What is used of timm, with one architecture."""

    def is_model(self, name: str) -> bool:
        return name == "tiny"

    def list_models(self) -> list[str]:
        return ["tiny"]

    def get_pretrained_cfg(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            **{"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.9, "input_size": (3, 48, 48)},
            **{"interpolation": "bicubic", "first_conv": "conv", "classifier": "head"},
        )

    def create_model(
        self, name: str, *, pretrained: bool, num_classes: int = 1000, in_chans: int = 3
    ) -> nn.Module:
        assert not pretrained
        if in_chans > 4:
            raise TypeError("unexpected in_chans")
        model = user_models.Classifier(in_chans)
        model.head = nn.Linear(8, num_classes)
        return model


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm("timm"))


@pytest.mark.usefixtures("fake_timm")
def test_the_names_of_timm_are_constructed_by_its_own_functions(tmp_path: Path) -> None:
    found = architectures.find("timm/tiny", channels=4)
    assert (found.image_size, found.preprocessing.mean) == (48, (0.5, 0.5, 0.5))
    assert found.construct(6)(torch.zeros(1, 4, 8, 8)).shape == (1, 6)
    expected = new(lambda: FakeTimm("timm").create_model("", pretrained=False, num_classes=9), 2)
    path = saved(expected, tmp_path / "tiny.pth")
    (model,) = ensemble.load_models(path, arch="timm/tiny", device="cpu")
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(x), expected(x))
    assert named_tensors(model)["shift"].tolist() == [0.25]
    with pytest.raises(InputError, match=r"got 'tinny'") as caught:
        architectures.find("timm/tinny")
    assert "(tiny, ...)" in caught.value.message
    with pytest.raises(InputError, match=r"timm cannot create tiny with in_chans=13: TypeError"):
        weights.random_models(1, arch="timm/tiny", device=CPU, seed=0, channels=13)
