"""Load checkpoint files into eval-mode models that share one stack. Errors name the file."""

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
from ensemble.models.meta import MetaWithoutDynamo
from ensemble.models.vision import torchvision

_COUNTER = ".num_batches_tracked"  # absent before torch 0.4.1, and unused in eval mode

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
    """Eval-mode float32 models from checkpoint files, as slices of one stack on `device`.

    One file yields `num_models` independent copies (default: 1), K files yield K models. The number
    of classes is inferred from the last layer. A prefix that wraps all names of the model is
    stripped (see `strip_prefix`) and reported by one call of `say`.

    Returns:
        models: each maps images `(B, 3, H, W)` to logits `(B, classes)`.

    Raises:
        InputError: a file is not a valid checkpoint of `arch`, its weights are not finite, or the
            number of files is neither 1 nor `num_models`.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    wanted = len(paths) if num_models is None else num_models
    if wanted < 1 or not paths or len(paths) not in (1, wanted):
        found = f"{formatting.count(len(paths), 'file')} for {formatting.count(wanted, 'model')}"
        message = f"expected one file or one file per model, got {found}"
        raise InputError(message, argument="paths")
    expected = stacking.named_tensors(build_skeleton(arch, None))
    states = (
        (str(path), _strip_and_report(checkpoints.read(path), expected, source=str(path), say=say))
        for path in paths
    )
    copies = wanted if len(paths) == 1 else 1
    return _from_states(states, arch=arch, count=wanted, copies=copies, device=torch.device(device))


def models_from_state(
    state: State, *, arch: str, source: str, num_models: int, device: torch.device
) -> list[nn.Module]:
    """N independent models with copies of `state`; `source` names its origin in errors."""
    states = [(source, state)]
    return _from_states(states, arch=arch, count=num_models, copies=num_models, device=device)


def random_models(
    num_models: int, *, arch: str, device: torch.device, seed: int
) -> list[nn.Module]:
    """N models with torchvision's random initialization; model n uses seed `seed + n`."""
    models = _allocate(build_skeleton(arch, None), num_models, device)
    for index, model in enumerate(models):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + index)  # torch.manual_seed: all devices
            drawn = _construct(arch, None)
        _fill(model, stacking.named_tensors(drawn))
    return models


def strip_prefix(state: State, expected: Collection[str]) -> tuple[State, str]:
    """A state without the prefix that its names share, and that prefix (may be empty).

    Training code wraps models, and thereby their names: `module.` (DataParallel, AveragedModel),
    `_orig_mod.` (torch.compile), `model.` (Lightning), `backbone.`, possibly nested. The prefix is
    the one whose removal matches the most names of `expected`; ties go to the shortest.

    If a complete model is found under the prefix, other tensors are dropped: the counter of an
    AveragedModel, the weights of a loss. Tensors whose name ends in a name of `expected` are kept,
    as they may belong to a second model.
    """
    matches = Counter({"": 0})
    for name in state:
        matches.update(prefix for prefix in _prefixes(name) if name[len(prefix) :] in expected)
    prefix = max(matches, key=lambda prefix: matches[prefix])  # the first of the best
    stripped = {name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    is_complete = all(name in stripped or name.endswith(_COUNTER) for name in expected)
    kept = [
        name
        for name in outside
        if not is_complete or any(name[len(begin) :] in expected for begin in _prefixes(name))
    ]
    others = {
        f"{name} (as well as {prefix}{name})" if name in stripped else name: state[name]
        for name in kept
    }
    return stripped | others, prefix


def _prefixes(name: str) -> Iterator[str]:
    """The module prefixes of a name, the empty one first: of `a.b.c` those are ``, `a.`, `a.b.`."""
    parts = name.split(".")
    return (".".join([*parts[:count], ""]) for count in range(len(parts)))


def check_arch(arch: str) -> None:
    """Raise InputError unless `arch` is a classification architecture of torchvision."""
    known = architectures()
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=3) or ["resnet18", "resnet50"]
        raise InputError(
            f"expected one of torchvision's {len(known)} classification architectures"
            f" ({', '.join(close)}, ...), got {arch!r}",
            argument="arch",
        )


def build_skeleton(arch: str, classes: int | None) -> nn.Module:
    """`arch` in eval mode on the meta device: names and shapes without memory.

    Raises:
        InputError: torchvision has no such classification architecture.
    """
    check_arch(arch)
    try:
        with torch.device("meta"), MetaWithoutDynamo():
            return _construct(arch, classes)
    except NotImplementedError:  # RegNet computes its widths from tensor values
        with torch.random.fork_rng(devices=[]):
            return stacking.skeleton(_construct(arch, classes))


def num_classes(state: Mapping[str, Tensor], *, arch: str, source: str) -> int:
    """The number of classes of a checkpoint: the first dimension of the last layer's tensor."""
    last = [*dict(build_skeleton(arch, None).named_parameters())][-1]
    if last in state and state[last].dim() and not len(state[last]):
        shape = tuple(state[last].shape)
        raise InputError(f"{source}: expected at least one class, got {last} of shape {shape}")
    if last not in state or state[last].dim() == 0:
        found = f"{formatting.count(len(state), 'tensor')} starting with {next(iter(state), '')}"
        raise InputError(f"{source}: expected a state dict of {arch} with {last}, got {found}")
    return state[last].shape[0]


def check_state(
    state: State, template: nn.Module, *, arch: str, source: str, first_source: str | None
) -> None:
    """Raise InputError unless `state` has the names, shapes and dtype categories of `template`."""
    expected = stacking.named_tensors(template)
    like = f" like {first_source}" if first_source else ""
    missing = [name for name in expected if name not in state and not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in expected]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            keys = "keys" if len(names) > 1 else "key"
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            message = f"expected a state dict of {arch}{like}, got {kind} {keys} {names[0]}{more}"
            raise InputError(f"{source}: {message}")
    for name, tensor in state.items():
        shape, found = tuple(expected[name].shape), tuple(tensor.shape)
        if shape != found:
            raise InputError(f"{source}: expected {name} of shape {shape}{like}, got {found}")
        floating = expected[name].is_floating_point()
        if floating != tensor.is_floating_point() and not name.endswith(_COUNTER):
            kind = "a floating-point" if floating else "an integer"
            raise InputError(f"{source}: expected {name} of {kind} dtype, got {tensor.dtype}")


def _from_states(
    states: Iterable[tuple[str, State]], *, arch: str, count: int, copies: int, device: torch.device
) -> list[nn.Module]:
    """`count` models in one stack, `copies` of each state; holds one state at a time in memory."""
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
            raise InputError(f"{source}: expected finite weights, got NaN or infinity in {name}")


def _strip_and_report(
    state: State, expected: Collection[str], *, source: str, say: Callable[[str], None]
) -> State:
    """`strip_prefix`, with a line for the user."""
    stripped, prefix = strip_prefix(state, expected)
    count = sum(name.startswith(prefix) for name in state)
    if count == len(state) and prefix:
        say(f"{source}: stripped the prefix {prefix!r} from all {count} keys")
    elif prefix:
        dropped = [name for name in state if not name.startswith(prefix) and name not in stripped]
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        ignored = f"; ignored {dropped[0]}{more}" if dropped else ""
        say(f"{source}: stripped the prefix {prefix!r} from {count} keys{ignored}")
    return stripped


def _construct(arch: str, classes: int | None) -> nn.Module:
    options = {} if classes is None else {"num_classes": classes}
    with warnings.catch_warnings():
        # GoogLeNet and Inception warn of a future change of their default initialization.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
        model: nn.Module = torchvision.models.get_model(arch, weights=None, **options)
    return model.eval().requires_grad_(False)


def _allocate(template: nn.Module, num_models: int, device: torch.device) -> list[nn.Module]:
    each, free = stacking.weight_bytes(template), memory.available_bytes(device)
    if free is not None and each * num_models > free:
        raise InputError(
            f"the weights of {formatting.count(num_models, 'model')} require"
            f" {each * num_models / 1e9:.1f} GB, {free / 1e9:.1f} GB available on {device};"
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
