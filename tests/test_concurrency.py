"""Forwards called from several threads at once: none waits forever, none gives another's logits.

By hand, for a minute: `python -m tests.test_concurrency --seconds 60`.
"""

import argparse
import faulthandler
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import ensemble
from tests import nets
from tests.nets import (
    Activate,
    Concat,
    Conv,
    MaxPool,
    Net,
    Norm,
    Sum,
)

MODELS, THREADS, CALLERS = 5, 4, 3
SECONDS = 1.0  # of the test
HANG_S = 60  # more than the calls are meant to take

Forward = Callable[[Tensor], Tensor]

RESIDUAL = (Conv(width=32), Norm(), Activate(), Conv(), Sum(other=1), Activate())
INTERRUPTED = (*RESIDUAL, Concat(), Conv(width=64), MaxPool(), Concat(), Conv(width=32))
NETS = (Net(RESIDUAL, (16, 16)), Net(INTERRUPTED, (16, 16)))


def test_forwards_that_run_at_once_neither_wait_forever_nor_differ() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_concurrency", "--seconds", str(SECONDS)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=3 * HANG_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def call_at_once(forwards: Sequence[Forward], xs: Sequence[Tensor], *, seconds: float) -> int:
    """Call all forwards from each of several threads, in other orders; the number of calls.

    Raises:
        AssertionError: a call gave other logits than the same call alone.
    """
    jobs = [(forward, x, forward(x)) for forward in forwards for x in xs]
    end, calls, wrong = time.monotonic() + seconds, [0] * CALLERS, list[str]()

    def work(caller: int) -> None:
        try:
            while time.monotonic() < end and not wrong:
                index = (calls[caller] + 2 * caller) % len(jobs)
                forward, x, expected = jobs[index]
                torch.testing.assert_close(forward(x), expected, rtol=1e-5, atol=1e-5)
                calls[caller] += 1
        except Exception as error:  # of a thread, to be raised by the caller
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    return sum(calls)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    seconds = parser.parse_args(argv).seconds
    faulthandler.dump_traceback_later(seconds + HANG_S, exit=True)
    torch.set_num_threads(THREADS)
    sys.setswitchinterval(1e-5)  # threads meet in the midst of what they do
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2)]
    forwards = [
        ensemble.build(name, nets.models(net, MODELS, torch.float32), xs[0])
        for net in NETS
        for name in ("lowered_vmap", "prepacked_concurrent")
    ]
    for forward in forwards:
        note = getattr(forward, "note", None)
        _ = note and print(note)
    print(f"{call_at_once(forwards, xs, seconds=seconds)} calls")


if __name__ == "__main__":
    main()
