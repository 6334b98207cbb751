from dataclasses import replace

import numpy as np
import pytest

from ensemble.results import Config, Environment, Result, bootstrap_interval, iqr, median

ROW = Result(
    strategy="vmap",
    num_models=4,
    batch_size=1,
    image_size=224,
    dtype="float32",
    inputs="shared",
    build_s=0.1,
    first_call_s=0.2,
    times_s=(1.0, 2.0, 4.0),
    reference_times_s=(2.0, 3.0, 2.0),
    top1=[[281]] * 4,
    notes=("a note",),
)
ENVIRONMENT = Environment(
    date="2026-01-01T00:00:00+00:00",
    argv=("resnet_vmap.py",),
    git_commit=None,
    platform="Linux",
    python="3.11",
    torch="2.14.1",
    torchvision="0.29.1",
    device="cpu",
    device_name=None,
    cpu_capability="AVX512",
    cores=2,
    threads=2,
    tf32=False,
    cudnn_benchmark=False,
    allocator="system",
    page_fault_s=1e-6,
    weights="random",
    first_forward_s=0.25,
)
CONFIG = Config(
    num_models=(4,),
    model_path=None,
    arch="resnet18",
    image_path="kitten.jpg",
    image_size=(224,),
    batch_size=(1,),
    inputs="shared",
    device="auto",
    dtype=("float32",),
    strategies=("loop", "vmap"),
    warmup=3,
    min_seconds=2.0,
    min_pairs=20,
    threads=None,
    allocator="system",
    self_check=False,
    roofline=False,
    seed=0,
    max_minutes=None,
    resume=None,
    from_json=None,
    baseline=None,
    fail_above=None,
    export_json=None,
    export_csv=None,
    export_markdown=None,
    plot=None,
    verbose=False,
)


def test_the_median_and_quartiles_are_those_of_a_hand_computed_list():
    values = (1.0, 2.0, 3.0, 4.0, 10.0)  # quartiles 2 and 4 by linear interpolation
    assert median(values) == 3.0
    assert iqr(values) == 2.0


def test_statistics_of_too_few_values_are_unknown():
    assert median(()) is None
    assert iqr((1.0,)) is None
    assert bootstrap_interval((1.0,) * 7) is None


def test_the_speedup_is_the_median_of_the_ratios_of_pairs_and_not_a_ratio_of_medians():
    assert ROW.speedup == 1.5  # of 2/1, 3/2, 2/4; the medians' ratio would be 1.0


def test_the_reference_has_a_speedup_of_one_without_an_interval():
    reference = replace(ROW, strategy="loop", reference_times_s=())
    assert reference.speedup == 1.0
    assert reference.speedup_interval is None


def test_a_loop_in_another_dtype_is_not_the_reference():
    assert replace(ROW, strategy="loop", dtype="bfloat16").speedup == 1.5


def test_a_row_that_failed_has_no_speedup_even_where_it_has_times():
    failed = replace(ROW, status="failed", error="outputs disagree")
    assert failed.speedup is None
    assert failed.speedup_interval is None


def test_noise_is_the_worse_spread_of_the_two():
    noisy = replace(ROW, times_s=(1.0, 1.0, 1.0), reference_times_s=(1.0, 2.0, 3.0))
    assert noisy.noise == 0.5


def test_the_bootstrap_interval_of_equal_values_is_that_value():
    assert bootstrap_interval((2.0,) * 10) == (2.0, 2.0)


def test_the_bootstrap_interval_agrees_with_the_order_statistics_of_a_large_sample():
    # Conover, Practical Nonparametric Statistics (1999), 3.2: for n = 1000 the 99 % interval of
    # the median lies between the order statistics n/2 -+ 2.5758 sqrt(n)/2, here 459 and 541.
    low, high = bootstrap_interval(tuple(float(value) for value in range(1, 1001))) or (0, 0)
    assert low == pytest.approx(459.3, abs=6)
    assert high == pytest.approx(541.7, abs=6)


def test_the_interval_covers_the_true_median_of_skewed_noise_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(tuple(generator.lognormal(0, 0.1, size=20))) or (0, 0)
        covered += low <= 1 <= high
    assert covered >= 96
