"""Checkpoint files by their content: safetensors under any name, parts with an index, damage."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ensemble.errors import InputError
from ensemble.models import checkpoints
from tests.checkpoints import SMALL, trained

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, Tensor]
STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([7.0, 8.0])}


def assert_same(found: State, expected: State = STATE) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_refused(path: Path, message: str) -> None:
    """The message is one line that begins with the file's name; `message` is a pattern."""
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: ") + message) as caught:
        checkpoints.read(path)
    assert len(str(caught.value).splitlines()) == 1


# By content


@pytest.mark.parametrize("name", ["3a" * 32, "model.bin", "model.pth", "model.safetensors"])
def test_safetensors_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    assert_same(checkpoints.read(tmp_path / name))


@pytest.mark.parametrize("name", ["3a" * 32, "model.safetensors", "model.index.json"])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_file_of_torch_save_is_read_under_any_name(
    tmp_path: Path, name: str, new_format: bool
) -> None:
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=new_format)
    assert_same(checkpoints.read(tmp_path / name))


@pytest.mark.parametrize("name", ["3a" * 32, "model.safetensors"])
@pytest.mark.parametrize("kept", [9, 40, -1])
def test_truncated_safetensors_are_named_so_under_any_name(
    tmp_path: Path, name: str, kept: int
) -> None:
    save_file(STATE, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    message = "expected a safetensors file, got a truncated or corrupted file .*; download"
    assert_refused(tmp_path / name, message)


def test_safetensors_of_a_dtype_that_torch_does_not_know_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert_refused(path, "expected a safetensors file, got .*corrupted")


# Parts with an index


def parts(folder: Path, *, suffix: str = ".safetensors") -> Path:
    """A checkpoint in two parts, as transformers writes it; the path of its index."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number, (name, tensor) in enumerate(STATE.items(), 1):
        weight_map[name] = f"{stem}-{number:05d}-of-00002{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save({name: tensor}, folder / weight_map[name])
    path = folder / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_parts_are_read_by_their_index(tmp_path: Path, suffix: str) -> None:
    assert_same(checkpoints.read(parts(tmp_path, suffix=suffix)))


def test_an_index_is_known_by_its_content(tmp_path: Path) -> None:
    path = parts(tmp_path).rename(tmp_path / ("3a" * 32))
    assert_same(checkpoints.read(path))


def test_one_part_by_itself_is_refused_with_the_name_of_its_index(tmp_path: Path) -> None:
    index = parts(tmp_path)
    part = tmp_path / "model-00001-of-00002.safetensors"
    assert_refused(
        part, f"expected a complete checkpoint, got one of its 2 shards.* {re.escape(str(index))}"
    )


def test_without_an_index_a_number_of_several_is_only_a_name(tmp_path: Path) -> None:
    path = tmp_path / "fold-00001-of-00005.safetensors"
    save_file(STATE, path)
    assert_same(checkpoints.read(path))


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    index, part = parts(tmp_path), tmp_path / "model-00002-of-00002.safetensors"
    part.unlink()
    with pytest.raises(InputError, match=re.escape(f"{part}: ") + ".*no such file exists"):
        checkpoints.read(index)


def test_a_tensor_that_is_not_in_its_part_is_named(tmp_path: Path) -> None:
    index, part = parts(tmp_path), tmp_path / "model-00002-of-00002.safetensors"
    save_file({"other": torch.ones(1)}, part)
    message = re.escape(f"{part}: expected a shard with fc.bias, as in {index.name}")
    with pytest.raises(InputError, match=message):
        checkpoints.read(index)


@pytest.mark.parametrize("file", ["../secret.bin", "/etc/passwd", "", 3, None])
def test_an_index_names_files_beside_it_only(tmp_path: Path, file: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    assert_refused(path, f"expected names of files in the same directory, got {file!r}")


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": 3}', "{}", '{"a": "b'])
def test_json_that_is_no_index_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert_refused(path, "expected a checkpoint file, got a JSON document")


# Within the file


def test_of_several_state_dicts_none_is_guessed(tmp_path: Path) -> None:
    path = tmp_path / "gan.pth"
    torch.save({"epoch": 3, "generator": STATE, "discriminator": STATE}, path)
    assert_refused(path, r"expected one .* got 2 state dicts \(generator, discriminator\)")


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    path = tmp_path / "cycle.pth"
    torch.save(content, path)
    assert_refused(path, "expected a state dict of tensors, got int for key 'epoch'")


def test_weights_that_are_numpy_arrays_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pth"
    torch.save({name: tensor.numpy() for name, tensor in STATE.items()}, path)
    assert_refused(path, "expected a state dict of tensors, got numpy array for key 'fc.weight'")


class Classifier(nn.Module):
    """What can be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_state_dict_is_refused_by_name(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(Classifier(), {nn.Linear})
    path = tmp_path / "quantised.pth"
    torch.save(quantised.state_dict(), path)
    assert_refused(path, r"expected .*, got a quantized one \(fc\._packed.*\); save the state dict")
    torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, path)
    assert_refused(path, r"expected .*, got a quantized one \(a\)")


# Damaged


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_damaged_file_is_read_or_is_one_line(tmp_path: Path, kind: str) -> None:
    path, drawn, messages = tmp_path / "checkpoint", random.Random(0), list[str]()
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"model": STATE, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(drawn.choice([1, 2, 8])):
            changed[drawn.randrange(len(changed))] = drawn.randrange(256)
        path.write_bytes(
            changed[: drawn.randrange(1, len(changed))] if drawn.random() < 0.2 else changed
        )
        try:
            checkpoints.read(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert [m for m in messages if not m.startswith(f"{path}: ") or len(m.splitlines()) > 1] == []


def test_a_published_model_is_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    state = trained(SMALL, classes=10, seed=0).state_dict()
    save_file(state, tmp_path / "blob")
    torch.save(state, tmp_path / "zip")
    assert_same(checkpoints.read(tmp_path / "blob"), checkpoints.read(tmp_path / "zip"))
