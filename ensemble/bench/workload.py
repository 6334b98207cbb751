"""N models and their images, and the device that their rows are measured on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ensemble.bench import environment, first_forward, roofline
from ensemble.bench.case import Case
from ensemble.bench.config import Config, ModelOptions
from ensemble.bench.environment import Environment
from ensemble.bench.first_forward import FirstForward, of_image
from ensemble.errors import InputError
from ensemble.formatting import count
from ensemble.machine import cores, devices, memory
from ensemble.models import architectures, outputs, sources, stacking, weights
from ensemble.models.architectures import Architecture
from ensemble.models.images import CachedImages, augmented, check_size, read_image, synthetic
from ensemble.models.preprocessing import IMAGENET, Preprocessing, adapted
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
    images: Callable[[int], Tensor]  # px -> (count, channels, px, px), float32, like the models
    # The architecture that workers construct the models of; None: they unpickle their structure,
    # which fails for what pickle does not support, as in functions of the user.
    arch: str | None = None
    preprocessing: Preprocessing = IMAGENET
    image_size: int | None = None  # the architecture's own

    def save_shared(self, file: str | BinaryIO, image_sizes: Sequence[int]) -> None:
        """Write models and images to a file that other processes map: see `load_shared`."""
        models = [outputs.unwrapped(model) for model in self.models]
        content = {
            "skeleton": stacking.skeleton(models[0]) if self.arch is None else None,
            "state": {name: stack.cpu() for name, stack in stacked_state(models).items()},
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
        """What each of the first models gives for one image `(1, channels, H, W)`: logits
        `(classes,)`, or another tensor."""
        return [of_image(model(image)) for model in self.models[:count]]

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
        described = environment.describe(
            self.device,
            allocator=config.run.allocator,
            weights=self.weights,
            first_forward_s=first_forward_s,
        )
        return replace(described, preprocessing=self.preprocessing.describe())


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
    own = architectures.find(config.models.arch, channels=config.models.channels)
    config = config.for_architecture(own.image_size)
    preprocessing = preprocessing_of(config, own)
    images = read_images(config, device, preprocessing)
    count = max(config.models.num_models)
    with memory.out_of_memory_as_input_error(f"{count} models are loaded", argument="num_models"):
        models, source = sources.load(
            config.models.model_path,
            arch=config.models.arch,
            num_models=count,
            device=device,
            seed=config.run.seed,
            say=say,
            channels=config.models.channels,
            output=outputs.parse(config.models.output),
        )
    report_image(config, images, preprocessing, say=say)
    if config.report.verbose:
        say(str(models[0]))
    arch = None if architectures.is_torchvisions(config.models.arch) else config.models.arch
    return Workload(measured_on, models, source, images, arch, preprocessing, own.image_size)


def is_remote(config: Config, device: torch.device) -> bool:
    """Do fresh processes measure on an accelerator, which this process then leaves to them?"""
    return bool(config.measure.processes) and device.type != "cpu"


def preprocessing_of(config: Config, architecture: Architecture) -> Preprocessing:
    """The architecture's preprocessing, with what the configuration changes of it."""
    models = config.models
    return adapted(
        architecture.preprocessing,
        channels=models.channels,
        mean=models.image_mean,
        std=models.image_std,
    )


def read_images(
    config: Config, device: torch.device, preprocessing: Preprocessing
) -> Callable[[int], Tensor]:
    """As many images as the largest case, or a load test, needs, by px; the first size is made at
    once. Synthetic ones without a path.

    Raises:
        InputError: a bad file, or more than memory holds.
    """
    per_model = max(config.models.num_models) if config.models.inputs == "per_model" else 1
    count = max(config.models.batch_size) * per_model
    count = max(count, IMAGES_UNDER_LOAD) if config.load else count
    options: dict[str, Any] = {"seed": config.run.seed, "preprocessing": preprocessing}
    if config.models.image_path is None:
        make = partial(synthetic, count, **options)
    else:
        image = read_image(config.models.image_path)
        for px in config.models.image_size:  # before the first of them is measured
            check_size(image, image_size=px, preprocessing=preprocessing)
        make = partial(augmented, image, count, **options)
    images = CachedImages(lambda px: make(image_size=px), device)
    images(config.models.image_size[0])
    return images


def report_image(
    config: Config,
    images: Callable[[int], Tensor],
    preprocessing: Preprocessing,
    *,
    say: Callable[[str], None],
) -> None:
    """Print the path and the shape of the image, and how it is normalized if that is unusual."""
    path, seed = config.models.image_path, config.run.seed
    shape = images(config.models.image_size[0])[:1].shape
    if path is None:
        channels = count(preprocessing.channels, "channel")
        say(f"Generating synthetic images of {channels}, seed {seed}")
        say(f"Generated image of shape {shape}")
    else:
        say(f"Loading image from {path}")
        say(f"Converted image to shape {shape}")
    if preprocessing != IMAGENET:
        say(f"Preprocessing: {preprocessing.describe()}")


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
    skeleton = content["skeleton"] or _constructed(config.models.arch, state)
    models = stacking.from_stack(skeleton, state)
    selected = outputs.selected(models, outputs.parse(config.models.output))
    return Workload(here, selected, "another process", sizes.__getitem__)


def _constructed(arch: str, state: Mapping[str, Tensor]) -> nn.Module:
    """A model of an architecture on the meta device, with the names and shapes of stacked tensors.

    Raises:
        InputError: its function gives another architecture here than in the process that made them.
    """
    own = {name: stack[0] for name, stack in state.items()}
    model = weights.template_of_state(arch, own, source="another process").model
    found = {name: tensor.shape for name, tensor in stacking.named_tensors(model).items()}
    if found != {name: tensor.shape for name, tensor in own.items()}:
        message = f"expected {arch} to give the same architecture in each process"
        raise InputError(message, argument="arch")
    return model


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
