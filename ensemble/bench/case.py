"""What is measured: one strategy at one grid point."""

from dataclasses import dataclass

REFERENCE = "loop"  # in float32
SELF_CHECK = "self_check"  # the reference against itself: the noise floor of this program


@dataclass(frozen=True)
class Case:
    """One row of the table: a strategy, at one grid point, in one dtype."""

    strategy: str
    num_models: int
    batch_size: int
    image_size: int  # pixels per side
    dtype: str
    inputs: str  # shared, or per_model

    @property
    def grid_point(self) -> tuple[int, int, int]:
        """(N, batch, px). Its rows share models, images and reference."""
        return self.num_models, self.batch_size, self.image_size

    @property
    def line(self) -> tuple[str, str, int, int]:
        """The case without its N, (strategy, dtype, batch, px): one curve of a sweep."""
        return self.strategy, self.dtype, self.batch_size, self.image_size

    @property
    def is_reference(self) -> bool:
        return self.strategy == REFERENCE and self.dtype == "float32"

    @property
    def is_self_check(self) -> bool:
        return self.strategy == SELF_CHECK


@dataclass(frozen=True)
class Task:
    """A case to be measured now.

    Args:
        case: what to measure.
        process: how many processes measured the case before this one. It seeds the arrivals of a
            load test: cases of one process number meet the same arrivals.
        picked: the strategy that `best` chose in an earlier process, None where it has to choose.
    """

    case: Case
    process: int = 0
    picked: str | None = None
