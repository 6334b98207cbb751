"""Checkpoint files: formats detected by content, shards with an index, corrupted files."""

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
    """The error is one line: the file name, then the pattern `message`."""
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
def test_torch_save_files_are_read_under_any_name(
    tmp_path: Path, name: str, new_format: bool
) -> None:
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=new_format)
    assert_same(checkpoints.read(tmp_path / name))


@pytest.mark.parametrize("name", ["3a" * 32, "model.safetensors"])
@pytest.mark.parametrize("kept", [9, 40, -1])
def test_truncated_safetensors_are_reported_under_any_name(
    tmp_path: Path, name: str, kept: int
) -> None:
    save_file(STATE, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    message = "expected a safetensors file, got a truncated or corrupted file .*; download"
    assert_refused(tmp_path / name, message)


def test_safetensors_of_an_unsupported_dtype_are_rejected(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert_refused(path, "expected a safetensors file, got .*corrupted")


# Shards with an index


def write_shards(folder: Path, *, suffix: str = ".safetensors") -> Path:
    """Write a checkpoint in two shards, as transformers does; returns the path of its index."""
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
def test_shards_are_read_through_their_index(tmp_path: Path, suffix: str) -> None:
    assert_same(checkpoints.read(write_shards(tmp_path, suffix=suffix)))


def test_an_index_is_detected_by_content(tmp_path: Path) -> None:
    path = write_shards(tmp_path).rename(tmp_path / ("3a" * 32))
    assert_same(checkpoints.read(path))


def test_a_single_shard_is_rejected_and_the_error_names_the_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    part = tmp_path / "model-00001-of-00002.safetensors"
    assert_refused(
        part, f"expected a complete checkpoint, got one of its 2 shards.* {re.escape(str(index))}"
    )


def test_without_an_index_a_shard_like_name_is_an_ordinary_name(tmp_path: Path) -> None:
    path = tmp_path / "fold-00001-of-00005.safetensors"
    save_file(STATE, path)
    assert_same(checkpoints.read(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_is_rejected_and_the_error_names_the_file_to_pass(
    tmp_path: Path, suffix: str
) -> None:
    message = "expected a checkpoint file, got a directory"
    assert_refused(tmp_path, f"{message} or a device")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").touch()
    whole = tmp_path / "model.safetensors"
    save_file(STATE, whole)
    assert_refused(tmp_path, f"{message}; pass {re.escape(str(whole))} instead$")
    index = write_shards(tmp_path, suffix=suffix)
    assert_refused(tmp_path, f"{message}; pass {re.escape(str(index))} instead$")


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert_same(checkpoints.read(index))


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_rejected_with_the_function_that_converts_it(
    tmp_path: Path,
) -> None:
    from torch.distributed.checkpoint import format_utils, state_dict_saver

    folder, whole = tmp_path / "step", tmp_path / "whole.pth"
    state_dict_saver.save(dict(STATE), checkpoint_id=folder, no_dist=True)
    converter = "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
    advice = f"convert it with {converter}({str(folder)!r}, OTHER)"
    for path, what in (
        (folder, "the folder"),
        (folder / "__0_0.distcp", "one file"),
        (folder / ".metadata", "one file"),
    ):
        message = f"expected a checkpoint file, got {what} of a torch.distributed.checkpoint; "
        assert_refused(path, re.escape(message + advice))
    format_utils.dcp_to_torch_save(folder, whole)
    assert_same(checkpoints.read(whole))
    save_file(STATE, tmp_path / "mine.distcp")
    assert_same(checkpoints.read(tmp_path / "mine.distcp"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index, part = write_shards(tmp_path), tmp_path / "model-00002-of-00002.safetensors"
    part.unlink()
    with pytest.raises(InputError, match=re.escape(f"{part}: ") + ".*no such file exists"):
        checkpoints.read(index)


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    index, part = write_shards(tmp_path), tmp_path / "model-00002-of-00002.safetensors"
    save_file({"other": torch.ones(1)}, part)
    message = re.escape(f"{part}: expected a shard with fc.bias, as in {index.name}")
    with pytest.raises(InputError, match=message):
        checkpoints.read(index)


@pytest.mark.parametrize("file", ["../secret.bin", "/etc/passwd", "", 3, None])
def test_an_index_may_only_name_files_in_its_directory(tmp_path: Path, file: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    assert_refused(path, f"expected names of files in the same directory, got {file!r}")


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": 3}', "{}", '{"a": "b'])
def test_json_that_is_not_an_index_is_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert_refused(path, "expected a checkpoint file, got a JSON document")


# Within a file


def test_several_state_dicts_are_ambiguous_and_rejected(tmp_path: Path) -> None:
    path = tmp_path / "gan.pth"
    torch.save({"epoch": 3, "generator": STATE, "discriminator": STATE}, path)
    assert_refused(path, r"expected one .* got 2 state dicts \(generator, discriminator\)")


def test_a_self_referential_file_is_rejected(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    path = tmp_path / "cycle.pth"
    torch.save(content, path)
    assert_refused(path, "expected a state dict of tensors, got int for key 'epoch'")


def test_numpy_weights_are_rejected_with_their_key(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pth"
    torch.save({name: tensor.numpy() for name, tensor in STATE.items()}, path)
    assert_refused(path, "expected a state dict of tensors, got numpy array for key 'fc.weight'")


class Classifier(nn.Module):
    """A model to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_state_dict_is_rejected_with_its_key(tmp_path: Path) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(Classifier(), {nn.Linear})
    path = tmp_path / "quantized.pth"
    torch.save(quantized.state_dict(), path)
    assert_refused(path, r"expected .*, got a quantized one \(fc\._packed.*\); save the state dict")
    torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, path)
    assert_refused(path, r"expected .*, got a quantized one \(a\)")


# Corrupted


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_corrupted_file_is_read_or_raises_one_line(tmp_path: Path, kind: str) -> None:
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


def test_safetensors_and_torch_save_yield_the_same_state(tmp_path: Path) -> None:
    state = trained(SMALL, classes=10, seed=0).state_dict()
    save_file(state, tmp_path / "blob")
    torch.save(state, tmp_path / "zip")
    assert_same(checkpoints.read(tmp_path / "blob"), checkpoints.read(tmp_path / "zip"))
