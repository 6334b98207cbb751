"""Render tests/data/README.md of the stored runs: `python -m tests.studies.results`."""

from pathlib import Path

from ensemble.bench.case import REFERENCE
from ensemble.bench.report import exports, sweep
from ensemble.bench.report.table import render_notes, render_table
from ensemble.bench.report.verdict import render_answer
from ensemble.bench.summary import Run, Summary
from tests.studies import peers

DATA = Path(__file__).parents[1] / "data"
PAGE = DATA / "README.md"
README = DATA.parents[1] / "README.md"
BEGIN, END = "<!-- begin results: python -m tests.studies.results -->", "<!-- end results -->"
FIRST_SCREEN = {
    "loop": "`loop`: a Python loop, the reference",
    "vmap": "`vmap`: functorch",
    "compiled_loop": "`compiled_loop`: torch.compile",
    "onnxruntime": "`onnxruntime`",
    "openvino": "`openvino`",
    "lowered_vmap": "`lowered_vmap`: vmap with kernels of this package",
}

SETTINGS = {  # file -> what is set, beside ResNet-18 at 224 px in float32
    "float32_n1": "N=1",
    "float32_n3": "N=3",
    "float32_n4": "N=4",
    "float32_n6": "N=6",
    "float32_n16": "N=16",
    "float32_n64": "N=64",
    "float32_per_model": "N=4, an image for each model",
    "float32_batch8": "N=4, batch 8",
    "float32_64px": "N=4, 64 px",
    "float32_720px": "N=2, 720 px",
    "float32_resnet50": "N=4, ResNet-50",
    "bfloat16_n4": "N=4, bfloat16",
    "bfloat16_n16": "N=16, bfloat16",
}
FOUR = ("allocator/system_n4", "float32_n4")  # where `vmap` of four stands
FEW_FAULTS = 1000  # a call; a process has a handful, or tens of thousands
STRATEGIES = (
    *("vmap", "lowered_vmap", "prepacked_loop", "prepacked_concurrent"),
    *peers.PEERS,
)


def read(name: str) -> Run:
    """A stored run."""
    return exports.read(str(DATA / f"{name}.json"), argument=name)


def figure(row: Summary | None) -> str:
    """A speedup with its interval, and of how many processes where these were several."""
    if row is None:
        return ""
    if row.speedup is None or row.inconclusive or row.speedup_interval is None:
        return row.inconclusive or row.status
    low, high = row.speedup_interval
    return f"{row.speedup:.2f} [{low:.2f}, {high:.2f}]"


def settings_table() -> list[str]:
    """A line a stored run, a column a strategy."""
    lines = [
        f"| ResNet-18, 224 px, float32, unless said | processes | {' | '.join(STRATEGIES)} |",
        "| --- | --- |" + " --- |" * len(STRATEGIES),
    ]
    for name, setting in SETTINGS.items():
        run = read(name)
        rows = {row.case.strategy: row for row in run.results if not row.case.is_reference}
        most = max(len(row.processes) for row in run.results)
        cells = " | ".join(figure(rows.get(strategy)) for strategy in STRATEGIES)
        lines.append(f"| [{setting}]({name}.json) | {most} | {cells} |")
    return lines


def allocator_table() -> list[str]:
    """Eager vmap by N and allocator, with its page faults."""
    lines = ["| ResNet-18, 224 px | system | retain |", "| --- | --- | --- |"]
    for number in (2, 4, 16):
        cells = []
        for allocator in ("system", "retain"):
            results = read(f"allocator/{allocator}_n{number}").results
            (vmap,) = (row for row in results if row.case.strategy == "vmap")
            cells.append(f"{figure(vmap)}, {vmap.page_faults_per_call:,.0f} faults")
        lines.append(f"| N={number} | {' | '.join(cells)} |")
    return lines


def modes() -> str:
    """How often each way was met by `vmap` of four models, with glibc's heap as it comes."""
    rows = [row for name in FOUR for row in read(name).results if row.case.strategy == "vmap"]
    processes = [process for row in rows for process in row.processes]
    spared = [
        p.speedup(alone=False) for p in processes if (p.page_faults_per_call or 0) < FEW_FAULTS
    ]
    faulting = [
        p.speedup(alone=False) for p in processes if (p.page_faults_per_call or 0) >= FEW_FAULTS
    ]
    met = [
        f"{_range(speedups)} of the loop's speed in {len(speedups)} {what} page faults"
        for speedups, what in ((spared, "without"), (faulting, "with"))
        if speedups
    ]
    return f"Of {len(processes)} fresh processes of four models `vmap` had {', '.join(met)}."


def _range(speedups: list[float | None]) -> str:
    known = sorted(f"{speedup:.2f}" for speedup in speedups if speedup is not None)
    return " to ".join(dict.fromkeys((known[0], known[-1])))


def said(name: str) -> list[str]:
    """What a stored sweep says, and how it was made."""
    run = read(name)
    return [
        f"`{' '.join(run.environment.argv)}`",
        "",
        f"![Time and speedup against the number of models]({name}.png)",
        "",
        "```",
        *render_answer(run.results).splitlines(),
        "```",
    ]


def machine(run: Run) -> str:
    """Where a run was made."""
    environment = run.environment
    return (
        f"{environment.device_name}, {environment.cores} cores, torch {environment.torch},"
        f" {environment.date[:10]}"
    )


TEMPLATE = """# Results: stored runs

`python -m tests.studies.results` computes every figure here from a stored result file, and a test holds the page to them.
`python resnet_vmap.py --from_json tests/data/float32_n4.json` shows one with all its rows. Speedups are over the float32
loop, with 95 % intervals: of the processes, or where there is one, of its pairs. An empty cell was not run.

CPU: {cpu} (AVX-512 with bfloat16, no AMX; a shared machine).

{settings}

## Every ResNet, beside the runtimes that people would use instead

{resnets} Timed in turns in one process, three
processes for each; in brackets their range. bfloat16 and other families: [peers](peers/README.md).

## Every strategy, four models

`{four_command}`

```
{four_answer}

{four_table}
```

`of the limit`: the row's share of what this device could do at best, torch's count of operations over the measured
rate of a matrix product. Above 100 % a row beats the library's own matrix product: it multiplies less.

## Page faults: most of what vmap is blamed for on a CPU

{allocators}

Eager vmap over the loop, by `--allocator`, and page faults per call. A vmapped activation is N times larger than the
loop's. glibc gives such blocks back when they are freed, and every call faults its pages in again. Which way a
process goes is drawn with the state of its heap. {modes} `--allocator retain` keeps freed memory.

## Where vmap starts to win, on the CPU

{sweep}

## On a GPU

{gpu}; float32 without TF32; one run on a budget of 3.8 minutes.

{cuda_sweep}

Eager `vmap` is slower than the loop with few models and starts to win between 4 and 8: both wait for the CPU to launch
kernels, and `vmap` launches as many for 32 models as for one. A CUDA graph takes that wait away. The loop's own time
depends on the host's CPU, which drifted between 20 and 35 ms (N=16) within minutes.
"""  # noqa: E501


def readme_block() -> list[str]:
    """The table of the first screen of the README, between its markers."""
    run = read("float32_n4")
    rows = {row.case.strategy: row for row in run.results}
    line = sweep.by_line(read("cuda_sweep").results)["vmap", "float32", 1, 224]
    shown = [row for row in line if row.case.num_models in (2, 8, 32)]
    cuda = ", ".join(f"{figure(row)} for {row.case.num_models}" for row in shown)
    first = sweep.break_even(line).num_models
    return [
        BEGIN,
        "| four ResNet-18, 224 px, float32; AMD EPYC, 2 cores, AVX-512 | ms | speedup [95 % CI] |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {1e3 * (rows[strategy].median_s or 0):.0f}"
            f" | {'1' if strategy == REFERENCE else figure(rows[strategy])} |"
            for strategy, name in FIRST_SCREEN.items()
        ),
        "",
        f"On an H100 `vmap` breaks even at {first} models: {cuda}."
        " [All results](tests/data/README.md).",
        END,
    ]


def readme() -> str:
    """The README with its table made anew."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return before + "\n".join(readme_block()) + rest.split(END)[1]


def page() -> str:
    """The whole page."""
    four = read("float32_n4")
    return TEMPLATE.format(
        cpu=machine(four),
        settings="\n".join(settings_table()),
        resnets="\n".join(peers.table(peers.read(), peers.OF_RESNETS)),
        four_command=" ".join(four.environment.argv),
        four_answer=render_answer(four.results).rstrip(),
        four_table=(render_table(four.results) + render_notes(four.results)).rstrip(),
        allocators="\n".join(allocator_table()),
        modes=modes(),
        sweep="\n".join(said("sweep")),
        gpu=machine(read("cuda_sweep")),
        cuda_sweep="\n".join(said("cuda_sweep")),
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
