"""The page on timm's networks says what its file holds, and judges as it says."""

from dataclasses import replace

import pytest

from ensemble.bench import result_file
from tests.studies import timm_table
from tests.studies.timm_table import Case

CASE = Case(
    network="ecaresnet50t",
    picked="lowered_vmap",
    times_s={
        "loop": 0.1,
        "lowered_vmap": 0.05,
        "concurrent": 0.08,
        "best": 0.0505,
        "openvino": 0.06,
    },
    speedups={"loop": 1.0, "lowered_vmap": 2.0, "concurrent": 1.25, "best": 1.98, "openvino": 1.6},
    by_torch="2 cumsum",
    out={"onnxruntime": "not installed"},
)


def test_what_was_picked_is_no_rival_of_itself() -> None:
    assert CASE.fastest_other == "concurrent"
    assert CASE.of_the_fastest == pytest.approx(1.98 / 1.25)
    assert CASE.of_the_peer == pytest.approx(1.98 / 1.6)
    slow = replace(CASE, picked="concurrent")
    assert slow.fastest_other == "lowered_vmap"
    assert slow.is_close
    assert not replace(slow, speedups={**CASE.speedups, "best": 1.89}).is_close


def test_best_is_behind_the_loop_only_where_it_picked_another() -> None:
    behind = replace(CASE, speedups={**CASE.speedups, "best": 0.99})
    assert behind.is_behind_the_loop
    assert not replace(behind, picked="loop").is_behind_the_loop
    assert not CASE.is_behind_the_loop


def test_the_page_names_what_is_left_to_torch_and_why_rows_are_missing() -> None:
    nothing = replace(CASE, network="dla34", by_torch="", out={})
    page = timm_table.page([CASE, nothing, replace(nothing, network="vgg11_bn", by_torch=None)])
    assert "in 3 of 3 networks, and behind the loop in 0" in page
    assert "Geometric mean over the fastest peer: 1.24." in page
    assert "| ecaresnet50t | 100.0 | 50.5 (lowered_vmap) | 80.0 (concurrent) |" in page
    assert "| 60.0 (openvino) | 1.58 | 1.24 | 2 cumsum |" in page
    assert "| nothing |" in page
    assert "| not built |" in page
    assert "- ecaresnet50t: onnxruntime: not installed" in page


def test_a_case_is_read_off_a_result_file() -> None:
    text = (timm_table.DATA.parent / "float32_n4.json").read_text()
    case = timm_table.case_of("resnet18", result_file.from_json(text))
    assert case.picked == "lowered_vmap"
    assert case.speedups["loop"] == 1
    assert case.times_s["best"] < case.times_s["loop"]
    assert case.of_the_fastest == pytest.approx(
        case.speedups["best"] / case.speedups[case.fastest_other]
    )


@pytest.mark.skipif(not timm_table.FILE.exists(), reason="not measured yet")
def test_the_stored_page_is_what_its_file_says() -> None:
    cases = timm_table.read()
    measured = [cases[network] for network in timm_table.NETWORKS if network in cases]
    assert timm_table.PAGE.read_text() == timm_table.page(measured)
    missed = sum(not case.is_close for case in measured)
    assert missed <= len(timm_table.NETWORKS) - timm_table.CLOSE_NEEDED
    assert not any(case.is_behind_the_loop for case in measured)
