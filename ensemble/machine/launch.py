"""Whether this process is a rank of torchrun, and which. Imports no torch.

torchrun configures its workers by environment variables; see its documentation, "Environment
Variables".
"""

import os
import socket


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys()


def rank() -> int:
    """The global rank of this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    """The number of ranks on all hosts; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def local_rank() -> int:
    """The rank of this process among those of its host."""
    return int(os.environ["LOCAL_RANK"])


def local_world_size() -> int:
    """The number of ranks on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def attempt() -> str:
    """A key for this (re)start of the ranks: torchrun may restart them after a failure."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


def rank_name(number: int, on: str | None) -> str:
    """`rank 1 on host-b`; `rank 1` if the host is unknown."""
    return f"rank {number} on {on}" if on else f"rank {number}"


def host() -> str:
    """The name of this host."""
    return socket.gethostname()
