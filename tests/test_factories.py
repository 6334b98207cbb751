"""Every tensor that the package makes names its device and dtype.

What users have set as defaults for their own code must not reach into ours.
"""

import ast
from pathlib import Path

import pytest

import ensemble

ROOT = Path(ensemble.__file__).parent
FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def unnamed(path: Path) -> list[str]:
    """The calls of torch's factories in a file that leave device or dtype to a default."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch" or name not in FACTORIES:
            continue
        named = {keyword.arg for keyword in node.keywords}
        missing = set() if None in named else {"device", "dtype"} - named
        found += [f"line {node.lineno}: torch.{name} without {', '.join(sorted(missing))}"] * bool(
            missing
        )
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_tensors_name_their_device_and_dtype(path: Path) -> None:
    assert unnamed(path) == []
