"""torchvision is imported without torch._dynamo, which loop and vmap never import.

A torchvision that imports other names from it still works.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_vmap

ROOT = Path(resnet_vmap.__file__).parent
SERVES = """
import sys
import torch
torch.set_num_threads(1)
from ensemble import strategies
from ensemble.models import weights
models = weights.random_models(2, arch="resnet18", device=torch.device("cpu"), seed=0)
x = torch.randn(1, 3, 64, 64)
logits = [strategies.build(name, models, x)(x) for name in ("loop", "vmap")]
assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)
print({"torch._dynamo", "sympy"} & sys.modules.keys() or False)
"""


def run(code: str, *path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_loop_and_vmap_never_import_dynamo() -> None:
    assert run(SERVES) == "False"


@pytest.mark.slow
def test_the_lazily_imported_function_is_the_real_one() -> None:
    code = "from ensemble.models.vision import torchvision as t; import sys; "
    asked = "print(t.ops.roi_align.__module__, 'torch._dynamo' in sys.modules); "
    called = "m = sys.modules['torchvision.ops.roi_align']; print(m.is_compile_supported('cpu'))"
    assert run(code + asked + called).split() == ["torchvision.ops.roi_align", "False", "True"]


@pytest.mark.slow
def test_a_torchvision_that_imports_other_names_gets_the_real_module(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from torch._dynamo.utils import counters, is_compile_supported\n"
    )
    code = "from ensemble.models.vision import torchvision as t; print(type(t.counters).__name__)"
    assert run(code, tmp_path) == "defaultdict"
