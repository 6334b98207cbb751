"""N models and their images, and the device that their rows are measured on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ensemble.bench import environment, first_forward, roofline
from ensemble.bench.case import Case
from ensemble.bench.config import Config, ModelOptions
from ensemble.bench.environment import Environment
from ensemble.bench.first_forward import FirstForward
from ensemble.errors import InputError
from ensemble.formatting import count
from ensemble.machine import cores, devices, memory
from ensemble.models import sources, stacking
from ensemble.models.images import AugmentedImages, check_size, read_image
from ensemble.models.stacking import stacked_state

# Overhead of a file per tensor, and of the structure of the models.
_PER_TENSOR_BYTES, _STRUCTURE_BYTES = 1024, 2**20
IMAGES_UNDER_LOAD = 16  # different ones that requests may ask for


@dataclass(frozen=True)
class Workload:
    """Float32 models, as many as the largest N, and their images.

    They lie on the device that rows are measured on; on the CPU where workers measure on an
    accelerator: see `load`.
    """

    device: torch.device  # that rows are measured on
    models: Sequence[nn.Module]
    weights: str  # where they come from, in a few words
    images: Callable[[int], Tensor]  # px -> (count, 3, px, px), float32 on the device of the models

    def save_shared(self, file: str | BinaryIO, image_sizes: Sequence[int]) -> None:
        """Write models and images to a file that other processes map: see `load_shared`."""
        content = {
            "skeleton": stacking.skeleton(self.models[0]),
            "state": {name: stack.cpu() for name, stack in stacked_state(self.models).items()},
            "images": {px: self.images(px).cpu() for px in image_sizes},
        }
        torch.save(content, file)

    def shared_bytes(self, image_sizes: Sequence[int]) -> int:
        """An upper bound of the bytes that `save_shared` writes."""
        images = sum(self.images(px).nbytes for px in image_sizes)
        tensors = len(stacking.named_tensors(self.models[0])) + len(image_sizes)
        weights = sum(map(stacking.weight_bytes, self.models))
        return weights + images + tensors * _PER_TENSOR_BYTES + _STRUCTURE_BYTES

    def first_forward(self, options: ModelOptions) -> FirstForward:
        """The first forward of the process that runs it, and the logits of the plain image.

        Raises:
            InputError: the architecture does not run at this image size, or not on this device.
        """
        image = self.images(options.image_size[0])[:1]
        count = max(1, len(options.model_path or ()))
        return first_forward.run(options, self.models[0], image, lambda: self.see(image, count))

    def limits_of(self, cases: Sequence[Case]) -> roofline.Measured:
        """The measured limits of the device in each dtype of the cases."""
        return roofline.limits_of(cases, self.device)

    def see(self, image: Tensor, count: int) -> list[Tensor]:
        """The logits of one image `(1, 3, H, W)` by each of the first models, `(classes,)` each."""
        return [model(image)[0] for model in self.models[:count]]

    def on_one_device(self, num_models: int) -> int:
        """How many of N models one device holds: all."""
        return num_models

    def device_name(self, config: Config) -> str:
        """The device and its threads, for the reader."""
        chosen = "the CPU" if self.device.type == "cpu" else f"{self.device}, the accelerator here"
        found = " (auto-detected)" if config.run.device == "auto" else ""
        threads = count(torch.get_num_threads(), "thread")
        return f"{chosen}{found}, {threads} on {cores.detect().describe()}"

    def describe(self, config: Config, *, first_forward_s: float) -> Environment:
        """The environment of the measurements that are about to be taken."""
        return environment.describe(
            self.device,
            allocator=config.run.allocator,
            weights=self.weights,
            first_forward_s=first_forward_s,
        )


def load(config: Config, *, say: Callable[[str], None]) -> Workload:
    """The workload of a configuration; `say` prints what is loaded.

    Where fresh processes measure on an accelerator, this one loads everything on the CPU and
    creates no context on the accelerator: it holds no memory there, and one in exclusive-process
    mode is free for the workers.

    Raises:
        InputError: no such device or setting here, bad files, or more than memory holds.
    """
    configure(config)
    measured_on = devices.find_device(config.run.device, say=say)
    _check_settings(config, measured_on)
    if is_remote(config, measured_on):
        device = torch.device("cpu")
    else:
        device = devices.select_device(str(measured_on))
    augmented = read_images(config, device)
    count = max(config.models.num_models)
    with memory.out_of_memory_as_input_error(f"{count} models are loaded", argument="num_models"):
        models, weights = sources.load(
            config.models.model_path,
            arch=config.models.arch,
            num_models=count,
            device=device,
            seed=config.run.seed,
            say=say,
        )
    report_image(config, augmented, say=say)
    if config.report.verbose:
        say(str(models[0]))
    return Workload(measured_on, models, weights, augmented)


def is_remote(config: Config, device: torch.device) -> bool:
    """Do fresh processes measure on an accelerator, which this process then leaves to them?"""
    return bool(config.measure.processes) and device.type != "cpu"


def read_images(config: Config, device: torch.device) -> AugmentedImages:
    """As many images as the largest case, or a load test, needs; the first size is made at once.

    Raises:
        InputError: a bad file, or more than memory holds.
    """
    per_model = max(config.models.num_models) if config.models.inputs == "per_model" else 1
    count = max(config.models.batch_size) * per_model
    image = read_image(config.models.image_path)
    for px in config.models.image_size:  # before the first of them is measured
        check_size(image, image_size=px)
    count = max(count, IMAGES_UNDER_LOAD) if config.load else count
    augmented = AugmentedImages(image, count, seed=config.run.seed, device=device)
    augmented(config.models.image_size[0])
    return augmented


def report_image(config: Config, images: AugmentedImages, *, say: Callable[[str], None]) -> None:
    """Print the path and the shape of the image."""
    say(f"Loading image from {config.models.image_path}")
    say(f"Converted image to shape {images(config.models.image_size[0])[:1].shape}")


def load_shared(
    path: str, config: Config, *, device: str, num_models: int | None = None
) -> Workload:
    """The workload that another process wrote by `save_shared`, of the same configuration; of the
    models only the first `num_models`.

    The file is memory-mapped: on a CPU all processes share its pages, which are resident before
    anything is timed.
    """
    here = prepare(config, device=device)
    content = torch.load(path, mmap=True, weights_only=False, map_location="cpu")
    state: Mapping[str, Tensor] = {
        name: stack[:num_models].to(here) for name, stack in content["state"].items()
    }
    sizes: Mapping[int, Tensor] = {px: batch.to(here) for px, batch in content["images"].items()}
    memory.touch([*state.values(), *sizes.values()])
    models = stacking.from_stack(content["skeleton"], state)
    return Workload(here, models, "another process", sizes.__getitem__)


def prepare(config: Config, *, device: str) -> torch.device:
    """Apply the configuration to this process; returns the device called `device`.

    Raises:
        InputError: no such device or setting here.
    """
    configure(config)
    chosen = devices.select_device(device)
    _check_settings(config, chosen)
    return chosen


def _check_settings(config: Config, device: torch.device) -> None:
    """Raise InputError for a setting that the device does not have."""
    if config.measure.flush_l2 and device.type != "cuda":
        raise InputError(f"requires a CUDA device, got {device}", argument="flush_l2")


def configure(config: Config) -> None:
    """Apply the configuration to this process, whatever its device.

    Raises:
        InputError: no such setting here.
    """
    logging.basicConfig()
    logging.getLogger("ensemble").setLevel(
        logging.DEBUG if config.report.verbose else logging.WARNING
    )
    refused = memory.retain_freed_memory() if config.run.allocator == "retain" else None
    if refused:
        raise InputError(f"retain is not available here: {refused}", argument="allocator")
    devices.configure(threads=config.run.threads)
