"""The folders are the architecture: what each wing may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ensemble

ROOT = Path(ensemble.__file__).parent

# From the ground up: a wing imports those before it, and itself.
GROUND = ("errors", "statistics", "files", "formatting", "gc_pause", "user_functions")
WINGS = (
    *(*GROUND, "machine", "models", "compiler", "artifacts"),
    *("strategies/__init__", "strategies", "bench"),
)
FREE_OF_TORCH = (
    *(*GROUND, "strategies/__init__", "artifacts/formats"),
    *("bench/case", "bench/cli", "bench/config", "bench/environment", "bench/load/record"),
    *("bench/measurement", "bench/report", "bench/result_file", "bench/summary"),
)


def wing(module: str) -> str:
    """The wing of `ensemble.x.y`: a folder, or a module on the ground floor."""
    parts = module.split(".")[1:]
    if parts == ["strategies"]:
        return "strategies/__init__"  # the registry: names, and no code of theirs
    return parts[0] if parts else ""


def is_free_of_torch(module: str) -> bool:
    """Must `ensemble.x.y` be imported without torch?"""
    path = "/".join(module.split(".")[1:])
    return wing(module) in FREE_OF_TORCH or path.startswith(FREE_OF_TORCH)


def imported(path: Path) -> set[str]:
    """The modules of `ensemble` that a file names, also those within its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if (ROOT.parent / name.replace(".", "/")).is_dir()}
            modules |= {
                name
                for name in names
                if (ROOT.parent / name.replace(".", "/")).with_suffix(".py").exists()
            }
            found |= modules or {node.module}
    return {name for name in found if name.startswith("ensemble.")}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def place(path: Path) -> str:
    module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    return wing(module.removesuffix(".__init__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_from_a_wing_above_its_own(path: Path) -> None:
    allowed = WINGS[: WINGS.index(place(path)) + 1]
    if place(path) == "strategies/__init__":  # a registry imports its builders when they are asked
        allowed = (*allowed, "strategies")
    assert {wing(name) for name in imported(path)} - set(allowed) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_records_options_and_reports_know_no_torch(path: Path) -> None:
    if not is_free_of_torch(".".join(path.relative_to(ROOT.parent).with_suffix("").parts)):
        return
    names = set()
    for node in ast.parse(path.read_text()).body:  # what stands in functions is imported later
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    assert not {"torch", "torchvision"} & {name.partition(".")[0] for name in names}


def test_every_file_of_tests_says_what_it_holds() -> None:
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


IMPORTS = """
import sys
import ensemble.bench.executors.device_probe, ensemble.bench.session
print("torch._dynamo" in sys.modules)
import ensemble.strategies.lowered
print("torch._dynamo" in sys.modules)
"""


def test_dynamo_is_imported_by_what_traces_and_by_nothing_that_every_run_imports() -> None:
    """It takes a second: of the program if imported early, and of a timed build if late."""
    command = [sys.executable, "-c", IMPORTS]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert answer.stdout.split() == ["False", "True"]
