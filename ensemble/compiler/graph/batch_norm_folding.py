"""Batch norm folded into the convolution before it: the same function, fewer passes over memory."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ensemble.compiler.graph.capture import (
    Call,
    Recording,
    record,
    renumbered,
)
from ensemble.compiler.runtime import serial_copy
from ensemble.errors import UnavailableError
from ensemble.machine.memory import unavailable_on_failure
from ensemble.models import stacking

# The share of an output of integers or booleans that rounding may change: pixels at a threshold.
FLIPPED = 0.05
Pairs = dict[
    int, tuple[str, str]
]  # the call of a norm -> the names of its convolution, and its own


def folded(models: Sequence[nn.Module], example: Tensor) -> list[nn.Module]:
    """Copies of `models` without the batch norms that follow a convolution, in channels-last.

    They stay modules of their own class (each folded norm becomes an Identity), so they stack, and
    are slices of one stack as those of `stacking.allocate` are. The fold is computed in float64.
    Where the models' code would do something else without the norms, for it looks at its modules
    (`isinstance(layer, nn.BatchNorm2d)`, `conv.bias is None`), or for other values (`if x.max() >
    1`), none is folded.

    Args:
        models: alike, in eval mode.
        example: `(B, C, H, W)`, or `(N, B, C, H, W)`: one batch for each.

    Raises:
        UnavailableError: their code does not run on images that lie channels-last in memory.
        ValueError: models that `stacking.check_same_architecture` refuses.
    """
    stacking.check_same_architecture(models)
    x = example[0] if example.dim() == 5 else example
    before = record(stacking.private_copy(models[0]), x.clone())
    pairs = {} if before.reads_values else _foldable(models[0], before)
    copies = _copies(models, list(pairs.values()), example.device)
    after = _recorded(copies[0], x, is_needed=not pairs)
    if pairs and not (after and _is_same(before, after, pairs)):
        copies = _copies(models, [], example.device)
        after = _recorded(copies[0], x, is_needed=True)
    if after and not is_close(after.result, before.result):
        again = record(stacking.private_copy(models[0]), x.clone())
        if is_close(again.result, before.result):  # else it is random
            raise UnavailableError("this model gives another result channels-last")
    return copies


class ContiguousGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` for channels-last images, of which torch's loses digits: 35 % of the result
    where the mean is 1000 times the deviation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


def _use_contiguous_norms(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ContiguousGroupNorm


def _recorded(model: nn.Module, x: Tensor, *, is_needed: bool) -> Recording | None:
    """What a copy does with channels-last images; None where it fails, unless that `is_needed`."""
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
    """The models in channels-last with the norms of these pairs folded."""
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
    """The skeleton of `model` in channels-last, with these norms gone."""
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
    """`x`, `(B, 3, H, W)` or `(N, B, 3, H, W)`, with its channels last in memory; in memory of its
    own where a `copy` is asked for."""
    return serial_copy.contiguous(x.movedim(-3, -1), copy=copy).movedim(-1, -3)


def private(x: Tensor) -> Tensor:
    """A channels-last copy of x."""
    return channels_last(x, copy=True)


def _foldable(model: nn.Module, recording: Recording) -> Pairs:
    """The norms that alone read the result of a convolution, both layers of torch's own class,
    called once, with tensors that nothing else reads."""
    names, owners = _names(model), _owners(model)

    def layer_of(call: Call, kind: type[nn.Module]) -> str | None:
        """The name of the one layer of this kind whose tensors a call reads, all that it has."""
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
        once = all(len(recording.readers(("state", name))) == 1 for name in own)
        fits = type(layer) is kind and alone and unshared and once and set(read) == own
        return path if fits else None

    pairs: Pairs = {}
    for index, call in enumerate(recording.calls):
        if call.function is not functional.batch_norm or call.arguments[0][0] != "result":
            continue
        _, source, position = call.arguments[0]
        assert isinstance(source, int)
        conv_call = recording.calls[source]
        if conv_call.function is not functional.conv2d or position != 0:
            continue
        if recording.readers(call.arguments[0]) != [index]:
            continue
        conv, norm = layer_of(conv_call, nn.Conv2d), layer_of(call, nn.BatchNorm2d)
        if conv is not None and norm is not None and _has_statistics(model.get_submodule(norm)):
            pairs[index] = conv, norm
    return pairs


def _is_same(before: Recording, after: Recording, pairs: Pairs) -> bool:
    """Do the folded models do what the models do, but for the norms and the convolutions' bias?"""
    norms = {index: before.calls[index].arguments[0] for index in pairs}
    plain = renumbered(before, norms)
    biases = {f"{conv}.weight" for conv, _ in pairs.values()}

    def but_for_biases(recording: Recording) -> list[tuple[object, ...]]:
        calls: list[tuple[object, ...]] = []
        for call in recording.calls:
            arguments = call.arguments
            if len(arguments) > 2 and arguments[1][0] == "state" and arguments[1][1] in biases:
                arguments = (*arguments[:2], *arguments[3:])
            calls.append((call.function, arguments))
        return calls

    same = but_for_biases(plain) == but_for_biases(after) and plain.output == after.output
    return same and is_close(after.result, before.result)


def is_close(found: object, expected: object) -> bool:
    """Are outputs the same but for rounding, by far? What has no values is."""
    if type(found) is not Tensor or type(expected) is not Tensor:
        return True
    if any(t.layout != torch.strided or t.is_quantized or t.is_nested for t in (found, expected)):
        return True  # these are refused for what they are
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
    """Of each tensor, how many modules have it."""
    modules = {id(module): module for module in model.modules()}.values()
    return Counter(id(tensor) for module in modules for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _is_bare(module: nn.Module) -> bool:
    """Does a call of `module` run the forward of its class, and nothing around it?"""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def _has_statistics(module: nn.Module) -> bool:
    """A batch norm whose result is a linear function of its input, the same for every batch."""
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
