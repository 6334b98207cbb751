"""Checkpoint files -> eval-mode models, straight into one stack. Every error names its file."""

import difflib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ensemble import formatting
from ensemble.errors import InputError
from ensemble.machine import memory
from ensemble.models import checkpoints, stacking
from ensemble.models.checkpoints import State
from ensemble.models.meta import ByShape
from ensemble.models.vision import torchvision

_COUNTER = ".num_batches_tracked"  # absent before torch 0.4.1, of no use to a forward

log = logging.getLogger(__name__)


def architectures() -> list[str]:
    """The names of torchvision's classification architectures."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def load_models(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    arch: str,
    device: str | torch.device,
    num_models: int | None = None,
    say: Callable[[str], None] = log.info,
) -> list[nn.Module]:
    """Eval-mode float32 models from checkpoint files, all slices of one stack on `device`.

    One file gives `num_models` independent copies (one where it is not given), K files give K
    models. The number of classes is taken from the last layer. A prefix that all names of a file
    share is taken off (see `without_prefix`), and `say` is told of it in one line.

    Raises:
        InputError: a file that is not a usable checkpoint of `arch`, or K files for another N.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    wanted = len(paths) if num_models is None else num_models
    if wanted < 1 or not paths or len(paths) not in (1, wanted):
        found = f"{formatting.count(len(paths), 'file')} for {formatting.count(wanted, 'model')}"
        message = f"expected one file, or one for each model, found {found}"
        raise InputError(message, argument="paths")
    expected = stacking.named_tensors(build_skeleton(arch, None))
    states = (
        (str(path), _told(checkpoints.read(path), expected, source=str(path), say=say))
        for path in paths
    )
    copies = wanted if len(paths) == 1 else 1
    return _from_states(states, arch=arch, count=wanted, copies=copies, device=torch.device(device))


def models_from_state(
    state: State, *, arch: str, source: str, num_models: int, device: torch.device
) -> list[nn.Module]:
    """N independent models that each hold a copy of `state`, which came from `source`."""
    states = [(source, state)]
    return _from_states(states, arch=arch, count=num_models, copies=num_models, device=device)


def random_models(
    num_models: int, *, arch: str, device: torch.device, seed: int
) -> list[nn.Module]:
    """N models with torchvision's own initialisation, model n drawn with seed `seed + n`."""
    models = _allocate(build_skeleton(arch, None), num_models, device)
    for index, model in enumerate(models):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + index)  # torch.manual_seed: all devices
            drawn = _construct(arch, None)
        _fill(model, stacking.named_tensors(drawn))
    return models


def without_prefix(state: State, expected: Collection[str]) -> tuple[State, str]:
    """A state under the names that `expected` has most of, and the prefix that was taken off.

    Training wraps a model and its names: `module.` (DataParallel, AveragedModel), `_orig_mod.`
    (torch.compile), `model.` (Lightning), `backbone.`, several of them one after another. The
    prefix is the beginning that leaves the most names of `expected`: where none fits better than
    the names as they are, none.

    Beside a whole model under a prefix there may be tensors that are no part of it: the counter of
    an AveragedModel, the weights of a loss. They are left out, unless a name of `expected` ends
    theirs: what could be a weight of a second model is never dropped.
    """
    hits = Counter({"": 0})
    for name in state:
        hits.update(prefix for prefix in _beginnings(name) if name[len(prefix) :] in expected)
    prefix = max(hits, key=lambda prefix: hits[prefix])  # the first of those with as many
    inside = {name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    whole = all(name in inside or name.endswith(_COUNTER) for name in expected)
    others = [
        name
        for name in outside
        if not whole or any(name[len(begin) :] in expected for begin in _beginnings(name))
    ]
    beside = {
        f"{name} (beside {prefix}{name})" if name in inside else name: state[name]
        for name in others
    }
    return inside | beside, prefix


def _beginnings(name: str) -> Iterator[str]:
    """The prefixes that a name may have, none first: of `a.b.c` those are ``, `a.`, `a.b.`."""
    parts = name.split(".")
    return (".".join([*parts[:count], ""]) for count in range(len(parts)))


def check_arch(arch: str) -> None:
    """Raise InputError unless torchvision has a classification architecture of that name."""
    known = architectures()
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=3) or ["resnet18", "resnet50"]
        raise InputError(
            f"expected one of torchvision's {len(known)} classification architectures"
            f" ({', '.join(close)}, ...), found {arch!r}",
            argument="arch",
        )


def build_skeleton(arch: str, classes: int | None) -> nn.Module:
    """`arch` in eval mode on the meta device: names and shapes, no memory.

    Raises:
        InputError: no such architecture in torchvision.
    """
    check_arch(arch)
    try:
        with torch.device("meta"), ByShape():
            return _construct(arch, classes)
    except NotImplementedError:  # RegNet computes its widths from the values of tensors
        with torch.random.fork_rng(devices=[]):
            return stacking.skeleton(_construct(arch, classes))


def num_classes(state: Mapping[str, Tensor], *, arch: str, source: str) -> int:
    """The number of classes of a checkpoint: the first dimension of the last layer's tensor."""
    last = [*dict(build_skeleton(arch, None).named_parameters())][-1]
    if last in state and state[last].dim() and not len(state[last]):
        shape = tuple(state[last].shape)
        raise InputError(f"{source}: expected at least one class, found {last} of shape {shape}")
    if last not in state or state[last].dim() == 0:
        found = f"{len(state)} tensors, the first {next(iter(state), 'none')}"
        raise InputError(f"{source}: expected a {arch} with {last}, found {found}")
    return state[last].shape[0]


def check_state(
    state: State, template: nn.Module, *, arch: str, source: str, first_source: str | None
) -> None:
    """Raise InputError unless `state` has the names, shapes and kinds of dtype of `template`."""
    expected = stacking.named_tensors(template)
    like = f" like {first_source}" if first_source else ""
    missing = [name for name in expected if name not in state and not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in expected]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{source}: expected a {arch}{like}, found {names[0]}{more} {kind}")
    for name, tensor in state.items():
        want, have = tuple(expected[name].shape), tuple(tensor.shape)
        if want != have:
            raise InputError(f"{source}: expected {name} of shape {want}{like}, found {have}")
        floating = expected[name].is_floating_point()
        if floating != tensor.is_floating_point() and not name.endswith(_COUNTER):
            kind = "floating" if floating else "whole numbers"
            raise InputError(f"{source}: expected {name} to be {kind}, found {tensor.dtype}")


def _from_states(
    states: Iterable[tuple[str, State]], *, arch: str, count: int, copies: int, device: torch.device
) -> list[nn.Module]:
    """`count` models in one stack, `copies` of each state; one state at a time is in memory."""
    models: list[nn.Module] = []
    first_source = None
    for index, (source, state) in enumerate(states):
        if first_source is None:
            template = build_skeleton(arch, num_classes(state, arch=arch, source=source))
        check_state(state, template, arch=arch, source=source, first_source=first_source)
        _check_finite(state, source)
        if first_source is None:
            models, first_source = _allocate(template, count, device), source
        for model in models[index * copies : (index + 1) * copies]:
            _fill(model, state)
    return models


def _check_finite(state: State, source: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise InputError(f"{source}: expected finite weights, found NaN or infinity in {name}")


def _told(
    state: State, expected: Collection[str], *, source: str, say: Callable[[str], None]
) -> State:
    found, prefix = without_prefix(state, expected)
    inside = sum(name.startswith(prefix) for name in state)
    if inside == len(state) and prefix:
        say(f"{source}: all {inside} names begin with {prefix!r}: loaded without it")
    elif prefix:
        left = [name for name in state if not name.startswith(prefix) and name not in found]
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        without = f", and without {left[0]}{more}" if left else ""
        say(f"{source}: {inside} names begin with {prefix!r}: loaded without it{without}")
    return found


def _construct(arch: str, classes: int | None) -> nn.Module:
    options = {} if classes is None else {"num_classes": classes}
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their default initialisation.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
        model: nn.Module = torchvision.models.get_model(arch, weights=None, **options)
    return model.eval().requires_grad_(False)


def _allocate(template: nn.Module, num_models: int, device: torch.device) -> list[nn.Module]:
    each, free = stacking.weight_bytes(template), memory.available_bytes(device)
    if free is not None and each * num_models > free:
        raise InputError(
            f"the weights of {formatting.count(num_models, 'model')} need"
            f" {each * num_models / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}:"
            f" at most {free // each} fit",
            argument="num_models",
        )
    return stacking.allocate(template, num_models, device=device)


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in stacking.named_tensors(model).items():
        if name in state:
            tensor.copy_(state[name])
        else:
            tensor.zero_()
