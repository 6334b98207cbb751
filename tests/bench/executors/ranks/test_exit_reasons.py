"""The exit reason of a run over ranks: timeouts are distinct from lost connections."""

import pytest

from ensemble.bench.executors.ranks import exit_reasons, group
from ensemble.bench.executors.ranks.group import RankTimeoutError
from ensemble.errors import RankError


class Store:
    """A store in which rank 1 has recorded nothing, or a reason."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def record_reason(self, reason: str) -> None: ...

    def claim_report(self) -> bool:
        return True

    def first_failure(self) -> tuple[int | None, str]:
        return 1, self.reason or ""

    def rank_name(self, rank: int) -> str:
        return f"rank {rank} on host-b"


@pytest.mark.parametrize(("timeout_s", "kind"), [(0.0, RankTimeoutError), (60.0, RankError)])
def test_a_collective_that_fails_after_the_timeout_is_a_timeout(
    timeout_s: float, kind: type[RankError]
) -> None:
    """Whatever the message: backends word their timeouts differently."""
    with (
        pytest.raises(RankError, match="Connection closed by peer") as caught,
        group.rank_errors(timeout_s),
    ):
        raise RuntimeError("Connection closed by peer\nand more")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "reason", "expected"),
    [
        (RankTimeoutError("no words of time"), None, "no answer within --timeout_minutes"),
        (RankError("Timed out"), None, "killed or crashed without reporting an error (out of"),
        (RankTimeoutError("late"), "RuntimeError: broke", "RuntimeError: broke"),
    ],
)
def test_a_lost_rank_is_named_with_its_reason_a_timeout_or_a_crash(
    error: RankError, reason: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_reasons, "ExitStore", lambda: Store(reason))
    assert exit_reasons.diagnose(error).startswith(f"rank 1 on host-b: {expected}")
