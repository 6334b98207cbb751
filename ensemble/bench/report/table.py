"""Results -> the table, and the notes below it. Pure functions, no torch."""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ensemble.bench.report.labels import case_name, title, varying_fields
from ensemble.bench.summary import Summary
from ensemble.statistics import CONFIDENCE
from ensemble.strategies import Hybrid, Strategy

UNKNOWN = ""
WIDTH, GPU_WIDTH = 90, 110  # of the default table, in characters; of one with times of a GPU
STRATEGIES_WIDTH = 100
MAX_WIDTH = 1000  # of a table before columns are left out, and of the verbose one
L2_FLUSHED = "; L2 cache flushed before each call"
PEERS_HINT = "peers: pip install -r requirements-peers.txt, on CUDA -r requirements-peers-cuda.txt"
STYLES = {"faster": "green", "slower": "red", "failed": "bold red"}

CellText = Callable[[Summary], str]


@dataclass(frozen=True)
class Column:
    """A header of two lines, and the text of a cell.

    Unless `always` is set, a column is shown only if a cell is neither empty nor `default`.
    """

    header: str
    cell: CellText
    always: bool = True
    default: str = UNKNOWN


def render_table(
    results: Sequence[Summary],
    *,
    verbose: bool = False,
    color: bool = False,
    flushed_l2: bool = False,
) -> str:
    """One table, a row per strategy; with `verbose` all columns and all rows.

    Unavailable strategies appear in `render_notes` only. The default table leaves columns out until
    it fits, and names them. `color` adds escape sequences for a terminal. `flushed_l2`: the L2
    cache was flushed before each timed call.
    """
    shown = [row for row in results if verbose or row.status != "unavailable"]
    every = _columns(results, verbose=verbose)
    columns, left_out = (every, list[str]()) if verbose else _fitting(every, shown)
    lines = grid(shown, columns, color=color)
    if left_out:
        lines.append(f"Left out for width: {', '.join(left_out)}; --verbose shows all.")
    head = title([row.case for row in results]) + (L2_FLUSHED if flushed_l2 else "")
    return "\n".join([head, *lines]) + "\n"


def _fitting(columns: Sequence[Column], rows: Sequence[Summary]) -> tuple[list[Column], list[str]]:
    """The columns that fit the width, and the names of those left out."""
    kept, left_out = list(columns), []
    width = GPU_WIDTH if GPU in columns else WIDTH
    for name, column, shorter in LEFT_OUT_FIRST:
        if max(map(len, grid(rows, kept)), default=0) <= width:
            break
        if column in kept:
            at = kept.index(column)
            kept[at : at + 1] = [shorter] if shorter else []
            left_out.append(name)
    return kept, left_out


def grid(rows: Sequence[Summary], columns: Sequence[Column], *, color: bool = False) -> list[str]:
    """The two header lines and the rows of a table of any width."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold" if color else "")
    table.add_column("\nstrategy", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in rows:
        cells = (column.cell(row) for column in columns)
        table.add_row(row.name, *cells, style=STYLES.get(_kind(row), ""))
    return _render(table, MAX_WIDTH, color=color)


def _render(table: Table, width: int, *, color: bool = False) -> list[str]:
    text = io.StringIO()
    Console(
        file=text,
        width=width,
        highlight=False,
        force_terminal=color,
        color_system="standard" if color else None,
    ).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]


def render_strategies(strategies: Mapping[str, Strategy | Hybrid]) -> str:
    """Each strategy with its summary, requirements and start-up time."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("strategy", no_wrap=True)
    table.add_column("description")
    table.add_column("requires", no_wrap=True)
    table.add_column("build", max_width=len("up to 1 min"))
    for name, strategy in strategies.items():
        table.add_row(name, strategy.summary, strategy.requires, strategy.build_time)
    return "\n".join([*_render(table, STRATEGIES_WIDTH), PEERS_HINT]) + "\n"


def render_notes(results: Sequence[Summary]) -> str:
    """Why rows have no speedup, and their notes: a line each, or nothing."""
    varying = varying_fields([row.case for row in results])
    lines = _unavailable(results)
    failed = [row for row in results if row.status == "failed"]
    lines += [f"{case_name(row.case, varying)}: failed: {row.error}" for row in failed]
    notes: dict[str, list[Summary]] = {}
    for row in results:
        for note in row.notes:
            notes.setdefault(note, []).append(row)
    for note, rows in notes.items():
        who = "all rows" if len(rows) == len(results) > 1 else None
        names = who or "; ".join(case_name(row.case, varying) for row in rows)
        lines.append(f"{names}: {note}")
    return "".join(f"{line}\n" for line in lines)


def _unavailable(results: Sequence[Summary]) -> list[str]:
    """Unavailable strategies, grouped by reason."""
    names: dict[str, list[str]] = {}
    for row in results:
        if row.status == "unavailable":
            names.setdefault(str(row.error), []).append(row.case.strategy)
    others = {row.case.strategy for row in results if row.status != "unavailable"}
    return [
        f"Not available here: {', '.join(_grouped(group, others))}: {reason}"
        for reason, group in names.items()
    ]


def _grouped(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Each name once; `prefix_*` for several with a prefix that no other name has."""
    families: dict[str, set[str]] = {}
    for name in names:
        families.setdefault(_family(name), set()).add(name)
    common = {family for family, members in families.items() if len(members) > 1}
    common -= {_family(name) for name in others}
    families_or_names = (
        f"{_family(name)}_*" if _family(name) in common else name for name in names
    )
    return list(dict.fromkeys(families_or_names))


def _family(name: str) -> str:
    return name.partition("_")[0]


def _kind(row: Summary) -> str:
    """The key of a row's style."""
    if row.status != "ok":
        return "failed"
    interval = row.speedup_interval
    if row.inconclusive or interval is None or interval[0] <= 1 <= interval[1]:
        return ""
    return "faster" if interval[0] > 1 else "slower"


def _columns(results: Sequence[Summary], *, verbose: bool) -> list[Column]:
    every = [*case_columns(results), *COLUMNS]
    return [*every, *VERBOSE_COLUMNS] if verbose else non_empty(every, results)


def case_columns(results: Sequence[Summary]) -> list[Column]:
    """N, and the fields that vary between rows."""
    varying = varying_fields([row.case for row in results])
    fields = [
        Column(f"\n{header}", lambda row, field=field: str(getattr(row.case, field)))  # type: ignore[misc]
        for header, field in varying.items()
    ]
    return [Column("\nN", lambda row: str(row.case.num_models)), *fields]


def non_empty(columns: Sequence[Column], results: Sequence[Summary]) -> list[Column]:
    """The columns without those that are empty or default in every row."""
    return [column for column in columns if column.always or _is_non_empty(column, results)]


def _is_non_empty(column: Column, results: Sequence[Summary]) -> bool:
    return any(column.cell(row) not in (UNKNOWN, column.default) for row in results)


def _per_call(row: Summary) -> str:
    return _milliseconds(row.median_s)


def _milliseconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds * 1e3:.{_digits(seconds)}f}"


def _per_call_with_spread(row: Summary) -> str:
    if row.median_s is None or row.iqr_s is None:
        return _per_call(row)
    return f"{_per_call(row)} ({row.iqr_s * 1e3:.{_digits(row.median_s)}f})"


def _digits(seconds: float) -> int:
    """Decimal places of milliseconds for at least three significant digits."""
    return 1 if seconds >= 0.1 else 2


def _speedup(row: Summary) -> str:
    if row.speedup is None:
        return row.status if row.error else UNKNOWN
    if row.case.is_reference:
        return "1 (reference)"
    if row.inconclusive:
        beyond = row.beyond_contention
        return f"{beyond}: {row.inconclusive}" if beyond else row.inconclusive
    interval = row.speedup_interval
    return f"{row.speedup:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """A formatted and scaled value; an empty cell if it is unknown."""
    return UNKNOWN if value is None else format(value * scale, form)


PER_CALL = Column("per call\nms (IQR)", _per_call_with_spread)
MEMORY = Column("memory\n(MB)", lambda row: number(row.peak_memory_bytes, ".0f", 1e-6))
RESERVED = Column(
    "reserved\n(MB)", lambda row: number(row.peak_reserved_bytes, ".0f", 1e-6), always=False
)
GPU = Column("GPU\n(ms)", lambda row: _milliseconds(row.device_median_s), always=False)
WITH_COPIES = Column(
    "with copies\n(ms)", lambda row: _milliseconds(row.with_copies_s), always=False
)
PAGE_FAULTS = Column(
    "page\nfaults",
    lambda row: number(row.page_faults_per_call, ",.0f"),
    always=False,
    default="0",
)
LIMIT = Column("of the\nlimit", lambda row: number(row.roofline_share, ".0%"), always=False)
COLUMNS = (
    PER_CALL,
    GPU,
    WITH_COPIES,
    Column(f"speedup\n[{CONFIDENCE:.0%} CI]", _speedup),
    Column("\nerror", lambda row: number(row.max_rel_error, ".0e")),
    Column("start\n(s)", lambda row: number(row.start_s, ".2f")),
    MEMORY,
    RESERVED,
    PAGE_FAULTS,
    Column(
        "top-1\nagrees",
        lambda row: number(row.top1_agreement, ".1%"),
        always=False,
        default="100.0%",
    ),
    Column(
        "parallel\nefficiency",
        lambda row: number(row.ranks.parallel_efficiency if row.ranks else None, ".0%"),
        always=False,
    ),
    LIMIT,
)
# Columns that a table too wide leaves out, in this order: name, column, replacement.
LEFT_OUT_FIRST: tuple[tuple[str, Column, Column | None], ...] = (
    ("page faults", PAGE_FAULTS, None),
    ("IQR", PER_CALL, Column("per call\nms", _per_call)),
    ("of the limit", LIMIT, None),
    ("reserved memory", RESERVED, None),
    ("memory", MEMORY, None),
    ("with copies", WITH_COPIES, None),
)
HELD = Column("held\n(MB)", lambda row: number(row.held_bytes, ".0f", 1e-6))
PER_MODEL = Column("per model\n(MB)", lambda row: number(row.bytes_per_model, ".1f", 1e-6))
VERBOSE_COLUMNS = (
    HELD,
    PER_MODEL,
    Column("build\n(s)", lambda row: number(row.build_s, ".2f")),
    Column("first call\n(s)", lambda row: number(row.first_call_s, ".3f")),
    Column("error to\nfloat64", lambda row: number(row.error_float64, ".0e")),
    Column("bound\nby", lambda row: (row.roofline and row.roofline.bound) or UNKNOWN),
)
