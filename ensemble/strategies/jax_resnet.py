"""torchvision's ResNet in JAX, channels-last and with batch norm folded: the peer `jax`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import torch
from jax import lax
from jax import numpy as jnp
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.models.vision import torchvision
from ensemble.strategies.peer_autotune import RunModels, Settings, batches
from ensemble.strategies.peer_conversion import uses_tf32

State = dict[str, jax.Array]
Function = Callable[[Any, Any], Any]  # state, inputs -> logits; of one model or of all


def settings(models: Sequence[nn.Module], example: Tensor, device: jax.Device) -> Settings:
    """A jitted forward called for each model, and a jitted vmap over the stacked models; on CUDA
    also the loop over the models as one jitted function, which is a single launch.

    torch and JAX exchange tensors by DLPack, without copies. It orders their streams on CUDA, and
    waits for the result on the CPU.

    Args:
        models: ResNets whose batch norm is folded, see `batch_norm_folding.folded`.
        example: `(B, 3, H, W)`, or `(N, B, 3, H, W)` for per-model inputs.
        device: the one of `example`.

    Raises:
        UnavailableError: the models are not torchvision ResNets.
    """
    per_model, first = example.dim() == 5, stacking.skeleton(models[0])
    if not isinstance(first, torchvision.models.ResNet):
        raise UnavailableError(f"jax requires a torchvision ResNet, got {type(first).__name__}")
    on_cuda = example.device.type == "cuda"
    compiled = with_own_layouts if on_cuda else jitted
    forward = partial(_resnet, first, precision(example.dtype))
    mapped = jax.vmap(forward, (0, 0 if per_model else None))
    stacks = stacking.stacked_state(models)

    def arrays(given: list[Tensor]) -> list[jax.Array]:
        if per_model:
            return [to_jax(batch, device) for batch in given]
        return [to_jax(given[0], device)] * len(given)

    def states() -> list[State]:
        return [
            {name: _weights(stack[index], device) for name, stack in stacks.items()}
            for index in range(len(models))
        ]

    def stacked() -> State:
        return {name: _weights(stack, device) for name, stack in stacks.items()}

    def loop(of_models: list[State], given: list[jax.Array]) -> list[jax.Array]:
        return list(map(forward, of_models, given))

    def vmap(stack: State, given: list[jax.Array]) -> list[jax.Array]:
        return list(mapped(stack, jnp.stack(given) if per_model else given[0]))

    def each(count: int) -> RunModels:
        (first_batch, *_) = arrays(batches(example, count))
        run, own = compiled(forward, states(), first_batch)
        return lambda given: _to_torch(
            [run(*of_one) for of_one in zip(own, arrays(given), strict=True)]
        )

    def at_once(function: Function, state: Callable[[], Any], count: int) -> RunModels:
        run, (own,) = compiled(function, [state()], arrays(batches(example, count)))
        return lambda given: _to_torch(run(own, arrays(given)))

    every: dict[str, Callable[[int], RunModels]] = {
        "jit of each model": each,
        "jit of vmap": partial(at_once, vmap, stacked),
    }
    return {**every, "jit of the loop": partial(at_once, loop, states)} if on_cuda else every


def precision(dtype: torch.dtype) -> lax.Precision:
    """Of products: by default XLA computes those of float32 numbers in TF32 on CUDA."""
    is_exact = dtype == torch.float32 and not uses_tf32()
    return lax.Precision.HIGHEST if is_exact else lax.Precision.DEFAULT


def to_jax(tensor: Tensor, device: jax.Device) -> jax.Array:
    """A tensor as an array on `device`, its own; of the same memory if that is aligned."""
    array: jax.Array = jax.dlpack.from_dlpack(tensor.contiguous(), device=device)
    return array


def _to_torch(logits: list[jax.Array]) -> list[Tensor]:
    """Tensors of the same memory; all are dispatched before the first is waited for."""
    return list(map(from_dlpack, logits))


def jitted(function: Function, states: list[Any], _: Any) -> tuple[Function, list[Any]]:
    """The function compiled at its first call, and the states as they are."""
    return jax.jit(function), states


def with_own_layouts(
    function: Function, states: list[Any], inputs: Any
) -> tuple[Function, list[Any]]:
    """The function compiled for weights in the layouts that XLA prefers, and the states in these.

    Otherwise it transposes the weights of each convolution to those layouts in every call.
    """
    from jax.experimental.layout import Format, Layout

    formats = (Format(Layout.AUTO), None)
    run = jax.jit(function, in_shardings=formats).lower(states[0], inputs).compile()
    preferred = run.input_formats[0][0]
    return run, [jax.device_put(state, preferred) for state in states]


def _weights(tensor: Tensor, device: jax.Device) -> jax.Array:
    """Weights of one model or of all; those of convolutions as `(..., height, width, in, out)`."""
    if tensor.dim() >= 4:
        tensor = tensor.movedim((-4, -3), (-1, -2))
    return to_jax(tensor, device)


def _resnet(
    model: torchvision.models.ResNet, precision: lax.Precision, state: State, x: jax.Array
) -> jax.Array:
    conv = partial(_conv, precision, state)
    x = jnp.transpose(x, (0, 2, 3, 1)).astype(state["fc.weight"].dtype)
    x = jax.nn.relu(conv(model.conv1, "conv1", x))
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pad)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(getattr(model, stage)):
            x = _block(block, f"{stage}.{index}", conv, x)
    x = x.mean((1, 2))
    return jnp.matmul(x, state["fc.weight"].T, precision=precision) + state["fc.bias"]


def _block(
    block: nn.Module,
    name: str,
    conv: Callable[[nn.Module, str, jax.Array], jax.Array],
    x: jax.Array,
) -> jax.Array:
    shortcut = x
    if getattr(block, "downsample", None) is not None:
        shortcut = conv(block.get_submodule("downsample.0"), f"{name}.downsample.0", x)
    layers = [layer for layer in ("conv1", "conv2", "conv3") if hasattr(block, layer)]
    for layer in layers[:-1]:
        x = jax.nn.relu(conv(block.get_submodule(layer), f"{name}.{layer}", x))
    x = conv(block.get_submodule(layers[-1]), f"{name}.{layers[-1]}", x)
    return jax.nn.relu(x + shortcut)


def _conv(
    precision: lax.Precision, state: State, conv: nn.Module, name: str, x: jax.Array
) -> jax.Array:
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv.padding, str)
    y = lax.conv_general_dilated(
        x,
        state[f"{name}.weight"],
        window_strides=conv.stride,
        padding=[(size, size) for size in conv.padding],
        rhs_dilation=conv.dilation,
        feature_group_count=conv.groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    return y + state[f"{name}.bias"]
