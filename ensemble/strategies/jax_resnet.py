"""torchvision's ResNet in JAX, channels-last and with batch norm folded: the peer `jax`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.models.vision import torchvision
from ensemble.strategies.peer_autotune import RunModels

State = dict[str, jax.Array]


def forwards(models: Sequence[nn.Module], example: Tensor) -> tuple[RunModels, RunModels]:
    """A jitted forward called for each model, and a jitted vmap over the stacked models.

    Args:
        models: ResNets whose batch norm is folded, see `batch_norm_folding.folded`.
        example: `(B, 3, H, W)`, or `(N, B, 3, H, W)` for per-model inputs.

    Raises:
        UnavailableError: the models are not torchvision ResNets.
    """
    first = models[0]
    if not isinstance(first, torchvision.models.ResNet):
        raise UnavailableError(f"jax requires a torchvision ResNet, got {type(first).__name__}")
    dtype = jnp.dtype(str(example.dtype).removeprefix("torch."))
    state = {
        name: _to_jax(tensor, dtype) for name, tensor in stacking.stacked_state(models).items()
    }
    states = [{name: stack[index] for name, stack in state.items()} for index in range(len(models))]

    def forward(state: State, batch: jax.Array) -> jax.Array:
        return _resnet(first, state, batch.astype(dtype)).astype(jnp.float32)

    one = jax.jit(forward)
    many = jax.jit(jax.vmap(forward, (0, 0 if example.dim() == 5 else None)))

    def loop(batches: list[np.ndarray]) -> list[np.ndarray]:
        logits = [one(weights, batch) for weights, batch in zip(states, batches, strict=True)]
        return [np.asarray(array) for array in logits]

    def vmap(batches: list[np.ndarray]) -> list[np.ndarray]:
        x = np.stack(batches) if example.dim() == 5 else batches[0]
        return list(np.asarray(many(state, x)))

    return loop, vmap


def _to_jax(stack: Tensor, dtype: np.dtype) -> jax.Array:
    """Convert a stacked tensor; convolution weights become `(N, height, width, in, out)`."""
    array = stack.float().numpy()
    return jnp.asarray(array.transpose(0, 3, 4, 2, 1) if array.ndim == 5 else array).astype(dtype)


def _resnet(model: torchvision.models.ResNet, state: State, x: jax.Array) -> jax.Array:
    x = jnp.transpose(x, (0, 2, 3, 1))
    x = jax.nn.relu(_conv(model.conv1, "conv1", state, x))
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pad)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(getattr(model, stage)):
            x = _block(block, f"{stage}.{index}", state, x)
    x = x.mean((1, 2))
    return x @ state["fc.weight"].T + state["fc.bias"]


def _block(block: nn.Module, name: str, state: State, x: jax.Array) -> jax.Array:
    shortcut = x
    if f"{name}.downsample.0.weight" in state:
        shortcut = _conv(block.get_submodule("downsample.0"), f"{name}.downsample.0", state, x)
    convs = [conv for conv in ("conv1", "conv2", "conv3") if hasattr(block, conv)]
    for conv in convs[:-1]:
        x = jax.nn.relu(_conv(block.get_submodule(conv), f"{name}.{conv}", state, x))
    x = _conv(block.get_submodule(convs[-1]), f"{name}.{convs[-1]}", state, x)
    return jax.nn.relu(x + shortcut)


def _conv(conv: nn.Module, name: str, state: State, x: jax.Array) -> jax.Array:
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
    )
    return y + state[f"{name}.bias"]
