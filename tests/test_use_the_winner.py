"""The page `ensemble/strategies/README.md`: its Python is executed, block after block."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import ensemble
from ensemble.models.vision import torchvision
from tests.artifacts import proto_schema

PAGE = Path(ensemble.__file__).parent / "strategies" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
*IN_ORDER, TRITON = BLOCKS


def run(block: str, names: dict[str, Any]) -> None:
    """Execute a block, on small images."""
    exec(compile(block.replace("224", "64"), str(PAGE), "exec"), names)


def test_every_line_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), f"{name}.pth")
    names: dict[str, Any] = {}
    for block in IN_ORDER:
        run(block, names)
    models, x = names["models"], torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        served = torch.stack([models[0](x), names["retrained"](x)])
        of_models = torch.stack([model(x) for model in models])
    torch.testing.assert_close(names["forward"](x), served, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(names["served"](x), served, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(names["exported"](x), of_models, rtol=1e-3, atol=1e-4)
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        pytest.skip("the block on Triton needs the packages of requirements-peers.txt")
    run(TRITON, names)
    model = tmp_path / "triton_repository" / "resnet_x2"
    found = proto_schema.parse((model / "config.pbtxt").read_text())
    assert found.backend == "onnxruntime"
    assert (model / "1" / "model.onnx").stat().st_size > 0


def test_the_page_has_a_block_for_each_use() -> None:
    text = "".join(BLOCKS)
    calls = ["build", "prepare", "ThreadPoolExecutor", "replace", "save", "load", "export"]
    assert [call for call in calls if call not in text] == []
    assert "triton_repository" in TRITON
