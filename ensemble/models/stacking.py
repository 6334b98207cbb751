"""N models -> one stacked state, without copying where the models' tensors are slices of a stack.

`functorch.combine_state_for_ensemble` and `torch.func.stack_module_state` both copy: for 16
ResNet-18 their peak memory is 3.0 and 2.0 times the weights. `allocate` creates models whose
tensors are slices of a stack, and `stacked_state` returns that stack.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ensemble.errors import UnavailableError, first_line
from ensemble.models import architecture_check, self_references


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` by qualified name, detached (aliases its memory)."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tensor of `model`, also of tied ones -> its name in `named_tensors`."""
    first = {
        id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())
    }
    every = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: first[id(tensor)] for name, tensor in every}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers are on the meta device: it has no memory.

    Tensors in plain attributes are constants and keep their values. Attributes that cannot be
    copied, such as locks and random generators, are shared.

    Raises:
        UnavailableError: the model cannot be copied: it is a TorchScript module, one of its
            functions refers to it, or a nested object does not support deepcopy.
    """
    memo: dict[int, object] = {}
    if isinstance(model, torch.jit.ScriptModule):
        raise UnavailableError("this model cannot be copied: it is a TorchScript module")
    if function := self_references.find(model):
        raise UnavailableError(f"this model cannot be copied: {function} refers to the model")
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
            elif not _is_copied(value):
                memo[id(value)] = value
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.layout != torch.strided:
            layout = tensor.layout
            raise UnavailableError(f"this model cannot be copied: a tensor has layout {layout}")
        meta = tensor.detach().to("meta")  # empty_like imports sympy here
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if is_parameter else meta
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UnavailableError(f"this model cannot be copied: {reason}") from error
    own = {id(module) for module in model.modules()}
    shared = [type(module).__name__ for module in copied.modules() if id(module) in own]
    if shared:  # a custom __deepcopy__: writing to the copy would modify the model
        message = f"__deepcopy__ of {shared[0]} returns the original"
        raise UnavailableError(f"this model cannot be copied: {message}")
    return copied


def _is_copied(value: object) -> bool:
    """Whether `copy.deepcopy` supports a module attribute; modules and tensors must be copied."""
    if value is None or isinstance(value, bool | int | float | str | nn.Module):
        return True
    if isinstance(value, dict) and any(isinstance(v, Tensor | nn.Module) for v in value.values()):
        return True
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def allocate(
    template: nn.Module, num_models: int, *, device: torch.device, dtype: torch.dtype | None = None
) -> list[nn.Module]:
    """N eval-mode models like `template`, whose tensors are uninitialized slices of one stack.

    dtype: of floating-point tensors; default: the template's. No parameter requires grad.
    """
    models = [skeleton(template).eval() for _ in range(num_models)]
    parts: list[dict[str, Tensor]] = [{} for _ in models]
    for name, tensor in named_tensors(template).items():
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        stacked = torch.empty_strided(
            (num_models, *tensor.shape),
            (tensor.numel(), *tensor.stride()),  # preserves the memory format
            device=device,
            dtype=target,
        )
        for tensors, part in zip(parts, stacked, strict=True):
            tensors[name] = part
    for model, tensors in zip(models, parts, strict=True):
        set_tensors(model, tensors)
    return models


def from_stack(template: nn.Module, state: Mapping[str, Tensor]) -> list[nn.Module]:
    """N eval-mode models like `template`, whose tensors are slices of the stacks in `state`."""
    count = len(next(iter(state.values())))
    models = [skeleton(template).eval() for _ in range(count)]
    for index, model in enumerate(models):
        set_tensors(model, {name: stacked[index] for name, stacked in state.items()})
    return models


def cast(models: Sequence[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """Copies of `models` in another floating-point dtype, stacked like those of `allocate`.

    Raises:
        ValueError: see `check_same_architecture`.
    """
    check_same_architecture(models)
    sources = [named_tensors(model) for model in models]
    device = next(iter(sources[0].values())).device
    copies = allocate(models[0], len(models), device=device, dtype=dtype)
    for source, model in zip(sources, copies, strict=True):
        for name, tensor in named_tensors(model).items():
            tensor.copy_(source[name])
    return copies


def stacked_state(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The tensors of N models by name, each `(N, *shape)`.

    The models are not modified. Tensors that are consecutive slices of one stack, as created by
    `allocate`, are returned as a view of it; others are copied.

    Raises:
        ValueError: see `check_same_architecture`.
    """
    check_same_architecture(models)
    sources = [named_tensors(model) for model in models]
    with torch.inference_mode(False), torch.no_grad():
        state = {}
        for name in sources[0]:
            tensors = [tensors[name] for tensors in sources]
            stacked = _existing_stack(tensors)
            state[name] = torch.stack(tensors) if stacked is None else stacked
        return state


def stateless(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """`f(tensors by name, x) -> model(x)` with those tensors as parameters and buffers."""
    structure = skeleton(model)
    return lambda state, x: functional_call(structure, state, (x,))


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy of `model` in eval mode: calling it does not mutate the model."""
    structure = skeleton(model).eval()
    with torch.inference_mode(False), torch.no_grad():
        copies = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    set_tensors(structure, copies)
    return structure


def with_state(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """A copy of `model` with the weights of its `state_dict()`; buffers that are not part of that
    stay, and extra state is ignored.

    Raises:
        ValueError: other names, shapes or dtypes than the model's.
    """
    copied, names = private_copy(model), canonical_names(model)
    own = named_tensors(copied)
    expected = {name for name in copied.state_dict() if name in names}
    given = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    for name in sorted(expected ^ given.keys()):
        found = "got none" if name in expected else "got one that the model does not have"
        raise ValueError(f"state dict: expected the names of the model's: {name}: {found}")
    for name, value in given.items():
        target = own[names[name]]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            kind = type(value).__name__
            raise ValueError(f"state dict: expected {name} to be a dense tensor, got {kind}")
        if (target.shape, target.dtype) != (value.shape, value.dtype):
            wanted, found = (f"{tuple(t.shape)} {t.dtype}" for t in (target, value))
            raise ValueError(f"state dict: expected {name} to be {wanted}, got {found}")
    with torch.inference_mode(False), torch.no_grad():
        for name, value in given.items():
            own[names[name]].copy_(value)
    return copied


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of one model."""
    return sum(tensor.nbytes for tensor in named_tensors(model).values())


def is_in_train_mode(model: nn.Module) -> bool:
    """Whether any submodule is in train mode; false for modules of torch.export, whose mode is
    fixed."""
    if "eval" in vars(model):
        return False
    return any(getattr(module, "training", False) for module in model.modules())


def check_same_architecture(models: Sequence[nn.Module]) -> None:
    """Check that the code of model 0 can run with the tensors of each of `models`.

    Raises:
        ValueError: no models; or models that differ in class, names, shapes, dtypes or devices of
            tensors, training mode, or other attributes (see `architecture_check.fingerprint`).
    """
    if not models:
        raise ValueError("expected at least one model, got none")
    first, tensors, names = models[0], named_tensors(models[0]), canonical_names(models[0])
    reference: dict[str, object] = {}
    for index, model in enumerate(models):
        where = f"model {index}"
        if type(model) is not type(first):
            expected, found = type(first).__name__, type(model).__name__
            found = f"another class {found}" if found == expected else found
            raise ValueError(f"{where}: expected {expected} like model 0, got {found}")
        if is_in_train_mode(model):
            raise ValueError(f"{where}: expected eval mode, got train mode; call model.eval()")
        state, tied = named_tensors(model), canonical_names(model)
        differing = sorted(state.keys() ^ tensors.keys()) or sorted(
            name for name, _ in names.items() ^ tied.items()
        )
        if differing:
            raise ValueError(
                f"{where}: expected the tensors of model 0, but they differ in {differing[0]}"
            )
        for name, tensor in state.items():
            expected, found = _signature(tensors[name]), _signature(tensor)
            if expected != found:
                raise ValueError(f"{where}: expected {name} to be {expected}, got {found}")
        if repr(model) != repr(first):  # hyperparameters: strides, activations
            raise ValueError(f"{where}: expected a module structure (repr) like model 0")
        attributes = architecture_check.fingerprint(model)
        reference = attributes if model is first else reference
        differing = [
            key for key in reference | attributes if reference.get(key) != attributes.get(key)
        ]
        if differing:
            key = differing[0]
            expected, found = (
                architecture_check.attribute_repr(one, key) for one in (first, model)
            )
            found = "a different one with the same repr" if found == expected else found
            raise ValueError(f"{where}: expected {key} to be {expected}, got {found}")


def _signature(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _existing_stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """The stack that `tensors` are consecutive slices of; None if they are not."""
    first, step = tensors[0], tensors[0].numel()
    try:
        stacked = first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
        is_stack = all(
            tensor.is_set_to(part) for tensor, part in zip(tensors, stacked, strict=True)
        )
    except RuntimeError:  # the storage is too small, or the tensors are fake
        return None
    return stacked if is_stack else None


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the parameters and buffers of these names, keeping tied tensors tied."""
    replacements: dict[str, Tensor] = {}
    for name, canonical in canonical_names(model).items():
        if canonical not in tensors:
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if canonical not in replacements:
            tensor = tensors[canonical]
            if isinstance(getattr(module, leaf), nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            replacements[canonical] = tensor
        setattr(module, leaf, replacements[canonical])
