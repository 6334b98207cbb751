"""Saved forwards: equal to the last bit after loading, or a clear error; never code from a file."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensemble
from ensemble.artifacts import graph_format, tensor_file, version
from ensemble.errors import InputError, UnavailableError
from ensemble.strategies.forward import Forward
from tests.tiny import independent, tiny_models

SAVED = [
    *("lowered_vmap", "prepacked_loop", "prepacked_concurrent", "concurrent"),
    *("loop", "vmap", "folded_loop", "folded_vmap"),
]


class Net(nn.Module):
    """Convolutions that Winograd, direct and grouped kernels run, a shuffle, and odd operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc = nn.Linear(16, 5)
        self.scale = nn.Buffer(torch.rand(1, 16, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + torch.nn.functional.silu(self.second(x)) * self.scale
        x = torch.nn.functional.channel_shuffle(self.depthwise(x), 2)
        return self.fc(x.softmax(1).mean((2, 3)))


def nets(count: int) -> list[nn.Module]:
    models: list[nn.Module] = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = Net().eval().requires_grad_(False)
        model.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        models.append(model)
    return models


@pytest.mark.parametrize("models_of", [tiny_models, nets], ids=["tiny", "odd"])
@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_forward_gives_the_same_bits(name: str, models_of: Any, tmp_path: Path) -> None:
    forward = ensemble.build(name, models_of(3), torch.randn(2, 3, 16, 16), max_batch=6)
    forward.prepare([4, (3, 1, 3, 16, 16), (1, 3, 20, 12)])
    size = ensemble.save(forward, path := tmp_path / "winner.ensemble")
    assert size == path.stat().st_size
    loaded = ensemble.load(path)
    assert (loaded.strategy, loaded.num_models, loaded.max_batch) == (name, 3, 6)
    for shape in [(2, 3, 16, 16), (4, 3, 16, 16), (3, 1, 3, 16, 16), (1, 3, 20, 12)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), forward(x)), shape


@pytest.mark.parametrize("models_of", [tiny_models, nets], ids=["tiny", "odd"])
def test_a_loaded_forward_takes_other_batches_or_says_that_it_has_no_plan(
    models_of: Any, tmp_path: Path
) -> None:
    models = models_of(2)
    forward = ensemble.build("lowered_vmap", models, torch.randn(2, 3, 16, 16), max_batch=6)
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    loaded, x = ensemble.load(path), torch.randn(5, 3, 16, 16)
    if models_of is tiny_models:
        torch.testing.assert_close(loaded(x), independent(models, x), rtol=1e-4, atol=1e-4)
    else:  # softmax is left to torch, in the size of the example
        with pytest.raises(UnavailableError, match=r"no plan for inputs of shape \(5, 3, 16, 16\)"):
            loaded(x)
    with pytest.raises(UnavailableError, match=r"call forward.prepare before it is saved"):
        loaded(torch.randn(2, 3, 24, 24))
    with pytest.raises(ValueError, match="up to 6 images a model, got 7"):
        loaded(torch.randn(7, 3, 16, 16))


class Centered(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x - x.mean(0))
        return found


def test_models_whose_images_depend_on_each_other_take_planned_batches_only(
    tmp_path: Path,
) -> None:
    models: list[nn.Module] = [Centered(net).eval() for net in tiny_models(2)]
    forward = ensemble.build("lowered_vmap", models, torch.randn(3, 3, 8, 8), max_batch=4)
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    loaded = ensemble.load(path)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(x), forward(x))
    with pytest.raises(UnavailableError, match="no plan"):
        loaded(x[:2])


def test_an_exchanged_model_is_saved(tmp_path: Path) -> None:
    *models, new = tiny_models(3)
    forward = ensemble.build("lowered_vmap", models, torch.randn(1, 3, 8, 8))
    forward.replace(1, new)
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    x = torch.randn(1, 3, 8, 8)
    found = ensemble.load(path)(x)
    torch.testing.assert_close(found, independent([models[0], new], x), rtol=1e-4, atol=1e-4)


def test_what_best_has_tried_is_in_the_report_of_the_loaded_forward(tmp_path: Path) -> None:
    forward = ensemble.build("best", tiny_models(2), torch.randn(1, 3, 8, 8))
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    loaded = ensemble.load(path)
    assert loaded.strategy == "best"
    assert loaded.report.strategy == forward.report.strategy
    assert loaded.report.times_s == forward.report.times_s
    assert loaded.report.kernels == forward.report.kernels


LOADER = """
import pickle, sys, torch
import ensemble.compiler.runtime.entry_points as kernels
kernels.load()  # numba's own cache of them on this machine is a pickle
def refuse(*arguments, **options): raise AssertionError("a pickle is read")
pickle.loads = pickle.load = pickle.Unpickler = torch.load = refuse
import ensemble
forward = ensemble.load(sys.argv[1])
x = torch.arange(3 * 64.0).reshape(1, 3, 8, 8).sin()
print(forward(x).double().sum().item().hex())
assert "torch._dynamo" not in sys.modules, "it imports the tracer"
assert "torchvision" not in sys.modules
"""


def test_loading_in_another_process_neither_traces_nor_reads_a_pickle(tmp_path: Path) -> None:
    x = torch.arange(3 * 64.0).reshape(1, 3, 8, 8).sin()
    forward = ensemble.build("lowered_vmap", tiny_models(3), x)
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    root = Path(ensemble.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float.fromhex(done.stdout.strip()) == forward(x).double().sum().item()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    forward = ensemble.build("lowered_vmap", tiny_models(2), torch.randn(1, 3, 8, 8))
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    return path


@pytest.mark.parametrize("where", ["header", "tensor", "end", "cut in the header", "empty"])
def test_a_damaged_file_is_refused(where: str, saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    if where == "header":
        data[60] ^= 1
    elif where == "tensor":
        data[-200] ^= 1
    elif where == "end":
        del data[-100:]
    elif where == "cut in the header":
        del data[100:]
    else:
        data.clear()
    saved.write_bytes(data)
    with pytest.raises(InputError, match=f"{saved}: expected .*(damaged|empty)"):
        ensemble.load(saved)


def test_every_flipped_bit_of_a_tensor_or_the_header_is_noticed(saved: Path) -> None:
    data, generator = saved.read_bytes(), torch.Generator().manual_seed(0)
    found = tensor_file.read(saved)
    before = [tensor.clone() for tensor in found.tensors]
    for position in torch.randint(len(data), (60,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        saved.write_bytes(flipped)
        try:
            again = tensor_file.read(saved)
        except InputError:
            continue
        assert again.content == found.content  # it lies in the padding
        assert all(torch.equal(*pair) for pair in zip(again.tensors, before, strict=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 a checkpoint of torch", "got another kind of file"),
        (pickle.dumps({"a": 1}), "got another kind of file"),
        (b"ENSEMBLE\x09\x00\x00\x00" + bytes(8), "version 1 of the format, got 9"),
    ],
)
def test_another_kind_of_file_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "winner.ensemble"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        ensemble.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file exists"):
        ensemble.load(tmp_path / "missing.ensemble")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vectors", "128-bit vector", "expected a CPU with .* instructions, got .* 128-bit vector"),
        ("torch", "1.0", "expected torch .*, got a file of torch 1.0"),
        ("package", "0", "expected a file of this version of the package"),
    ],
)
def test_a_file_of_another_version_or_cpu_is_refused(
    name: str, value: str, message: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tensor_file.read(saved)
    found.content["version"][name] = value
    tensor_file.write(saved, found.content, found.tensors)
    with pytest.raises(InputError, match=f"{saved}: {message}"):
        ensemble.load(saved)


def test_the_version_changes_with_the_sources_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(version, "_SOURCES", tmp_path)
    version._digest.cache_clear()
    before = version._digest()
    (tmp_path / "compiler" / "a.py").write_text("x = 2\n")
    version._digest.cache_clear()
    try:
        assert version._digest() != before
    finally:
        version._digest.cache_clear()


class BranchesOnBatch(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return 2 * found if len(x) > 3 else found


def test_a_loaded_forward_refuses_batches_at_which_the_models_take_another_branch(
    tmp_path: Path,
) -> None:
    models: list[nn.Module] = [BranchesOnBatch(net).eval() for net in tiny_models(2)]
    forward = ensemble.build("lowered_vmap", models, torch.randn(2, 3, 8, 8), max_batch=6)
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    loaded = ensemble.load(path)
    for batch_size in (1, 2, 3):
        x = torch.randn(batch_size, 3, 8, 8)
        torch.testing.assert_close(loaded(x), independent(models, x), rtol=1e-4, atol=1e-4)
    for batch_size in (4, 5, 6):
        with pytest.raises(UnavailableError, match="no plan"):
            loaded(torch.randn(batch_size, 3, 8, 8))


def _set(content: Any, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        content = content[int(part) if part.isdecimal() else part]
    content[int(last) if last.isdecimal() else last] = value


STEP = "plans.0.graph.body.0.target.steps.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("plans", None), ("plans", []), ("shape", "x"), ("dtype", "torch.nn"), ("num_models", 9)),
        *(("batch_sizes", 3), ("report", []), ("version", {}), ("plans.0.mode", "none")),
        *(
            (f"{STEP}.weight", 999),
            (f"{STEP}.weight", 1),
            (f"{STEP}.bias", 0),
            (f"{STEP}.out", 1e300),
        ),
        *((f"{STEP}.kind", 77), (f"{STEP}.geometry.stride", [0, 1]), (f"{STEP}.x", -5)),
        *((f"{STEP}.geometry.size", [10**9, 8]), (f"{STEP}.geometry.channels", 4096)),
        ("plans.0.graph.body.0.target.num_models", 100000),
        ("plans.0.graph.output", 4321),
    ],
)
def test_content_that_save_does_not_write_is_refused_in_one_line(
    path: str, value: Any, saved: Path
) -> None:
    found = tensor_file.read(saved)
    _set(found.content, path, value)
    tensor_file.write(saved, found.content, found.tensors)
    with pytest.raises(InputError, match="expected") as error:
        ensemble.load(saved)(torch.randn(1, 3, 8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", ["{", "[]", "null", "[" * 100_000, '{"tensors": [{}]}'])
def test_a_header_that_is_no_header_is_refused(header: str, saved: Path) -> None:
    data = header.encode()
    saved.write_bytes(struct.pack("<8sIII", b"ENSEMBLE", 1, len(data), zlib.crc32(data)) + data)
    with pytest.raises(InputError, match="damaged"):
        ensemble.load(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bytes", 0), ("offset", -64), ("stride", [10**6]), ("shape", [-1]), ("shape", [10**12])],
)
def test_a_tensor_that_is_larger_than_its_bytes_is_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    tensor_file.write(path := tmp_path / "file", {}, [torch.randn(8)])
    data = path.read_bytes()
    length = struct.unpack("<8sIII", data[:20])[2]
    header = json.loads(data[20 : 20 + length])
    header["tensors"][0][name] = value
    header["tensors"][0]["crc32"] = (
        zlib.crc32(b"") if name == "bytes" else header["tensors"][0]["crc32"]
    )
    changed = json.dumps(header).encode()
    prefix = struct.pack("<8sIII", b"ENSEMBLE", 1, len(changed), zlib.crc32(changed))
    path.write_bytes((prefix + changed).ljust(4096, b"\0") + data[4096:])
    with pytest.raises(InputError, match="damaged"):
        tensor_file.read(path)


@pytest.mark.parametrize("where", ["/dev/full", "folder", "folder/none/"])
def test_only_a_file_is_replaced(where: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    forward = ensemble.build("lowered_vmap", tiny_models(1), torch.randn(1, 3, 8, 8))
    path = where if where.startswith("/") else f"{tmp_path}/{where}"
    with pytest.raises(InputError, match="expected"):
        ensemble.save(forward, path)
    assert not Path("/dev/full").is_file()


FORKS = """
import os, sys, torch, ensemble
forward, x = ensemble.load(sys.argv[1]), torch.randn(1, 3, 64, 64)
expected = forward(x)
if (child := os.fork()) == 0:
    os._exit(0 if torch.equal(forward(x), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("name", ["folded_loop", "lowered_vmap"])
def test_a_forked_process_may_call_a_loaded_forward(name: str, tmp_path: Path) -> None:
    forward = ensemble.build(name, nets(2), torch.randn(1, 3, 64, 64))
    ensemble.save(forward, path := tmp_path / "winner.ensemble")
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(path)],
        env=os.environ | {"PYTHONPATH": str(Path(ensemble.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.out",
        "aten.zero_.default",
        "aten.from_file.default",
        "os.system",
        "aten.nothing.default",
        "function eval",
        "x",
    ],
)
def test_a_file_may_not_name_other_functions_than_operators(target: str, saved: Path) -> None:
    found = tensor_file.read(saved)
    body = found.content["plans"][0]["graph"]["body"]
    body.append({"target": target, "args": ["x"], "kwargs": {}, "out": 99})
    tensor_file.write(saved, found.content, found.tensors)
    with pytest.raises(InputError, match="expected operators that this version has, got"):
        ensemble.load(saved)


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    path = tmp_path / "winner.ensemble"
    chunked = ensemble.build("compiled_loop", tiny_models(2), torch.randn(1, 3, 8, 8))
    with pytest.raises(UnavailableError, match="a forward by compiled_loop on cpu cannot be saved"):
        ensemble.save(chunked, path)
    forward = ensemble.build("lowered_vmap", tiny_models(2), torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="expected a folder at"):
        ensemble.save(forward, tmp_path / "missing" / "winner.ensemble")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_forward_cannot_exchange_models(saved: Path) -> None:
    loaded = ensemble.load(saved)
    with pytest.raises(UnavailableError, match="loaded from a file, without the code"):
        loaded.replace(0, tiny_models(1)[0])


def test_a_forward_whose_graph_gives_other_bits_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble.strategies import saved_run

    forward = ensemble.build("loop", tiny_models(2), torch.randn(1, 3, 8, 8))
    original = saved_run.of_modules
    monkeypatch.setattr(saved_run, "of_modules", lambda m, x, mode: original(m[::-1], x, mode))
    with pytest.raises(UnavailableError, match="gives other results in the last digits"):
        ensemble.save(forward, tmp_path / "winner.ensemble")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_weight_may_be_written_to_without_changing_the_file(saved: Path) -> None:
    data = saved.read_bytes()
    for tensor in tensor_file.read(saved).tensors:
        tensor.zero_()
    assert saved.read_bytes() == data


def test_strides_and_dtypes_of_tensors_are_kept(tmp_path: Path) -> None:
    tensors = [
        torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.arange(4, dtype=torch.int64),
        torch.randn(3, 4).bfloat16().t(),
        torch.empty(0, 3),
        torch.tensor(2.5, dtype=torch.float16),
        torch.randn(6)[::2],
        torch.randn(1, 4).expand(3, 4),
        torch.tensor([True, False]),
    ]
    path = tmp_path / "tensors"
    tensor_file.write(path, {"a": [1, None]}, tensors)
    found = tensor_file.read(path)
    assert found.content == {"a": [1, None]}
    for before, after in zip(tensors, found.tensors, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
        assert not after.numel() or after.data_ptr() % 64 == 0
    assert found.tensors[0].stride() == tensors[0].stride()
    assert found.tensors[2].stride() == tensors[2].stride()


def test_a_header_whose_checksum_holds_but_whose_tensors_lie_outside_is_refused(
    saved: Path,
) -> None:
    header = json.dumps(
        {
            "content": {},
            "tensors": [
                {
                    "dtype": "float32",
                    "shape": [9],
                    "stride": [1],
                    "offset": 0,
                    "bytes": 36,
                    "crc32": 0,
                }
            ],
        }
    ).encode()
    prefix = struct.pack("<8sIII", b"ENSEMBLE", 1, len(header), zlib.crc32(header))
    saved.write_bytes(prefix + header)
    with pytest.raises(InputError, match="damaged"):
        tensor_file.read(saved)


def test_all_arguments_of_operators_are_kept() -> None:
    arguments = [
        *(None, True, 3, -1.5, float("inf"), "mean", torch.float32, torch.channels_last),
        *([1, [2, None]], torch.device("cpu")),
    ]
    for argument in arguments:
        encoded = json.loads(json.dumps(graph_format._encode(argument)))
        assert graph_format._decode(encoded) == argument
    with pytest.raises(UnavailableError, match="an argument is a complex"):
        graph_format._encode(1j)


def test_a_saved_forward_of_the_class_is_a_forward(saved: Path) -> None:
    loaded = ensemble.load(saved)
    assert isinstance(loaded, Forward)
    assert repr(loaded).startswith("<lowered_vmap forward of 2 models, x up to (1, 3, 8, 8)")
    assert loaded.memory_bytes
