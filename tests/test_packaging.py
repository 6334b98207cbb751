"""What `pip install .` brings: what the program needs, and not the tools of its tests."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEST_TOOLS = {"pytest", "pytest-xdist", "hypothesis"}


def requirements(name: str) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line for line in lines if line}


def package(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0]


def test_the_package_needs_what_requirements_have_but_for_the_tools_of_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = requirements("requirements.txt")
    tools = {requirement for requirement in every if package(requirement) in TEST_TOOLS}
    assert {package(tool) for tool in tools} == TEST_TOOLS
    assert set(project["dependencies"]) == every - tools


def test_each_extra_has_the_requirements_of_its_file_and_timm_is_in_no_other() -> None:
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    files = {name: extra["file"] for name, extra in dynamic["optional-dependencies"].items()}
    assert files == {name: [f"requirements-{name}.txt"] for name in ("peers", "peers-cuda", "timm")}
    assert requirements("requirements-timm.txt") == {"timm>=1.0"}
    for name in ("requirements.txt", "requirements-peers.txt", "requirements-peers-cuda.txt"):
        assert "timm" not in map(package, requirements(name))
