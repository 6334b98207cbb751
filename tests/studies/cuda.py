"""The page of a run on a GPU: `python -m tests.studies.cuda FOLDER`, what `tests.gpu_run` left.

It copies the result files to tests/data/cuda/, and writes the page and its pictures there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gpu_run import LINES, STEPS

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "tests" / "data" / "cuda"
Line = Mapping[str, Any]


def read(folder: Path) -> list[Line]:
    """The lines of a run; one that was cut off by its end is left out."""
    lines = []
    for text in (folder / LINES).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def page(lines: Sequence[Line]) -> str:
    """The page of a run."""
    parts = [
        "# A run on a GPU",
        "",
        f"`python -m tests.gpu_run`, then `python -m tests.studies.cuda`. {_machine(lines)}",
        "",
        *_section("Steps", _steps(lines)),
        *_section("Strategies, ResNet-18, batch 1, 224 px: medians of a call in ms", _times(lines)),
        *_section("Break-even: the fewest models at which vmap is faster", _break_even(lines)),
        *_section("The implicit GEMM by layer: the fastest tile", _layers(lines)),
        *_section("Limits of the device", _ceilings(lines)),
        *_section("What commands printed", _outputs(lines)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, body: Iterable[str]) -> list[str]:
    rows = list(body)
    return [f"## {title}", "", *rows, ""] if rows else []


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return []
    lines = [header, ["---"] * len(header), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def _machine(lines: Sequence[Line]) -> str:
    found = next((line["nvidia_smi"] for line in lines if line.get("nvidia_smi")), "")
    versions: Line = next((line["versions"] for line in lines if "versions" in line), {})
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{(found.strip().splitlines() or ['unknown GPU'])[-1]}; {known}."


def _steps(lines: Sequence[Line]) -> list[str]:
    ended = {line["step"]: line for line in lines if "status" in line}
    rows = [
        (name, ended[name]["status"], f"{ended[name].get('seconds', 0):.0f} s")
        if name in ended
        else (name, "not begun", "")
        for name in STEPS
    ]
    return _table(("step", "status", "took"), rows)


def _of(lines: Sequence[Line], *steps: str) -> list[Line]:
    """The measurements of steps, and their errors."""
    return [line for line in lines if line["step"] in steps and "strategy" in line]


def _times(lines: Sequence[Line]) -> list[str]:
    header = (
        *("dtype", "N", "strategy", "GPU", "wall", "GPU, L2 flushed", "with copies, pinned"),
        *("reserved MB", "error", "built in s"),
    )
    rows = []
    for line in _of(lines, "strategies", "streams"):
        name = line["strategy"] + (f", {line['streams']} streams" if "streams" in line else "")
        about = line["dtype"], line["num_models"], f"`{name}`"
        if "error_text" in line:
            rows.append((*about, line["error_text"].splitlines()[0], *[""] * 6))
            continue
        reserved = line.get("reserved_bytes")
        rows.append(
            (
                *about,
                *(_ms(line.get(key)) for key in ("event_s", "wall_s", "cold_event_s", "pinned_s")),
                "" if reserved is None else f"{reserved / 1e6:,.0f}",
                f"{line['error']:.0e}",
                f"{line['build_s']:.1f}",
            )
        )
    return _table(header, rows)


def _break_even(lines: Sequence[Line]) -> list[str]:
    """By wall time, over the loop and over the captured loop."""
    times = {
        (line["dtype"], line["strategy"], line["num_models"]): line["wall_s"]
        for line in _of(lines, "strategies")
        if "wall_s" in line
    }
    rows = []
    for dtype in dict.fromkeys(key[0] for key in times):
        for name in ("vmap", "cudagraph_vmap", "lowered_vmap"):
            found = [_fewest(times, dtype, name, over) for over in ("loop", "cudagraph_loop")]
            rows.append((dtype, f"`{name}`", *found))
    return _table(("dtype", "strategy", "over `loop`", "over `cudagraph_loop`"), rows)


def _fewest(times: Mapping[tuple[str, str, int], float], dtype: str, name: str, over: str) -> str:
    """The fewest models from which on a strategy is faster than another one."""
    counts = [
        count
        for kind, strategy, count in times
        if (kind, strategy) == (dtype, name) and (dtype, over, count) in times
    ]
    fewest = ""
    for count in sorted(counts, reverse=True):
        if times[dtype, name, count] >= times[dtype, over, count]:
            break
        fewest = str(count)
    return fewest or ("none" if counts else "")


def _layers(lines: Sequence[Line]) -> list[str]:
    best: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if line["step"] != "layers" or "error" not in line:
            continue
        key = line["dtype"], line["precision"], line["num_models"], line["layer"]
        if key not in best or (line["seconds"] or 0) < (best[key]["seconds"] or 0):
            best[key] = line
    rows = [
        (*key, line["tile"], f"{line['error']:.0e}", f"{(line['seconds'] or 0) * 1e6:.1f}")
        for key, line in best.items()
    ]
    return _table(("dtype", "precision", "N", "layer", "tile", "error", "us"), rows)


def _ceilings(lines: Sequence[Line]) -> list[str]:
    found = [line for line in lines if line["step"] == "ceilings" and "limits" in line]
    return _table(("dtype", "measured"), [(line["dtype"], line["limits"]) for line in found])


def _outputs(lines: Sequence[Line]) -> list[str]:
    parts: list[str] = []
    for line in lines:
        if "command" in line:
            parts += [f"`{line['command']}`: exit code {line['exit_code']}", ""]
            parts += ["```", line["output"].rstrip(), "```", ""]
    return parts


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def main() -> None:
    """Write the page of the run in the folder that the command line names."""
    folder = Path(sys.argv[1])
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "README.md").write_text(page(read(folder)))
    for path in sorted(folder.glob("*.json")):
        shutil.copy(path, TARGET / path.name)
        picture = TARGET / path.with_suffix(".png").name
        command = [sys.executable, "resnet_vmap.py", "--from_json", str(path)]
        subprocess.run([*command, "--plot", str(picture)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
