"""What a record derives from its raw times."""

from tests.made import ROW, changed


def test_the_speedup_is_the_median_of_the_ratios_of_pairs_and_not_a_ratio_of_medians() -> None:
    assert ROW.speedup == 1.5  # of 2/1, 3/2, 2/4; the medians' ratio would be 1.0


def test_the_reference_has_a_speedup_of_one_without_an_interval() -> None:
    reference = changed(ROW, strategy="loop", reference_times_s=())
    assert reference.speedup == 1.0
    assert reference.speedup_interval is None


def test_a_loop_in_another_dtype_is_not_the_reference() -> None:
    assert changed(ROW, strategy="loop", dtype="bfloat16").speedup == 1.5


def test_a_row_that_failed_has_no_speedup_even_where_it_has_times() -> None:
    failed = changed(ROW, status="failed", error="outputs disagree")
    assert failed.speedup is None
    assert failed.speedup_interval is None


def test_noise_is_the_worse_spread_of_the_two() -> None:
    noisy = changed(ROW, times_s=(1.0, 1.0, 1.0), reference_times_s=(1.0, 2.0, 3.0))
    assert noisy.noise == 0.5
