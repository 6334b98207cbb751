"""Loading checkpoint files of training scripts, valid and invalid."""

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ensemble.errors import InputError
from ensemble.machine import memory
from ensemble.models import architectures, checkpoints, stacking, weights
from ensemble.models.vision import torchvision
from tests.checkpoints import (
    SMALL,
    hollow,
    on_meta,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
State = dict[str, Tensor]

OTHER_ARCHITECTURES = [
    "vgg11",
    "alexnet",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "vit_b_16",
    "convnext_tiny",
    "squeezenet1_0",
    "googlenet",
    "inception_v3",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "resnext50_32x4d",
    "wide_resnet50_2",
]


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def load_one(path: Path, arch: str = SMALL) -> nn.Module:
    (model,) = weights.load_models([path], arch=arch, device="cpu")
    return model


def assert_same_state(model: nn.Module, expected: State) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def replicated(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def averaged(state: State) -> State:
    """Like the state of torch.optim.swa_utils.AveragedModel."""
    return {"n_averaged": torch.tensor(12), **replicated(state)}


def rng_states() -> State:
    return {"cpu": torch.get_rng_state(), "python": torch.zeros(625, dtype=torch.int64)}


# Valid checkpoints


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_checkpoint_of_each_format_restores_the_model(
    small_model: nn.Module, small_state: State, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        save_file(small_state, path)
    else:
        torch.save(small_state, path)
    model, x = load_one(path), torch.randn(2, 3, 64, 64)
    assert_same_state(model, small_state)
    assert torch.equal(model(x), small_model(x))


def test_a_checkpoint_in_the_format_before_torch_1_6_loads(
    small_state: State, tmp_path: Path
) -> None:
    path = tmp_path / "old.pth"
    torch.save(small_state, path, _use_new_zipfile_serialization=False)
    assert_same_state(load_one(path), small_state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": state, "model_ema": averaged(state), "epoch": 3},
        lambda state: {"epoch": 3, "model_ema": averaged(state)},
        lambda state: {
            "epoch": 5,
            "model_state_dict": state,
            "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
            "loss": torch.tensor(0.4, requires_grad=True),
        },
        lambda state: {"loss": torch.tensor(0.4), "best_weights": state, "rng": rng_states()},
        lambda state: {"model": {"name": "resnet", "width": 64}, "weights": state},
        replicated,
        lambda state: {"state_dict": replicated(state), "arch": SMALL},
        lambda state: {"model": replicated(state)},
    ],
    ids=[
        *("state_dict", "model", "torchvision", "torchvision-ema", "ema", "tutorial", "other"),
        *("model-options", "module", "state_dict-module", "model-module"),
    ],
)
def test_a_wrapped_state_dict_is_unwrapped(
    small_state: State, tmp_path: Path, wrap: Callable[[State], object]
) -> None:
    path = saved(wrap(small_state), tmp_path / "wrapped.pth")
    assert_same_state(load_one(path), small_state)


PREFIXES = ["backbone.", "net.", "model.", "_orig_mod.", "module.", "model._orig_mod.", "a.b.c.d."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_stripped_and_reported_in_one_line(
    small_state: State, tmp_path: Path, prefix: str
) -> None:
    path = saved({prefix + name: t for name, t in small_state.items()}, tmp_path / "wrapped.pth")
    lines: list[str] = []
    (model,) = weights.load_models([path], arch=SMALL, device="cpu", say=lines.append)
    assert_same_state(model, small_state)
    count = len(small_state)
    assert lines == [f"{path}: stripped the prefix {prefix!r} from all {count} keys"]


def test_nothing_is_reported_without_a_prefix(small_state: State, tmp_path: Path) -> None:
    lines: list[str] = []
    path = saved(small_state, tmp_path / "plain.pth")
    weights.load_models([path], arch=SMALL, device="cpu", say=lines.append)
    assert lines == []


@pytest.mark.parametrize("arch", [SMALL, "resnet18", "densenet121", "squeezenet1_0", "vgg11"])
@pytest.mark.parametrize("prefix", ["", "features.", "model.features.", "fc.", "layer1."])
def test_only_prefixes_that_are_not_part_of_the_architecture_are_stripped(
    arch: str, prefix: str
) -> None:
    expected = hollow(arch, classes=10)
    state = {prefix + name: tensor for name, tensor in expected.items()}
    found, taken = weights.strip_prefix(state, expected)
    assert (list(found), taken) == (list(expected), prefix)


def test_a_partial_state_keeps_the_prefix_of_its_module() -> None:
    expected = hollow("vgg11", classes=10)
    part = {name: tensor for name, tensor in expected.items() if name.startswith("features.")}
    assert weights.strip_prefix(part, expected) == (part, "")
    assert weights.strip_prefix({"model." + n: t for n, t in part.items()}, expected)[1] == "model."
    assert weights.strip_prefix({"fc.bias": torch.ones(1)}, expected)[1] == ""


def test_a_lightning_checkpoint_loads(small_state: State, tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((f"model.{name}", t) for name, t in small_state.items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [
            {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
        ],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "arch": SMALL, "milestones": (1, 2), "seed": None},
    }
    assert_same_state(load_one(saved(content, tmp_path / "last.ckpt")), small_state)


@pytest.mark.parametrize(
    ("prefix", "more", "left_out"),
    [
        ("module.", {"n_averaged": torch.tensor(12)}, "n_averaged"),
        ("model.module.", {"model.n_averaged": torch.tensor(12)}, "model.n_averaged"),
        ("model.", {"criterion.weight": torch.ones(10)}, "criterion.weight"),
        (
            "model.",
            {"loss.margin": torch.ones(2), "best.value": torch.tensor(-torch.inf)},
            "loss.margin and 1 more",
        ),
    ],
    ids=["AveragedModel", "AveragedModel in Lightning", "loss", "loss and metric"],
)
def test_tensors_outside_a_complete_prefixed_model_are_ignored_and_reported(
    small_state: State, tmp_path: Path, prefix: str, more: State, left_out: str
) -> None:
    state = {prefix + name: tensor for name, tensor in small_state.items()}
    path, lines = saved(more | state, tmp_path / "last.ckpt"), list[str]()
    (model,) = weights.load_models([path], arch=SMALL, device="cpu", say=lines.append)
    assert_same_state(model, small_state)
    begin = f"{path}: stripped the prefix {prefix!r} from {len(state)} keys"
    assert lines == [f"{begin}; ignored {left_out}"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model.criterion.weight": torch.ones(10)}, "unexpected key criterion.weight"),
        ({"fc.bias": torch.ones(10)}, r"unexpected key fc.bias .as well as model.fc.bias."),
        ({"head.fc.bias": torch.ones(10)}, "unexpected key head.fc.bias"),
    ],
)
def test_possible_weights_are_not_ignored(
    small_state: State, tmp_path: Path, more: State, message: str
) -> None:
    state = {f"model.{name}": tensor for name, tensor in small_state.items()}
    assert_refused(
        saved({**state, **more}, tmp_path / "last.ckpt"),
        f"expected a state dict of {SMALL}.*{message}",
    )


def test_two_models_in_one_file_are_ambiguous_and_rejected(
    small_state: State, tmp_path: Path
) -> None:
    student = {f"student.{name}": tensor for name, tensor in small_state.items()}
    teacher = {f"teacher.{name}": tensor for name, tensor in small_state.items()}
    path = saved(student | teacher, tmp_path / "distilled.pth")
    first = next(iter(small_state))
    message = f"got unexpected keys teacher.{first} and {len(small_state) - 1} more"
    assert_refused(path, f"expected a state dict of {SMALL}, {message}")


def test_an_incomplete_model_with_a_loss_is_rejected_by_its_missing_key(
    small_state: State, tmp_path: Path
) -> None:
    del small_state["conv1.0.weight"]
    state = {f"model.{name}": tensor for name, tensor in small_state.items()}
    path = saved({**state, "criterion.weight": torch.ones(10)}, tmp_path / "last.ckpt")
    assert_refused(path, f"expected a state dict of {SMALL}, got missing key conv1.0.weight")


def test_a_lightning_checkpoint_with_code_in_its_hyperparameters_is_rejected(
    small_state: State, tmp_path: Path
) -> None:
    content = {"state_dict": small_state, "hyper_parameters": {"hook": Attack(tmp_path / "made")}}
    path = saved(content, tmp_path / "last.ckpt")
    assert_refused(path, "expected a state dict of tensors, got a pickle that references")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_stored_in_another_dtype_become_float32_with_their_values(
    small_state: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in small_state.items()}  # counters included
    model = load_one(saved(stored, tmp_path / "stored.pth"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_state(model, stored)


def test_a_checkpoint_with_zero_classes_is_rejected(tmp_path: Path) -> None:
    state = trained(SMALL, classes=1, seed=1).state_dict()
    last = list(state)[-1]
    path = saved({**state, last: state[last][:0]}, tmp_path / "none.pth")
    assert_refused(Path(path), rf"expected at least one class, got {last} of shape \(0,\)")


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_the_number_of_classes_is_inferred_from_the_checkpoint(
    tmp_path: Path, classes: int
) -> None:
    expected = trained(SMALL, classes=classes, seed=1)
    model = load_one(saved(expected.state_dict(), tmp_path / "classes.pth"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), expected(x))


def test_missing_batch_counters_are_zero(small_state: State, tmp_path: Path) -> None:
    old = {name: t for name, t in small_state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(small_state)
    model = load_one(saved(old, tmp_path / "old.pth"))
    assert_same_state(model, small_state)


@pytest.mark.parametrize(
    ("published", "current"),
    [
        (
            "features.denseblock1.denselayer6.norm.2.running_mean",
            "features.denseblock1.denselayer6.norm2.running_mean",
        ),
        (
            "features.denseblock4.denselayer1.conv.1.weight",
            "features.denseblock4.denselayer1.conv1.weight",
        ),
        (
            "encoder.layers.encoder_layer_0.mlp.linear_1.weight",
            "encoder.layers.encoder_layer_0.mlp.0.weight",
        ),
        (
            "encoder.layers.encoder_layer_11.mlp.linear_2.bias",
            "encoder.layers.encoder_layer_11.mlp.3.bias",
        ),
    ],
)
def test_legacy_names_in_published_files_are_translated(
    tmp_path: Path, published: str, current: str
) -> None:
    arch = "densenet121" if "dense" in published else "vit_b_16"
    assert current in on_meta(arch, classes=7).state_dict()
    path = saved({published: torch.arange(3.0)}, tmp_path / "published.pth")
    assert checkpoints.read(path).keys() == {current}


# Numbers of models


def test_one_file_yields_independent_copies(small_state: State, tmp_path: Path) -> None:
    path = saved(small_state, tmp_path / "one.pth")
    first, second, third = weights.load_models([path], arch=SMALL, device="cpu", num_models=3)
    for tensor in second.state_dict().values():
        tensor.fill_(3)
    assert_same_state(first, small_state)
    assert_same_state(third, small_state)
    assert all((tensor == 3).all() for tensor in second.state_dict().values())


def test_five_files_yield_five_models_that_match_torchvision(
    five_resnets: dict[Path, nn.Module],
) -> None:
    models = weights.load_models(list(five_resnets), arch="resnet18", device="cpu")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = []
    for path, model in zip(five_resnets, models, strict=True):
        independent = torchvision.models.resnet18(num_classes=10).eval()
        independent.load_state_dict(torch.load(path))
        logits.append(model(x))
        assert torch.equal(logits[-1], independent(x).detach()), path
    assert all(not torch.allclose(logits[i], logits[j]) for i in range(5) for j in range(i))


def test_a_file_passed_twice_yields_two_independent_models(
    small_state: State, tmp_path: Path
) -> None:
    path = saved(small_state, tmp_path / "twice.pth")
    first, second = weights.load_models([path, path], arch=SMALL, device="cpu")
    for tensor in first.state_dict().values():
        tensor.fill_(3)
    assert_same_state(second, small_state)


def test_loaded_models_are_in_eval_mode_without_gradients_in_one_stack(
    small_state: State, tmp_path: Path
) -> None:
    path = saved(small_state, tmp_path / "one.pth")
    models = weights.load_models([path], arch=SMALL, device="cpu", num_models=2)
    assert not any(module.training for model in models for module in model.modules())
    assert not any(parameter.requires_grad for model in models for parameter in model.parameters())
    stacked = stacking.stacked_state(models)
    assert stacked["fc.weight"].data_ptr() == models[0].get_parameter("fc.weight").data_ptr()


def test_models_from_a_state_are_copies_of_it(small_state: State) -> None:
    models = weights.models_from_state(
        small_state, arch=SMALL, source="memory", num_models=2, device=CPU
    )
    models[0].get_parameter("fc.bias").fill_(3)
    assert_same_state(models[1], small_state)


@pytest.mark.parametrize(("num_models", "models"), [(1, "1 model$"), (3, "3 models$")])
def test_two_files_for_another_number_of_models_are_rejected(num_models: int, models: str) -> None:
    found = f"expected one file or one file per model, got 2 files for {models}"
    with pytest.raises(InputError, match=f"paths: {found}"):
        weights.load_models(["a", "b"], arch=SMALL, device="cpu", num_models=num_models)


def test_a_single_path_is_accepted_without_a_list(small_state: State, tmp_path: Path) -> None:
    path = tmp_path / "one.pth"
    torch.save(small_state, path)
    (model,) = weights.load_models(path, arch=SMALL, device="cpu")
    assert_same_state(model, small_state)
    assert len(weights.load_models(str(path), arch=SMALL, device="cpu", num_models=3)) == 3


def test_an_empty_list_of_files_is_rejected() -> None:
    with pytest.raises(InputError, match=r"paths: expected one file.*got 0 files"):
        weights.load_models([], arch=SMALL, device="cpu")


def test_more_models_than_memory_holds_are_rejected_before_allocation(
    small_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = sum(tensor.nbytes for tensor in small_state.values())
    monkeypatch.setattr(memory, "available_bytes", lambda device: 5 * each + 1)
    path = saved(small_state, tmp_path / "one.pth")
    assert len(weights.load_models([path], arch=SMALL, device="cpu", num_models=5)) == 5
    with pytest.raises(InputError, match=r"the weights of 6 models require .* at most 5 fit"):
        weights.load_models([path], arch=SMALL, device="cpu", num_models=6)


def test_models_load_if_the_available_memory_is_unknown(
    small_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert_same_state(load_one(saved(small_state, tmp_path / "one.pth")), small_state)


# Errors


class Attack:
    """Its pickle executes a shell command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def assert_refused(path: Path, message: str, arch: str = SMALL) -> None:
    """The error is the file name, then the pattern `message`."""
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: ") + message):
        load_one(path, arch)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = "expected a checkpoint file, but no such file exists"
    assert_refused(tmp_path / "absent.pth", message)


def test_a_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert_refused(tmp_path, "expected a checkpoint file, got a directory")


def test_a_file_name_that_is_too_long_is_rejected(tmp_path: Path) -> None:
    assert_refused(tmp_path / ("a" * 300), "expected a checkpoint file, but it cannot be read")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_empty_file_is_not_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.touch()
    assert_refused(path, "expected a checkpoint file, got an empty file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_not_a_checkpoint(
    small_state: State, tmp_path: Path, suffix: str, kept: float
) -> None:
    path = tmp_path / f"whole{suffix}"
    save_file(small_state, path) if suffix == ".safetensors" else torch.save(small_state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert_refused(path, "expected a .*, got a truncated or corrupted file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_html_page_is_identified(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("\n <!DOCTYPE html><html>404</html>")
    assert_refused(path, "expected a checkpoint file, got an HTML page")


@pytest.mark.parametrize(
    "content",
    [
        b"c is a letter, and so is d\nthis is text\n" * 9,
        b"hello world, this is text\n",
    ],
    ids=["text-like-a-pickle", "text"],
)
def test_a_text_file_is_identified(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    assert_refused(path, "expected a checkpoint file, got a text file")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_with_code_is_rejected_and_not_executed(tmp_path: Path, new_format: bool) -> None:
    made = tmp_path / "made"
    path = tmp_path / "attack.pth"
    torch.save({"a": Attack(made)}, path, _use_new_zipfile_serialization=new_format)
    assert_refused(
        path, r"expected a state dict of tensors, got a pickle that references \w+.system"
    )
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists(), "the attack does not work even with weights_only=False"


def test_a_pickled_module_is_rejected(small_model: nn.Module, tmp_path: Path) -> None:
    path = saved(small_model, tmp_path / "module.pth")
    assert_refused(path, "expected a state dict of tensors, got .*ShuffleNetV2 .a whole module")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "expected a state dict, got list"),
        (torch.ones(1), "expected a state dict, got Tensor"),
        ({}, "expected a state dict, got an empty one"),
        ({"state_dict": {}}, "expected a state dict, got an empty one"),
        ({"a": torch.ones(1), "b": 1}, "expected a state dict of tensors, got int for key 'b'"),
        ({1: torch.ones(1)}, "expected a state dict of tensors, got Tensor for key 1"),
        ({"a": torch.eye(2).to_sparse()}, "expected a to be a dense tensor, got .*sparse_coo"),
        ({"a": torch.ones(1, device="meta")}, "expected a to be a dense tensor, got .* on meta"),
        (
            {"a": torch.ones(1)},
            f"expected a state dict of {SMALL} with fc.bias, got 1 tensor starting with a",
        ),
        ({"fc.bias": torch.ones(())}, f"expected a state dict of {SMALL} with fc.bias"),
        ({"fc.bias": torch.ones(0)}, "expected at least one class, got fc.bias"),
    ],
)
def test_invalid_state_dicts_are_rejected(tmp_path: Path, content: object, message: str) -> None:
    assert_refused(saved(content, tmp_path / "content.pth"), message)


@pytest.mark.parametrize(
    ("found", "arch", "message"),
    [
        ("resnet34", "resnet18", r"got unexpected keys layer1.2.conv1.weight and \d+ more"),
        ("resnet50", "resnet18", r"got unexpected keys layer1.0.conv3.weight and \d+ more"),
        ("resnet18", "resnet34", r"got missing keys layer1.2.conv1.weight and \d+ more"),
        (
            "resnet18",
            "vgg11",
            r"with classifier.6.bias, got 122 tensors starting with conv1.weight",
        ),
    ],
)
def test_a_checkpoint_of_another_architecture_is_rejected(
    tmp_path: Path, found: str, arch: str, message: str
) -> None:
    path = saved(hollow(found, classes=10), tmp_path / f"{found}.pth")
    assert_refused(path, f"expected a state dict of {arch}.* {message}", arch)


def test_a_missing_tensor_is_named(small_state: State, tmp_path: Path) -> None:
    del small_state["conv1.0.weight"]
    path = saved(small_state, tmp_path / "missing.pth")
    assert_refused(path, f"expected a state dict of {SMALL}, got missing key conv1.0.weight")


def test_an_unexpected_tensor_is_named(small_state: State, tmp_path: Path) -> None:
    small_state["head.weight"] = torch.ones(1)
    path = saved(small_state, tmp_path / "unexpected.pth")
    assert_refused(path, f"expected a state dict of {SMALL}, got unexpected key head.weight")


def test_a_wrong_shape_is_named(small_state: State, tmp_path: Path) -> None:
    small_state["conv1.0.weight"] = torch.ones(24, 1, 3, 3)
    path = saved(small_state, tmp_path / "shape.pth")
    message = r"expected conv1.0.weight of shape \(24, 3, 3, 3\), got \(24, 1, 3, 3\)"
    assert_refused(path, message)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_rejected(
    small_state: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    small_state["fc.weight"] = small_state["fc.weight"].to(dtype)
    path = saved(small_state, tmp_path / "integers.pth")
    assert_refused(path, f"expected fc.weight of a floating-point dtype, got {dtype}")


def test_floating_point_indices_are_rejected(tmp_path: Path) -> None:
    state = hollow("swin_t", classes=10)
    name = "features.1.0.attn.relative_position_index"
    state[name] = state[name].float()
    path = saved(state, tmp_path / "indices.pth")
    assert_refused(path, f"expected {name} of an integer dtype, got torch.float32", "swin_t")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_in_float32_are_rejected(
    small_state: State, tmp_path: Path, value: float
) -> None:
    small_state["fc.weight"] = small_state["fc.weight"].double()
    small_state["fc.weight"][3, 4] = value
    path = saved(small_state, tmp_path / "infinite.pth")
    assert_refused(path, "expected finite weights, got NaN or infinity in fc.weight")


def test_checkpoints_with_different_numbers_of_classes_are_rejected_naming_both(
    tmp_path: Path,
) -> None:
    first = saved(hollow(SMALL, classes=10), tmp_path / "ten.pth")
    second = saved(hollow(SMALL, classes=7), tmp_path / "seven.pth")
    expected = r"seven.pth: expected fc.weight of shape \(10, 1024\) like .*ten.pth, got \(7, "
    with pytest.raises(InputError, match=expected):
        weights.load_models([first, second], arch=SMALL, device="cpu")


def test_an_unknown_architecture_is_rejected_with_the_closest_names() -> None:
    with pytest.raises(InputError, match=r"arch: expected .*\(resnet18, .*got 'resnet81'"):
        weights.build_skeleton("resnet81", None)


def test_an_architecture_of_torchvision_that_does_not_take_one_tensor_is_rejected() -> None:
    with pytest.raises(InputError, match=r"arch: expected .* got 'fasterrcnn_resnet50_fpn'"):
        architectures.find("fasterrcnn_resnet50_fpn")


# Random models


def test_random_models_differ_and_are_reproducible_by_seed() -> None:
    models = weights.random_models(2, arch=SMALL, device=CPU, seed=4)
    again = weights.random_models(2, arch=SMALL, device=CPU, seed=4)
    shifted = weights.random_models(1, arch=SMALL, device=CPU, seed=5)
    assert_same_state(again[0], models[0].state_dict())
    assert_same_state(again[1], models[1].state_dict())
    assert_same_state(shifted[0], models[1].state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(models[0](x), models[1](x))


def test_random_models_have_torchvisions_initialization() -> None:
    (model,) = weights.random_models(1, arch="resnet18", device=CPU, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = torchvision.models.resnet18()
    assert_same_state(model, expected.state_dict())


@pytest.mark.parametrize("arch", [SMALL, "regnet_y_400mf"])
def test_random_models_leave_the_global_random_state_unchanged(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    weights.random_models(1, arch=arch, device=CPU, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


# Architectures


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_each_resnet_depth_has_torchvisions_tensors_and_no_memory(arch: str) -> None:
    skeleton = weights.build_skeleton(arch, 7)
    expected = on_meta(arch, classes=7).state_dict()
    found = skeleton.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert all(tensor.is_meta for tensor in found.values())
    assert not any(module.training for module in skeleton.modules())
    assert weights.num_classes(expected, arch=arch, source="a file") == 7


@pytest.mark.parametrize("arch", OTHER_ARCHITECTURES)
def test_the_classes_of_every_family_are_inferred_and_its_own_state_is_accepted(arch: str) -> None:
    state = weights.build_skeleton(arch, 7).state_dict()
    assert weights.num_classes(state, arch=arch, source="a file") == 7
    template = weights.build_skeleton(arch, 7)
    weights.check_state(state, template, arch=arch, source="a file", first_source=None)
    assert all(tensor.is_meta for tensor in state.values())


@pytest.mark.parametrize("arch", ["swin_t", "regnet_y_400mf"])
def test_a_family_that_computes_in_its_constructor_loads_exactly(
    arch: str,
) -> None:
    expected = trained(arch, classes=10, seed=1)
    (model,) = weights.models_from_state(
        dict(expected.state_dict()), arch=arch, source="memory", num_models=1, device=CPU
    )
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), expected(x))
