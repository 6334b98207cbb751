"""Load the models of a run: from files, torchvision's published weights, or random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from ensemble.models import architectures, outputs, pretrained, weights
from ensemble.models.architectures import Architecture

AS_CONSTRUCTED = "as constructed"  # the source of weights that come from the user's function


def load(
    paths: Sequence[str] | None,
    *,
    arch: str,
    num_models: int,
    device: torch.device,
    seed: int,
    say: Callable[[str], None],
    block: range | None = None,
    channels: int | None = None,
    output: str | int | None = None,
) -> tuple[Sequence[nn.Module], str]:
    """N eval-mode float32 models in one stack, and a short description of their source.

    Without `paths`: of an architecture of torchvision the published file from the working
    directory, else its download, else random weights, which `say` reports; of any other the weights
    that it is constructed with.

    block: the part of `range(num_models)` to load; only its files are read. Default: all.
    channels: of the images, where the architecture has a choice.
    output: the part of their output that the models give: see `outputs.select`.

    Raises:
        InputError: unknown architecture, or invalid files.
    """
    architecture = architectures.find(arch, channels=channels)
    block = range(num_models) if block is None else block
    if architecture.has_published_weights:
        default = pretrained.published_name(arch)
        paths = paths or ((default,) if Path(default).exists() else None)
    if paths is not None:
        source = ", ".join(paths)
        name = "resnet model" if architecture.has_published_weights else arch
        say(f"Loading {name} from {source}")
        some = paths[block.start : block.stop] if len(paths) > 1 else paths
        models = weights.load_models(some, arch=arch, device=device, num_models=len(block), say=say)
    elif architecture.has_published_weights:
        models, source = _published(arch, block, device, seed, num_models, say)
    else:
        source = _source_of_new(architecture, seed, num_models)
        say(f"No --model_path: the weights of {arch} are {source}")
        if architecture.is_random:
            say(_MEANINGLESS)
        models = _new(arch, block, device, seed, channels)
    return outputs.selected(models, output), source


_MEANINGLESS = "The predicted class is meaningless, the timings are not"


def _source_of_new(architecture: Architecture, seed: int, num_models: int) -> str:
    how = "random" if architecture.is_random else AS_CONSTRUCTED
    seeds = f"{seed} to {seed + num_models - 1}" if num_models > 1 else str(seed)
    return f"{how}, seeds {seeds}"


def _new(
    arch: str, block: range, device: torch.device, seed: int, channels: int | None
) -> list[nn.Module]:
    first = seed + block.start
    return weights.random_models(
        len(block), arch=arch, device=device, seed=first, channels=channels
    )


def is_of_each_rank(source: str) -> bool:
    """Do the weights of this source come from seeds, so that each block of models has its own?"""
    return source.startswith(("random", AS_CONSTRUCTED))


def _published(
    arch: str,
    block: range,
    device: torch.device,
    seed: int,
    num_models: int,
    say: Callable[[str], None],
) -> tuple[list[nn.Module], str]:
    """The downloaded weights for all models; if the download fails, random weights."""
    url = pretrained.published_url(arch)
    say(f"Loading resnet model from {url}")
    try:
        state = pretrained.download(url)
    except URLError as error:
        source = _source_of_new(architectures.find(arch), seed, num_models)
        say(
            f"No {pretrained.published_name(arch)} in the working directory, and the download"
            f" failed ({error.reason}): using {source.replace(',', ' weights,', 1)}"
        )
        say(_MEANINGLESS)
        return _new(arch, block, device, seed, None), source
    models = weights.models_from_state(
        state, arch=arch, source=url, num_models=len(block), device=device
    )
    return models, url
