"""Export N models as one file that runs without this package, and run such files as strategies.

A file is written to a temporary folder, loaded again by torch or ONNX Runtime alone, compared with
the loop on new inputs at several batch sizes, and only then moved to its path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by torch.export, in its first trace: a build would take seconds longer
from torch import Tensor, nn

from ensemble.artifacts import aoti, formats, onnx, pt2, triton_repository
from ensemble.artifacts.formats import Format
from ensemble.artifacts.program import Layout, output_shape, sharing_equal_tensors, trace
from ensemble.errors import InputError, UnavailableError
from ensemble.machine.memory import unavailable_on_failure
from ensemble.models import outputs, stacking
from ensemble.strategies import (
    agreement,
    arguments,
    eager,
    folded,
    peer_conversion,
    peer_onnxruntime,
    peers,
    verification,
)
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.contexts import execution_context
from ensemble.strategies.verification import Behavior

Run = Callable[[Tensor], Tensor]
# Checked in addition to the batch size of the example and the next one.
BATCH_SIZES = (1, 2, 5)
_REFUSED = {
    Behavior.STATEFUL: "stateful models: a file has no state",
    Behavior.RANDOM: "models that draw random numbers",
    Behavior.USES_AUTOGRAD: "models that compute gradients in their forward",
}

_NOT_BATCHED = (
    "Triton batches requests along the first dimension, but the outputs of these models have no"
    " batch dimension there"
)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    path: of the file, or of the model's folder in a Triton repository.
    format: of the file.
    bytes: of all its files.
    max_rel_error: of the file's logits to the loop's, see `strategies.agreement.check`; None for
        outputs that are no floating-point numbers.
    batch_sizes: those that were compared.
    seconds: of the whole export, with the comparison.
    """

    path: Path
    format: Format
    bytes: int
    max_rel_error: float | None
    batch_sizes: tuple[int, ...]
    seconds: float


def export(
    models: Sequence[nn.Module],
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    output: str | int | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write N models to one file that runs without this package.

    The file holds a program in torch's or ONNX's own operators, a loop over the N models with batch
    norm folded, with the weights of each; equal tensors of several models are stored once. Its
    input `x` is like the example, with any batch size; its output `logits` is `(N, B, classes)`, or
    the stacked outputs `(N, *shape)` of models that return another single tensor. The suffix of
    `path` decides the format:

    - `.pt2`: `torch.export.load(path).module()(x)`.
    - `.aoti.pt2`: compiled for this kind of device and this version of torch,
      `torch._inductor.aoti_load_package(path)(x)`.
    - `.onnx`: for ONNX Runtime, OpenVINO and others. Weights above 2 GB are in `<path>.data`.
    - `triton_repository/`, another name that ends in `_repository`, or a path that ends in a slash:
      a model `<class>_x<N>` of a Triton Inference Server model repository, with dynamic batching:
      the batch is its first dimension, x `(B, ...)` or `(B, N, ...)`, and `logits` are
      `(B, N, classes)`. Other models of the repository are left alone.

    An earlier export at `path` is replaced at once, by renaming, after the new one was compared.

    Args:
        models: as for `ensemble.build`; their dtype is kept.
        example: `(B, channels, H, W)`, or `(N, B, channels, H, W)` for a batch per model. The file
            takes images of its size, in its dtype and, but for ONNX, on its device.
        path: see above.
        output: as for `ensemble.build`.
        overwrite: replace a file that is no export, or is write-protected.

    Raises:
        InputError: another suffix, or `path` cannot be written; unusable models or example.
        ValueError: see `ensemble.build`.
        UnavailableError: the models cannot be exported to this format (their control flow depends
            on values, they are stateful), a package is missing, or the file disagrees with them.
    """
    form = formats.check_destination(path, overwrite=overwrite)
    begin = time.perf_counter()
    models, example = arguments.validated(models, example)
    models = outputs.selected(models, output)
    behavior = verification.behavior(models[0], example)
    if behavior in _REFUSED:
        raise UnavailableError(f"{form.strategy} does not support {_REFUSED[behavior]}")
    arguments.check_runs(models[0], example)
    place = Path(os.path.realpath(path))
    if form is Format.TRITON:
        place = _place_in_repository(place, models, example)
    layout = _layout(form, example)
    with _failures_as_unavailable(form), _folder_beside(path) as folder:
        written = folder / place.name
        _write(form, models, example, written, layout)
        run = _load(form, written, example)
        batch_sizes = tuple(sorted({*BATCH_SIZES, _batch_size(example), _batch_size(example) + 1}))
        errors = [
            _compare(run, models, _new_images(example, batch_size), layout)
            for batch_size in batch_sizes
        ]
        del run  # it may hold the files open
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        try:
            _move(written, place)
        except OSError as error:
            raise InputError(
                f"{place} cannot be written: {error.strerror or error}", argument="path"
            ) from error
    known = [error for error in errors if error is not None]
    seconds = time.perf_counter() - begin
    return ExportReport(place, form, size, max(known, default=None), batch_sizes, seconds)


def _place_in_repository(repository: Path, models: Sequence[nn.Module], example: Tensor) -> Path:
    """The folder of the models in a Triton repository.

    Raises:
        InputError: something else is there.
        UnavailableError: Triton cannot batch their outputs.
    """
    _check_batched(models[0], example)
    name = type(outputs.unwrapped(models[0])).__name__.lower()
    place = repository / f"{name}_x{len(models)}"
    if place.exists() and not triton_repository.is_model(place):
        message = f"expected no folder or a model of Triton at {place}, got another file"
        raise InputError(message, argument="path")
    return place


def pt2_file(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """A `.pt2` file, run by torch alone."""
    return _build(Format.PT2, models, example)


def aoti_package(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """An `.aoti.pt2` package, run by torch alone."""
    return _build(Format.AOTI, models, example)


def onnx_file(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """An `.onnx` file, run by ONNX Runtime alone."""
    return _build(Format.ONNX, models, example)


def _build(form: Format, models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """A temporary file in a format, loaded again; the file is removed.

    Raises:
        UnavailableError: see `export`.
    """
    layout = _layout(form, example)
    with (
        _failures_as_unavailable(form),
        tempfile.TemporaryDirectory(prefix="resnet_vmap_") as folder,
    ):
        file = Path(folder) / f"models{form.value}"
        _write(form, models, example, file, layout)
        return BuildResult(_load(form, file, example))


def _layout(form: Format, example: Tensor) -> Layout:
    return Layout(per_model=example.dim() == 5, batch_first=form is Format.TRITON)


def _failures_as_unavailable(form: Format) -> contextlib.AbstractContextManager[None]:
    what = f"{form.strategy} cannot run these models"
    return unavailable_on_failure(what, but=(UnavailableError, ValueError))


def _write(
    form: Format, models: Sequence[nn.Module], example: Tensor, path: Path, layout: Layout
) -> None:
    is_onnx = form in (Format.ONNX, Format.TRITON)
    if is_onnx:
        _check_packages(example)
    program = trace(_prepared(models, example, contiguous=is_onnx), example, layout)
    if form is Format.PT2:
        pt2.write(program, path)
    elif form is Format.AOTI:
        aoti.write(program, path)
    elif form is Format.ONNX:
        onnx.write(program, path, dtype=example.dtype)
    else:
        _write_triton_model(program, example, path)


def _write_triton_model(program: Any, example: Tensor, folder: Path) -> None:
    batch, *shape = output_shape(program)
    if batch is not None or None in shape:
        raise UnavailableError(_NOT_BATCHED)
    file = triton_repository.model_file(folder)
    file.parent.mkdir(parents=True)
    onnx.write(program, file, dtype=example.dtype)
    result = program.graph.output_node().args[0][0].meta["val"]
    per_image = (
        [*example.shape[:1], *example.shape[2:]] if example.dim() == 5 else example.shape[1:]
    )
    triton_repository.write_config(
        triton_repository.Model(
            name=folder.name,
            input_shape=per_image,
            input_dtype=example.dtype,
            output_shape=[size for size in shape if size is not None],
            output_dtype=result.dtype,
            max_batch_size=max(triton_repository.MAX_BATCH_SIZE, _batch_size(example)),
            device_type=example.device.type,
        ),
        folder,
    )


def _check_batched(model: nn.Module, example: Tensor) -> None:
    """Raise UnavailableError unless the first dimension of a model's output is the batch."""
    batch = example[0] if example.dim() == 5 else example
    with execution_context(example.device):
        output = stacking.private_copy(model)(batch.clone())
    if not output.dim() or len(output) != len(batch):
        raise UnavailableError(_NOT_BATCHED)


def _check_packages(example: Tensor) -> None:
    """Raise UnavailableError unless ONNX files can be written, and run for the comparison."""
    if reason := peers.why_not("onnxruntime", example.dtype, example.device):
        raise UnavailableError(reason)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        peer_conversion.require(name, example.device)


def _prepared(models: Sequence[nn.Module], example: Tensor, *, contiguous: bool) -> list[nn.Module]:
    """Copies with batch norm folded, each on its own, as they may differ in more than weights.

    contiguous: not channels-last, whose average pooling torch exports to ONNX with a gather.
    """
    batches = example if example.dim() == 5 else [example] * len(models)
    with execution_context(example.device):
        copies = [_folded(model, batch) for model, batch in zip(models, batches, strict=True)]
    memory_format = torch.contiguous_format if contiguous else torch.preserve_format
    return sharing_equal_tensors(copies, memory_format=memory_format)


def _folded(model: nn.Module, batch: Tensor) -> nn.Module:
    try:
        (copy,) = folded.folded_models([model], batch)
    except UnavailableError:  # not accurate channels-last, say
        return stacking.private_copy(model)
    return copy


def _load(form: Format, path: Path, example: Tensor) -> Run:
    """The file at `path`, run by what it is made for alone."""
    if form is Format.PT2:
        return pt2.load(path)
    if form is Format.AOTI:
        return aoti.load(path)
    file = triton_repository.model_file(path) if form is Format.TRITON else path
    return peer_onnxruntime.run_of_file(file, example.device)


def _compare(run: Run, models: Sequence[nn.Module], images: Tensor, layout: Layout) -> float | None:
    """The error of a loaded file to the loop.

    Raises:
        UnavailableError: they disagree, or the file writes to its input.
    """
    weights = arguments.weight_dtype(models, images)
    dtype = weights if weights == torch.float64 else torch.float32
    with execution_context(images.device):
        x = layout.of_input(images).clone()
        before = x.clone()
        found = layout.of_output(run(x))
        reference = eager.logits_in(models, images, dtype)
    tolerance = agreement.current_tolerance(weights, images.device)
    check = agreement.check(found, reference, tolerance=tolerance)
    if check.problem or not torch.equal(x, before):
        problem = check.problem or "it writes to its input"
        raise UnavailableError(
            f"the exported file is wrong at batch {_batch_size(images)}: {problem}"
        )
    return check.max_rel_error


def _batch_size(example: Tensor) -> int:
    return example.shape[1] if example.dim() == 5 else example.shape[0]


def _new_images(example: Tensor, batch_size: int) -> Tensor:
    """Images of the example's distribution, `batch_size` of them: shifted and mirrored, so that
    each differs, also from those that were traced."""
    source, dim = agreement.informative(example), example.dim() - 4
    images = [
        source.select(dim, index % _batch_size(example)).roll(1 + index, -1).flip(-2)
        for index in range(batch_size)
    ]
    return torch.stack(images, dim)


@contextlib.contextmanager
def _folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder on the file system of `path`; it is removed, whatever happens."""
    parent = Path(os.path.realpath(path)).parent
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".resnet_vmap."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(written: Path, place: Path) -> None:
    """Move a file, with its external data, or a model's folder to its place, by renaming."""
    if written.is_dir():
        _move_folder(written, place)
        return
    data = written.with_name(f"{written.name}.data")
    if data.exists():
        os.replace(data, place.with_name(data.name))
    if place.exists():
        os.chmod(written, place.stat().st_mode & 0o777)
    os.replace(written, place)


def _move_folder(written: Path, place: Path) -> None:
    """Move a folder; one that is there is moved away first, and back if that fails."""
    before = written.with_name(f"{written.name}.before")
    has_parent = place.parent.is_dir()
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        os.rename(place, before)
    try:
        os.rename(written, place)
    except BaseException:
        if before.exists():
            os.rename(before, place)
        if not has_parent:
            place.parent.rmdir()
        raise
