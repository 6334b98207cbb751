"""The command line of a rank of torchrun."""

import pytest

from ensemble.bench import cli
from ensemble.errors import InputError
from ensemble.machine import launch


@pytest.fixture(params=["0", "1"])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", request.param)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return str(request.param)


def test_rows_are_measured_in_the_ranks_and_not_in_fresh_processes(rank: str) -> None:
    assert (launch.rank(), launch.world_size()) == (int(rank), 2)
    assert cli.parse([]).measure.processes == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes", "3"], "rows are measured in its ranks"),
        (["--scenario", "server"], "one process serves the requests"),
    ],
)
def test_options_that_torchrun_excludes_are_rejected_with_the_reason(
    rank: str, argv: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        cli.parse(argv)


def test_only_rank_0_checks_the_output_paths(rank: str) -> None:
    argv = ["--export_json", "no/such/folder/run.json"]
    if rank == "0":
        with pytest.raises(InputError, match="expected a folder at no/such/folder"):
            cli.parse(argv)
    else:
        assert cli.parse(argv).report.export_json == argv[1]


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")  # of another launcher: only torchrun counts
    assert (launch.rank(), launch.world_size()) == (0, 1)
