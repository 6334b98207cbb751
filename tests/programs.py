"""Test modules that are programs too: `python -m tests.NAME`."""

import subprocess
import sys
from pathlib import Path


def assert_passes(module: str) -> None:
    """Run a module in a separate process: a wrong kernel may hang or crash it."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
