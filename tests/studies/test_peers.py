"""The page on other runtimes says what its file holds, and the lead is what it is called."""

from statistics import geometric_mean, median

import pytest

from tests.studies import peers
from tests.studies.peers import Place, Process

TIMES = {
    "loop": [4.0, 8.0, 4.0],
    "openvino": [2.0, 4.0, 2.0],
    "onnxruntime": [3.0, 3.0, 3.0],
    "best": [1.0, 2.0, 1.0],
}
PROCESS = Process("resnet18", "lowered_vmap", TIMES, {})


def test_the_lead_is_over_the_faster_runtime_in_the_median_round() -> None:
    assert PROCESS.lead == 2.0  # of 2, 2, 2 and not of 3, 1.5, 3
    without = {name: times for name, times in TIMES.items() if name != "openvino"}
    assert Process("resnet18", "lowered_vmap", without, {"openvino": "none"}).lead == 3.0


def test_a_row_has_the_median_process_and_the_range_of_all() -> None:
    slower = Process("resnet18", "loop", {**TIMES, "best": [2.0, 4.0, 2.0]}, {})
    elsewhere = Process("resnet18", "loop", TIMES, {}, num_models=6)
    lines = peers.table([PROCESS, slower, elsewhere], [Place("resnet18"), Place("resnet34")])
    assert lines[2:] == [
        "| resnet18, N=4 | 4000.0 | 2000.0 | 3000.0 | 1500.0 | 1.50 (1.00 to 2.00) |",
        "",
        "Geometric mean of the last column: 1.50.",
    ]


@pytest.mark.skipif(not peers.FILE.exists(), reason="not measured yet")
def test_the_stored_page_is_what_its_file_says_and_best_leads_on_every_resnet() -> None:
    processes = peers.read()
    assert peers.PAGE.read_text() == peers.page(processes)
    found = peers.leads(processes, peers.OF_RESNETS)
    assert found.keys() == set(peers.OF_RESNETS)
    medians = {place.arch: median(each) for place, each in found.items()}
    assert min(medians.values()) >= 1.05
    assert geometric_mean(medians.values()) >= 1.3
    assert medians["resnet18"] >= 1.6
    in_bfloat16 = peers.leads(processes, peers.IN_BFLOAT16)
    assert geometric_mean(map(median, in_bfloat16.values())) >= 1.15
