"""How this process was started: by itself, or by torchrun as one rank of several. Imports no torch.

torchrun tells its workers by environment variables; see its documentation, "Environment Variables".
"""

import os
import socket


def is_launched() -> bool:
    """Was this process started by torchrun?"""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys()


def rank() -> int:
    """Which of all ranks this is; 0 in a plain start."""
    return int(os.environ["RANK"]) if is_launched() else 0


def ranks() -> int:
    """How many ranks there are, on all hosts."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def local_rank() -> int:
    """Which of the ranks of its host this is."""
    return int(os.environ["LOCAL_RANK"])


def local_ranks() -> int:
    """How many ranks this host has."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def attempt() -> str:
    """What tells this start of the ranks from an earlier one: torchrun may start them again."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


def rank_name(number: int, on: str | None) -> str:
    """`rank 1 on host-b`; of a host that is not known `rank 1`."""
    return f"rank {number} on {on}" if on else f"rank {number}"


def host() -> str:
    """This machine's name."""
    return socket.gethostname()
