"""Fold batch norms into the convolutions before them, in the models' own modules.

The compiler folds them in its graph (`operator_selection`). Strategies that run the models' own
code fold them here.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ensemble.compiler.graph.call_trace import Call, CallTrace, record, renumbered
from ensemble.compiler.graph.eager_dispatch import dispatches, normalizes_channels_last
from ensemble.compiler.runtime import serial_copy
from ensemble.errors import UnavailableError
from ensemble.machine.memory import unavailable_on_failure
from ensemble.models import stacking

# The fraction of an integer or boolean output that rounding may change: pixels at a threshold.
FLIPPED = 0.05
Pairs = dict[int, tuple[str, str]]  # call of a norm -> names of its convolution and of itself


def folded(models: Sequence[nn.Module], example: Tensor) -> list[nn.Module]:
    """Copies of `models`, channels-last, without the batch norms that follow a convolution.

    They keep their class (a folded norm becomes an Identity), so they stack, and are slices of one
    stack as `stacking.allocate` makes. The fold is computed in float64. No norm is folded where the
    models' control flow may depend on it: on their modules (`isinstance(layer, nn.BatchNorm2d)`,
    `conv.bias is None`) or on values (`if x.max() > 1`).

    Args:
        models: alike, in eval mode.
        example: `(B, C, H, W)`, or `(N, B, C, H, W)`: a batch for each model.

    Raises:
        UnavailableError: their code does not run on channels-last images, or not accurately.
        ValueError: models that `stacking.check_same_architecture` refuses.
    """
    stacking.check_same_architecture(models)
    x = example[0] if example.dim() == 5 else example
    before = record(stacking.private_copy(models[0]), x.clone())
    pairs = {} if before.reads_values else _foldable(models[0], before)
    copies = _copies(models, list(pairs.values()), example.device)
    after = _recorded(copies[0], x, is_needed=not pairs)
    if pairs and not (after and _calls_the_same(before, after, pairs)):
        copies = _copies(models, [], example.device)
        after = _recorded(copies[0], x, is_needed=True)
    if _normalizes_channels_last(copies[0], x):
        raise UnavailableError("the norms of this model lose digits channels-last")
    if after and not is_close(after.result, before.result):
        again = record(stacking.private_copy(models[0]), x.clone())
        if is_close(again.result, before.result):  # else the model is random
            raise UnavailableError("this model gives another result channels-last")
    return copies


@cache
def contiguous_norm(kind: Any) -> type[nn.Module]:
    """A class of norms for channels-last images: `kind` on contiguous copies. torch's own group
    norm is inaccurate there: 35 % off if the mean is 1000 times the standard deviation."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, x.contiguous(), *args, **kwargs)

    return type(f"Contiguous{kind.__name__}", (kind,), {"forward": forward})


def _use_contiguous_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) or _uses_batch_statistics(module):
            module.__class__ = contiguous_norm(cast(Any, type(module)))


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and not module.track_running_stats


def _normalizes_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Does a copy normalize channels-last activations by their own statistics?"""
    if type(x) is not Tensor:
        return False
    copy = stacking.private_copy(model)
    return dispatches(copy, channels_last(x, copy=True), normalizes_channels_last)


def _recorded(model: nn.Module, x: Tensor, *, is_needed: bool) -> CallTrace | None:
    """The trace of a copy on channels-last images; None if it fails, unless `is_needed`."""
    try:
        with unavailable_on_failure("this model does not run channels-last"):
            return record(stacking.private_copy(model), channels_last(x, copy=True))
    except UnavailableError:
        if is_needed:
            raise
        return None


def _copies(
    models: Sequence[nn.Module], pairs: Sequence[tuple[str, str]], device: torch.device
) -> list[nn.Module]:
    """The models, channels-last, with the norms of these pairs folded."""
    template = _without_norms(models[0], pairs)
    copies = stacking.allocate(template, len(models), device=device)
    for model, copy in zip(models, copies, strict=True):
        source, target = stacking.named_tensors(model), stacking.named_tensors(copy)
        for name in target.keys() & source.keys():
            target[name].copy_(source[name])
        for conv_name, norm_name in pairs:
            weight, bias = _fold(model.get_submodule(conv_name), model.get_submodule(norm_name))
            target[f"{conv_name}.weight"].copy_(weight)
            target[f"{conv_name}.bias"].copy_(bias)
    return copies


def _without_norms(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> nn.Module:
    """The skeleton of `model`, channels-last, without these norms."""
    template = stacking.skeleton(model)
    for conv_name, norm_name in pairs:
        conv = template.get_submodule(conv_name)
        if conv.bias is None:
            empty = torch.empty(conv.out_channels, dtype=conv.weight.dtype, device="meta")
            conv.bias = nn.Parameter(empty, requires_grad=False)
        template.set_submodule(norm_name, nn.Identity().eval())
    _use_contiguous_norms(template)
    stacking.set_tensors(
        template,
        {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in stacking.named_tensors(template).items()
            if tensor.dim() == 4
        },
    )
    return template


def channels_last(x: Tensor, *, copy: bool = False) -> Tensor:
    """`x`, `(B, 3, H, W)` or `(N, B, 3, H, W)`, channels-last; always a copy if `copy`."""
    return serial_copy.contiguous(x.movedim(-3, -1), copy=copy).movedim(-1, -3)


def private(x: Tensor) -> Tensor:
    """A channels-last copy of x."""
    return channels_last(x, copy=True)


def _foldable(model: nn.Module, trace: CallTrace) -> Pairs:
    """The norms that are the only reader of a convolution. Both layers are of torch's own class and
    called once, and nothing else reads their tensors."""
    names, owners = _names(model), _owners(model)

    def layer_of(call: Call, kind: type[nn.Module]) -> str | None:
        """The name of the only layer of this kind whose tensors, all of them, a call reads."""
        read = [str(value[1]) for value in call.reads() if value[0] == "state"]
        paths = {name.rpartition(".")[0] for name in read}
        if len(paths) != 1:
            return None
        (path,) = paths
        layer = model.get_submodule(path)
        alone = names[id(layer)] == 1 and _is_bare(layer)
        own = {f"{path}.{name}" if path else name for name in stacking.named_tensors(layer)}
        own = {name for name in own if not name.endswith("num_batches_tracked")}
        unshared = all(owners[id(tensor)] == 1 for tensor in _own_tensors(layer))
        once = all(len(trace.readers(("state", name))) == 1 for name in own)
        fits = type(layer) is kind and alone and unshared and once and set(read) == own
        return path if fits else None

    pairs: Pairs = {}
    for index, call in enumerate(trace.calls):
        if call.function is not functional.batch_norm or call.arguments[0][0] != "result":
            continue
        _, source, position = call.arguments[0]
        assert isinstance(source, int)
        conv_call = trace.calls[source]
        if conv_call.function is not functional.conv2d or position != 0:
            continue
        if trace.readers(call.arguments[0]) != [index]:
            continue
        conv, norm = layer_of(conv_call, nn.Conv2d), layer_of(call, nn.BatchNorm2d)
        if conv is not None and norm is not None and _has_statistics(model.get_submodule(norm)):
            pairs[index] = conv, norm
    return pairs


def _calls_the_same(before: CallTrace, after: CallTrace, pairs: Pairs) -> bool:
    """Do the folded models call the same, apart from the norms and the convolutions' bias?"""
    norms = {index: before.calls[index].arguments[0] for index in pairs}
    plain = renumbered(before, norms)
    biases = {f"{conv}.weight" for conv, _ in pairs.values()}

    def but_for_biases(trace: CallTrace) -> list[tuple[object, ...]]:
        calls: list[tuple[object, ...]] = []
        for call in trace.calls:
            arguments = call.arguments
            if len(arguments) > 2 and arguments[1][0] == "state" and arguments[1][1] in biases:
                arguments = (*arguments[:2], *arguments[3:])
            calls.append((call.function, arguments))
        return calls

    same = but_for_biases(plain) == but_for_biases(after) and plain.output == after.output
    return same and is_close(after.result, before.result)


def is_close(found: object, expected: object) -> bool:
    """Are outputs equal up to a generous rounding tolerance? Tensors without values are."""
    if type(found) is not Tensor or type(expected) is not Tensor:
        return True
    if any(t.layout != torch.strided or t.is_quantized or t.is_nested for t in (found, expected)):
        return True  # later checks refuse these
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    if found.is_complex():
        parts = (torch.view_as_real(t.resolve_conj()) for t in (found, expected))
        return is_close(*parts)
    if not found.is_floating_point():
        return int((found != expected).sum()) <= FLIPPED * found.numel()
    exact = expected.double()
    scale = float(exact.nan_to_num(0, 0, 0).abs().amax())
    tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 0.1
    return torch.allclose(found.double(), exact, rtol=0, atol=tolerance * scale, equal_nan=True)


def _names(model: nn.Module) -> Counter[int]:
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules own each tensor."""
    modules = {id(module): module for module in model.modules()}.values()
    return Counter(id(tensor) for module in modules for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _is_bare(module: nn.Module) -> bool:
    """Does a call of `module` run the forward of its class, without hooks?"""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def _has_statistics(module: nn.Module) -> bool:
    """Has a batch norm running statistics, so that it is one affine function for all batches?"""
    return (
        type(module) is nn.BatchNorm2d
        and module.running_mean is not None
        and module.running_var is not None
    )


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    of_conv, of_norm = stacking.named_tensors(conv), stacking.named_tensors(norm)
    weight = of_conv["weight"].double()
    bias = of_conv["bias"].double() if "bias" in of_conv else None
    mean, variance = of_norm["running_mean"].double(), of_norm["running_var"].double()
    scale = of_norm["weight"].double() if "weight" in of_norm else None
    shift = of_norm["bias"].double() if "bias" in of_norm else None
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
