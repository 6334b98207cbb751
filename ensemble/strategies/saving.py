"""A forward as a file: packed weights and plans; it starts again without tracing or tuning.

Forwards on the CPU only. What is saved is a graph of operators for each shape that needs no
planning, so the file holds no code of the models, and no pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble import files
from ensemble.artifacts import formats, tensor_file
from ensemble.artifacts.graph_format import TensorTable, encode
from ensemble.artifacts.version import version
from ensemble.compiler.runtime.packed_weight import PackedWeight
from ensemble.errors import InputError, UnavailableError
from ensemble.strategies.agreement import noise, same_bits
from ensemble.strategies.build_result import RawForward
from ensemble.strategies.contexts import default_device, execution_context
from ensemble.strategies.forward import Forward
from ensemble.strategies.loading import decode_plan
from ensemble.strategies.saved_run import SavedRun
from ensemble.strategies.stacked_outputs import stack_outputs

MAX_VERIFIED = 32  # batch sizes that are compared when a forward is saved, from 1 on


def save(forward: Forward, path: str | os.PathLike[str]) -> int:
    """Save a forward on the CPU: what was chosen, its packed weights, and a plan for each of
    `forward.shapes`. Models are not exchanged meanwhile. An existing file is replaced.

    The file is loaded by `load`, on a CPU with the same vector instructions, by the same versions
    of this package and of torch.

    Returns:
        The size of the file in bytes.

    Raises:
        UnavailableError: it cannot be saved: it runs on another device or by another runtime, or
            the results of its saved form are not equal to the last bit.
        InputError: the file cannot be written, or something else than a file is there.
    """
    if forward.device.type != "cpu" or forward.serving.saved is None:
        raise UnavailableError(
            f"a forward by {forward.report.strategy} on {forward.device} cannot be saved; export"
            " the models instead (ensemble.export), or build another strategy"
        )
    formats.check_saved_destination(path, overwrite=True)
    saved = forward.serving.saved
    table = TensorTable()
    device = forward.device
    with forward.exchanges(), execution_context(device), default_device(device):
        largest = min(forward.max_batch, MAX_VERIFIED)
        image = noise((1, *forward.shape[-3:]), forward.dtype, forward.device)
        batch_sizes = forward.plans.verified_batch_sizes(image, largest)
        plans = []
        for shape, route in forward.plans.routes().items():
            x = noise((*shape[:-4], route.batch_size, *shape[-3:]), forward.dtype, forward.device)
            run = saved(route.run, forward.plans.model, x)
            plans.append(
                {"shape": list(shape), "batch_size": route.batch_size} | _encode(run, table)
            )
            _check_equal(plans[-1], table.tensors, route.run, x, forward)
    content = {
        "version": version(),
        "strategy": forward.strategy,
        "num_models": forward.num_models,
        "max_batch": forward.max_batch,
        "shape": list(forward.shape),
        "dtype": str(forward.dtype),
        "batch_sizes": batch_sizes,
        "report": asdict(replace(forward.report, memory_bytes=None)),
        "plans": plans,
    }
    try:
        return tensor_file.write(Path(path), content, table.tensors)
    except ValueError as error:  # a dtype that files do not have
        raise UnavailableError(f"this forward cannot be saved: {error}") from error
    except OSError as error:
        message = f"{path}: expected a writable file: {files.reason(error)}"
        raise InputError(message, argument="path") from error


def _encode(run: SavedRun, table: TensorTable) -> dict[str, Any]:
    constants = [[_encode_constant(each, table) for each in model] for model in run.constants]
    return {
        "mode": run.mode,
        "is_channels_last": run.is_channels_last,
        "graph": encode(run.graph, table),
        "constants": constants,
    }


def _encode_constant(constant: Any, table: TensorTable) -> dict[str, Any]:
    if isinstance(constant, Tensor):
        return {"tensor": table.add(constant)}
    if isinstance(constant, PackedWeight):
        return {"packed": table.add_packed(constant), "arguments": list(constant.arguments)}
    if isinstance(constant, int | float | bool):
        return {"number": constant}
    kind = type(constant).__name__
    raise UnavailableError(f"this forward cannot be saved: a constant of it is a {kind}")


def _check_equal(
    plan: Mapping[str, Any],
    tensors: Sequence[Tensor],
    run: RawForward,
    x: Tensor,
    forward: Forward,
) -> None:
    """Raise UnavailableError unless the saved form of a run gives the same bits."""
    threads = torch.get_num_threads()
    expected = stack_outputs(run(x), forward.num_models)
    found = stack_outputs(
        decode_plan(plan, tensors, threads, forward.num_models)(x), forward.num_models
    )
    if not same_bits(found, expected):
        raise UnavailableError(
            f"this forward by {forward.report.strategy} cannot be saved: its graph of operators"
            " gives other results in the last digits; build lowered_vmap"
        )
