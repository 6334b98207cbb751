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
