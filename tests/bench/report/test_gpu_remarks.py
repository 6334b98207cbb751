"""Warnings of a GPU that others use, or whose clocks are lowered."""

from dataclasses import replace

from ensemble.bench import result_file
from ensemble.bench.report import exports, gpu_remarks
from ensemble.bench.report.page import page_of
from ensemble.bench.summary import Run
from ensemble.machine.gpu_state import GpuProcess, GpuState
from tests.made import CONFIG, ENVIRONMENT, LOOP, VMAP, changed, row_of

QUIET = GpuState(
    "GPU-x",
    name="NVIDIA H100",
    sm_clock_hz=1_410_000_000,
    max_sm_clock_hz=1_980_000_000,
    power_w=312.5,
    utilization=0.02,
    throttle_reasons=("GpuIdle",),
    other_processes=(),
)
SHARED = replace(QUIET, utilization=1.0, other_processes=(GpuProcess(7, 12 * 10**9),))
HOT = replace(QUIET, throttle_reasons=("SwPowerCap", "HwThermalSlowdown"))


def run_of(before: GpuState | None, *states: GpuState | None) -> Run:
    one = VMAP.measurements[0]
    row = row_of(*(replace(one, gpu=state) for state in states))
    environment = replace(ENVIRONMENT, device="cuda:0", gpu=before)
    return Run(environment, CONFIG.plain(), (LOOP, row))


def test_a_gpu_that_is_busy_or_throttled_before_the_run_is_warned_of_with_the_number() -> None:
    (line,) = gpu_remarks.warnings_before(run_of(SHARED, None).environment)
    assert line == (
        "Warning: cuda:0 was busy before the run (100% utilized, 1 other process holds 12.0 GB):"
        " times may be biased"
    )
    (line,) = gpu_remarks.warnings_before(run_of(HOT, None).environment)
    assert line == (
        "Warning: cuda:0 was throttled before the run (SwPowerCap, HwThermalSlowdown, SM clock"
        " 1,410 of 1,980 MHz)"
    )
    assert gpu_remarks.warnings_before(run_of(QUIET, None).environment) == []
    assert gpu_remarks.warnings_before(ENVIRONMENT) == []


def test_rows_beside_other_processes_or_with_lowered_clocks_share_a_warning_of_each_kind() -> None:
    text = gpu_remarks.render(run_of(QUIET, QUIET, SHARED, HOT))
    assert text == (
        "Warning: other processes held memory of cuda:0: vmap, 4 models (1, 12.0 GB in 1 of 3"
        " processes).\n"
        "Warning: cuda:0 was throttled: vmap, 4 models (SwPowerCap, HwThermalSlowdown, SM clock"
        " 1,410 of 1,980 MHz in 1 of 3 processes).\n"
    )
    assert gpu_remarks.render(run_of(QUIET, QUIET, None)) == ""
    assert gpu_remarks.render(run_of(None, None)) == ""


def test_our_own_utilization_at_the_end_of_a_row_is_no_warning() -> None:
    assert gpu_remarks.render(run_of(QUIET, replace(QUIET, utilization=1.0))) == ""


def test_the_warnings_are_on_the_page_and_the_states_in_the_file() -> None:
    run = run_of(HOT, SHARED)
    page = page_of(run, columns=False, sentences=False)
    assert "was throttled before the run" in page.remarks
    assert "other processes held memory" in page.remarks
    assert result_file.from_json(result_file.to_json(run)) == run
    assert "was throttled before the run" in exports.to_markdown(run)


def test_a_file_without_states_is_one_of_an_earlier_version() -> None:
    run = Run(ENVIRONMENT, CONFIG.plain(), (changed(VMAP),))
    text = result_file.to_json(run)
    assert '"gpu": null' in text
    assert result_file.from_json(text.replace('"gpu": null', '"other": null')) == run
