"""Strategies that a benchmark must not believe: each comes in as a user's own does."""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
STOPPED, PROCESSES = threading.Event(), list[subprocess.Popen[bytes]]()


def stop() -> None:
    """End what `spins` and `leaves_a_process_busy` have started."""
    STOPPED.set()
    while PROCESSES:
        PROCESSES[-1].kill()
        PROCESSES.pop().wait()


def honest(models: Sequence[nn.Module], example: Tensor) -> Forward:
    return lambda x: torch.stack([model(x) for model in models])


def caches_by_object(models: Sequence[nn.Module], example: Tensor) -> Forward:
    forward, answers = honest(models, example), dict[int, Tensor]()

    def cached(x: Tensor) -> Tensor:
        if id(x) not in answers:
            answers[id(x)] = forward(x)
        return answers[id(x)]

    return cached


def caches_by_values(models: Sequence[nn.Module], example: Tensor) -> Forward:
    forward, answers = honest(models, example), dict[bytes, Tensor]()

    def cached(x: Tensor) -> Tensor:
        key = x.numpy().tobytes()
        if key not in answers:
            answers[key] = forward(x)
        return answers[key]

    return cached


def answers_with_a_constant(models: Sequence[nn.Module], example: Tensor) -> Forward:
    answer = honest(models, example)(example)
    return lambda x: answer


def _wrong_in(
    wrong: Callable[[int], bool], models: Sequence[nn.Module], example: Tensor
) -> Forward:
    forward, calls = honest(models, example), [0]

    def call(x: Tensor) -> Tensor:
        calls[0] += 1
        return forward(x) * (1.1 if wrong(calls[0]) else 1.0)

    return call


def wrong_from_the_third_call_on(models: Sequence[nn.Module], example: Tensor) -> Forward:
    return _wrong_in(lambda number: number > 2, models, example)


def wrong_in_every_third_call(models: Sequence[nn.Module], example: Tensor) -> Forward:
    return _wrong_in(lambda number: number % 3 == 0, models, example)


def computes_later(models: Sequence[nn.Module], example: Tensor) -> Forward:
    forward, empty = honest(models, example), honest(models, example)(example)

    def call(x: Tensor) -> Tensor:
        result = torch.zeros_like(empty)
        later = torch.inference_mode()(lambda: result.copy_(forward(x)))
        threading.Timer(0.005, later).start()
        return result

    return call


def leaks(models: Sequence[nn.Module], example: Tensor) -> Forward:
    forward, kept = honest(models, example), list[Tensor]()

    def call(x: Tensor) -> Tensor:
        kept.append(torch.ones(5_000_000))  # 20 MB
        return forward(x)

    return call


def spins(models: Sequence[nn.Module], example: Tensor) -> Forward:
    STOPPED.clear()

    def spin() -> None:
        while not STOPPED.is_set():
            pass

    threading.Thread(target=spin, daemon=True).start()
    return honest(models, example)


def leaves_a_process_busy(models: Sequence[nn.Module], example: Tensor) -> Forward:
    PROCESSES.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
    return honest(models, example)


def raises(models: Sequence[nn.Module], example: Tensor) -> Forward:
    raise OSError("no engine here")


def gives_nothing(models: Sequence[nn.Module], example: Tensor) -> None:
    pass


NOT_A_FUNCTION = 3
