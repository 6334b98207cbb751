"""Load the models of a run: from files, torchvision's published weights, or random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from ensemble.models import pretrained, weights


def load(
    paths: Sequence[str] | None,
    *,
    arch: str,
    num_models: int,
    device: torch.device,
    seed: int,
    say: Callable[[str], None],
    block: range | None = None,
) -> tuple[list[nn.Module], str]:
    """N eval-mode float32 models in one stack, and a short description of their source.

    Without `paths`: the published file from the working directory, else its download, else random
    weights, which `say` reports.

    block: the part of `range(num_models)` to load; only its files are read. Default: all.

    Raises:
        InputError: unknown architecture, or invalid files.
    """
    weights.check_arch(arch)
    block = range(num_models) if block is None else block
    default = pretrained.published_name(arch)
    paths = paths or ((default,) if Path(default).exists() else None)
    if paths is None:
        return _published(arch, block, device, seed, num_models, say)
    source = ", ".join(paths)
    say(f"Loading resnet model from {source}")
    some = paths[block.start : block.stop] if len(paths) > 1 else paths
    models = weights.load_models(some, arch=arch, device=device, num_models=len(block), say=say)
    return models, source


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
        seeds = f"{seed} to {seed + num_models - 1}" if num_models > 1 else str(seed)
        say(
            f"No {pretrained.published_name(arch)} in the working directory, and the download"
            f" failed ({error.reason}): using random weights, seeds {seeds}"
        )
        say("The predicted class is meaningless, the timings are not")
        drawn = weights.random_models(len(block), arch=arch, device=device, seed=seed + block.start)
        return drawn, f"random, seeds {seeds}"
    models = weights.models_from_state(
        state, arch=arch, source=url, num_models=len(block), device=device
    )
    return models, url
