"""The rule that picks `best`."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ensemble
from ensemble import strategies
from ensemble.report import exports, sweep
from ensemble.strategies import STRATEGIES, best
from tests.tiny import TinyNet, independent, tiny_models


def models(arch: str, count: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [torchvision.models.get_model(arch, num_classes=7).eval() for _ in range(count)]


@pytest.mark.parametrize(
    ("arch", "device", "dtype", "expected"),
    [
        ("resnet18", "cpu", "float32", "lowered_vmap"),
        ("resnet50", "cpu", "float32", "lowered_vmap"),
        ("resnext50_32x4d", "cpu", "float32", "prepacked_concurrent"),
        ("mobilenet_v2", "cpu", "float32", "prepacked_concurrent"),
        ("resnet18", "cuda", "float32", "cudagraph_compiled_im2col_vmap"),
        ("resnext50_32x4d", "cuda", "float32", "cudagraph_compiled_concurrent"),
        ("resnet18", "cuda", "bfloat16", "cudagraph_compiled_im2col_vmap"),
        ("resnet18", "mps", "float16", "folded_loop"),
    ],
)
def test_the_table_gives_a_strategy_for_every_device_dtype_and_architecture(
    arch: str, device: str, dtype: str, expected: str
) -> None:
    assert best.pick(models(arch), device, dtype) == expected


def test_with_many_models_in_half_precision_on_cuda_convolutions_side_by_side_are_picked() -> None:
    assert best.pick(models("resnet18", 5), "cuda", "float16") == "cudagraph_compiled_concurrent"


@pytest.mark.parametrize(
    ("pairs", "expected"), [(True, "lowered_vmap"), (False, "prepacked_concurrent")]
)
def test_in_bfloat16_the_cpu_decides(
    pairs: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best, "_multiplies_pairs_best", lambda: pairs)
    assert best.pick(models("resnet18"), "cpu", "bfloat16") == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("able", [True, False])
def test_packed_weights_are_picked_only_where_onednn_computes_in_that_dtype(
    dtype: str, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: able)
    expected = "prepacked_concurrent" if able else "folded_loop"
    assert best.pick(models("mobilenet_v2"), "cpu", dtype) == expected


def test_without_onednn_what_needs_it_is_not_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert best.pick(models("mobilenet_v2"), "cpu", "float32") == "folded_loop"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_picked_runs_in_every_dtype(dtype: torch.dtype) -> None:
    own = [model.to(dtype) for model in tiny_models(2)]
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    assert ensemble.build("best", own, x)(x).dtype == dtype


def test_a_model_that_cannot_be_traced_is_run_by_the_loop() -> None:
    class Branching(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    own: list[nn.Module] = [Branching().eval() for _ in range(2)]
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(ensemble.build("best", own, x)(x), independent(own, x))


def test_without_numba_the_rule_does_not_pick_what_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(best, "find_spec", lambda name: None)
    assert best.pick(models("resnet18"), "cpu", "float32") == "prepacked_concurrent"


def test_every_rule_names_a_strategy_and_the_last_fits_everything() -> None:
    assert {rule.strategy for rule in best.RULES} <= set(STRATEGIES)
    assert best.RULES[-1] == best.Rule("folded_loop")


def test_best_is_what_users_take_home() -> None:
    x, own = torch.randn(1, 3, 64, 64), models("resnet18")
    built = strategies.make("best", own, x)
    torch.testing.assert_close(built.forward(x), independent(own, x), rtol=1e-4, atol=1e-4)
    assert built.note.startswith("kernels: ")


STORED = sorted((Path(__file__).parents[1] / "data").glob("*.json"))
PEERS = {"openvino", "onnxruntime", "jax"}


def test_there_is_evidence_for_every_rule_that_names_some() -> None:
    for rule in best.RULES:
        if "*" in rule.evidence:
            pattern = Path(rule.evidence).name
            assert [path for path in STORED if path.match(pattern)]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_what_the_rule_picks_is_the_fastest_of_the_stored_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 %, of what this package runs itself: other runtimes may not be installed."""
    monkeypatch.setattr(best, "_multiplies_pairs_best", lambda: True)  # as the CPU of the files
    run = exports.read(str(path), argument="from_json")
    model = torchvision.models.get_model(run.config["arch"], weights=None)
    for rows in sweep.cells(run.results).values():
        for dtype in {row.case.dtype for row in rows}:
            own = [
                row for row in rows if row.case.dtype == dtype and row.case.strategy not in PEERS
            ]
            device = run.environment.device
            picked = best.pick([model] * rows[0].case.num_models, device, dtype)
            found = next((row for row in own if row.case.strategy == picked), None)
            fastest = sweep.fastest(own)
            if found is None and dtype == "float32" and len(own) == 1:
                continue  # only the reference of a run in another dtype
            assert found is not None
            assert fastest is not None
            assert (found.speedup or 0) >= 0.95 * (fastest.speedup or 0), fastest.case.strategy
