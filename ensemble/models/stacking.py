"""N models -> one stacked state; where the models' own tensors are slices of it, held once.

`functorch.combine_state_for_ensemble` and `torch.func.stack_module_state` both copy: for 16
ResNet-18 they peak at 3.0 and 2.0 times the models' weights. `allocate` makes models that
are slices from the start, and `stacked_state` hands their common memory out as it is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ensemble.errors import UnavailableError, first_line
from ensemble.models import architecture_check, self_references


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` by its qualified name, detached (memory shared)."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tensor of `model` -> the name that `named_tensors` has it under."""
    first = {
        id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())
    }
    every = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: first[id(tensor)] for name, tensor in every}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose tensors are on the meta device: its structure for no memory.

    Tensors that are plain attributes are constants, and keep their values. What cannot be copied,
    a lock or a generator of random numbers, is shared.

    Raises:
        UnavailableError: something deeper in the model cannot be copied.
    """
    memo: dict[int, object] = {}
    if isinstance(model, torch.jit.ScriptModule):
        raise UnavailableError("this model cannot be copied: it is a TorchScript module")
    if function := self_references.to_itself(model):
        raise UnavailableError(f"this model cannot be copied: {function} in it refers to the model")
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
            elif not _is_copied(value):
                memo[id(value)] = value
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.layout != torch.strided:
            raise UnavailableError(f"this model cannot be copied: a tensor has {tensor.layout}")
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
    if shared:  # by a __deepcopy__ of its own: to write into it would be to write into the model
        raise UnavailableError(f"this model cannot be copied: its {shared[0]} gives itself")
    return copied


def _is_copied(value: object) -> bool:
    """Can `copy.deepcopy` copy an attribute of a module? Of modules and tensors it must."""
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
    """N eval-mode models shaped like `template`, their tensors uninitialised slices of one stack.

    Each floating tensor takes `dtype` where one is given. No model needs a gradient.
    """
    models = [skeleton(template).eval() for _ in range(num_models)]
    parts: list[dict[str, Tensor]] = [{} for _ in models]
    for name, tensor in named_tensors(template).items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        stacked = torch.empty_strided(
            (num_models, *tensor.shape),
            (tensor.numel(), *tensor.stride()),  # the template's memory format, channels-last say
            device=device,
            dtype=wanted,
        )
        for tensors, part in zip(parts, stacked, strict=True):
            tensors[name] = part
    for model, tensors in zip(models, parts, strict=True):
        set_tensors(model, tensors)
    return models


def from_stack(template: nn.Module, state: Mapping[str, Tensor]) -> list[nn.Module]:
    """N eval-mode models shaped like `template`: slices of the stacks in `state`."""
    count = len(next(iter(state.values())))
    models = [skeleton(template).eval() for _ in range(count)]
    for index, model in enumerate(models):
        set_tensors(model, {name: stacked[index] for name, stacked in state.items()})
    return models


def cast(models: Sequence[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """Copies of `models` in another floating dtype, stacked like those of `allocate`.

    Raises:
        ValueError: models that `check_alike` refuses.
    """
    check_alike(models)
    sources = [named_tensors(model) for model in models]
    device = next(iter(sources[0].values())).device
    copies = allocate(models[0], len(models), device=device, dtype=dtype)
    for source, model in zip(sources, copies, strict=True):
        for name, tensor in named_tensors(model).items():
            tensor.copy_(source[name])
    return copies


def stacked_state(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The tensors of N models by name, each `(N, *shape)`.

    What the models hold is never changed. Tensors that already are consecutive slices of one stack,
    those of `allocate` and every run of them, are handed out as they lie, for no memory; others
    are copied into one.

    Raises:
        ValueError: models that `check_alike` refuses.
    """
    check_alike(models)
    sources = [named_tensors(model) for model in models]
    with torch.inference_mode(False), torch.no_grad():
        state = {}
        for name in sources[0]:
            tensors = [tensors[name] for tensors in sources]
            stacked = _as_one(tensors)
            state[name] = torch.stack(tensors) if stacked is None else stacked
        return state


def stateless(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """`f(tensors by name, x) -> model(x)` with those tensors in place of the model's own."""
    structure = skeleton(model)
    return lambda state, x: functional_call(structure, state, (x,))


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with tensors of its own: calls of it leave no trace in the model."""
    structure = skeleton(model).eval()
    with torch.inference_mode(False), torch.no_grad():
        copies = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    set_tensors(structure, copies)
    return structure


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of one model."""
    return sum(tensor.nbytes for tensor in named_tensors(model).values())


def is_in_train_mode(model: nn.Module) -> bool:
    """Is a part of `model`? What torch.export made has kept its mode, and no `eval` of its own."""
    if "eval" in vars(model):
        return False
    return any(getattr(module, "training", False) for module in model.modules())


def check_alike(models: Sequence[nn.Module]) -> None:
    """Can the code of model 0 run with the tensors of each of `models`?

    Raises:
        ValueError: no models; models of different classes, tensors, dtypes, devices, modes, or
            attributes, as far as `likeness.described` sees them.
    """
    if not models:
        raise ValueError("expected at least one model, found none")
    first, tensors, names = models[0], named_tensors(models[0]), first_names(models[0])
    plain: dict[str, object] = {}
    for index, model in enumerate(models):
        where = f"model {index}"
        if type(model) is not type(first):
            expected, found = type(first).__name__, type(model).__name__
            found = f"another class {found}" if found == expected else f"a {found}"
            raise ValueError(f"{where}: expected a {expected} like model 0, found {found}")
        if is_in_train_mode(model):
            raise ValueError(f"{where}: expected eval mode, found train mode; call model.eval()")
        state, tied = named_tensors(model), first_names(model)
        differing = sorted(state.keys() ^ tensors.keys()) or sorted(
            name for name, _ in names.items() ^ tied.items()
        )
        if differing:
            raise ValueError(
                f"{where}: expected the tensors of model 0, they differ in {differing[0]}"
            )
        for name, tensor in state.items():
            expected, found = _signature(tensors[name]), _signature(tensor)
            if expected != found:
                raise ValueError(f"{where}: expected {name} to be {expected}, found {found}")
        if repr(model) != repr(first):  # strides, activations: what the tensors do not show
            raise ValueError(f"{where}: expected the structure of model 0, found another")
        attributes = architecture_check.described(model)
        plain = attributes if model is first else plain
        unlike = [key for key in plain | attributes if plain.get(key) != attributes.get(key)]
        if unlike:
            expected, found = (architecture_check.value(one, unlike[0]) for one in (first, model))
            found = "another of that name" if found == expected else found
            raise ValueError(f"{where}: expected {unlike[0]} to be {expected}, found {found}")


def _signature(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """The stack that `tensors` are consecutive slices of, or None where they are not."""
    first, step = tensors[0], tensors[0].numel()
    try:
        stacked = first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
        together = all(
            tensor.is_set_to(part) for tensor, part in zip(tensors, stacked, strict=True)
        )
    except RuntimeError:  # the storage ends before the stack would, or the tensors are fake
        return None
    return stacked if together else None


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put each tensor in the place of the parameter or buffer of that name, and of its others."""
    every = first_names(model)
    made: dict[str, Tensor] = {}
    for name, first in every.items():
        if first not in tensors:
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if first not in made:
            is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
            tensor = tensors[first]
            made[first] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        setattr(module, leaf, made[first])
