"""Load checkpoint files into eval-mode models that share one stack. Errors name the file."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ensemble import formatting
from ensemble.errors import InputError, UnavailableError
from ensemble.machine import memory
from ensemble.models import architectures, checkpoints, stacking
from ensemble.models.architectures import Architecture, Function
from ensemble.models.checkpoints import State
from ensemble.models.meta import MetaWithoutDynamo

_COUNTER = ".num_batches_tracked"  # absent before torch 0.4.1, and unused in eval mode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """The structure of a model on the meta device: names and shapes without memory.

    `constants` are the values of buffers that a state dict does not hold (non-persistent ones).
    """

    model: nn.Module
    constants: State = field(default_factory=dict)


def load_models(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    arch: str | Function,
    device: str | torch.device,
    num_models: int | None = None,
    say: Callable[[str], None] = log.info,
) -> list[nn.Module]:
    """Eval-mode float32 models from checkpoint files, as slices of one stack on `device`.

    One file yields `num_models` independent copies (default: 1), K files yield K models. A prefix
    that wraps all names of the model is stripped (see `strip_prefix`) and reported by one call of
    `say`.

    arch: a name of torchvision or `timm/NAME`, whose number of classes is inferred from the last
        layer; `MODULE:FUNCTION`, `PATH.py:FUNCTION` or a function, which is called without
        arguments and gives a module with the shapes of the checkpoint.

    Returns:
        models: each maps images `(B, channels, H, W)` to what the architecture gives, such as
            logits `(B, classes)`.

    Raises:
        InputError: no such architecture, or its function fails; a file is not a valid checkpoint of
            `arch`, its weights are not finite, or the number of files is neither 1 nor
            `num_models`.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    wanted = len(paths) if num_models is None else num_models
    if wanted < 1 or not paths or len(paths) not in (1, wanted):
        found = f"{formatting.count(len(paths), 'file')} for {formatting.count(wanted, 'model')}"
        message = f"expected one file or one file per model, got {found}"
        raise InputError(message, argument="paths")
    expected = stacking.canonical_names(build_skeleton(arch, None))
    states = (
        (str(path), _strip_and_report(checkpoints.read(path), expected, source=str(path), say=say))
        for path in paths
    )
    copies = wanted if len(paths) == 1 else 1
    return _from_states(states, arch=arch, count=wanted, copies=copies, device=torch.device(device))


def models_from_state(
    state: State, *, arch: str | Function, source: str, num_models: int, device: torch.device
) -> list[nn.Module]:
    """N independent models with copies of `state`; `source` names its origin in errors."""
    states = [(source, state)]
    return _from_states(states, arch=arch, count=num_models, copies=num_models, device=device)


def random_models(
    num_models: int,
    *,
    arch: str | Function,
    device: torch.device,
    seed: int,
    channels: int | None = None,
) -> list[nn.Module]:
    """N models with the weights that their architecture constructs them with, in general random.

    Model n is constructed with torch's generator at `seed + n`; channels: see
    `architectures.find`.

    Raises:
        InputError: no such architecture, or its function fails or gives different ones.
    """
    architecture = architectures.find(arch, channels=channels)
    template = make_template(architecture, None)
    models = _allocate(template.model, num_models, device)
    for index, model in enumerate(models):
        drawn = stacking.named_tensors(_seeded(architecture, None, seed + index))
        _check_alike(drawn, stacking.named_tensors(template.model), architecture)
        _fill(model, drawn)
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


def build_skeleton(arch: str | Function, classes: int | None) -> nn.Module:
    """`arch` in eval mode on the meta device: names and shapes without memory.

    Raises:
        InputError: no such architecture, or its function fails.
    """
    return make_template(architectures.find(arch), classes).model


def make_template(architecture: Architecture, classes: int | None) -> Template:
    """The template of an architecture with so many classes, or its own number.

    Raises:
        InputError: it cannot be constructed, or not be copied.
    """
    if architecture.constructs_on_meta:
        try:
            with torch.device("meta"), MetaWithoutDynamo():
                return Template(architecture.construct(classes))
        except NotImplementedError:  # RegNet computes its widths from tensor values
            pass
    model = _seeded(architecture, classes, 0)
    try:
        skeleton = stacking.skeleton(model)
    except UnavailableError as error:
        message = f"expected {architecture.name} to give a module that can be copied: {error}"
        raise InputError(message, argument=architectures.ARGUMENT) from error
    kept = _persistent_names(model)
    tensors = stacking.named_tensors(model).items()
    return Template(skeleton, {name: tensor for name, tensor in tensors if name not in kept})


def template_of_state(arch: str | Function, state: State, *, source: str) -> Template:
    """The template of an architecture with the number of classes, and the other options, that a
    state dict shows.

    Raises:
        InputError: the state is of another architecture.
    """
    architecture = architectures.find(arch, state=state)
    return make_template(architecture, _num_classes(state, architecture, source))


def num_classes(state: Mapping[str, Tensor], *, arch: str, source: str) -> int | None:
    """The number of classes of a checkpoint: the first dimension of the last layer's tensor.

    None for an architecture of the user, which has its own number; 0 for one of timm without its
    last layer.
    """
    return _num_classes(state, architectures.find(arch, state=state), source)


def _num_classes(
    state: Mapping[str, Tensor], architecture: Architecture, source: str
) -> int | None:
    if architecture.classifier is None:
        return None
    last = architecture.classifier(make_template(architecture, None).model)
    if last is None:
        return None
    if last in state and state[last].dim() and not len(state[last]):
        shape = tuple(state[last].shape)
        raise InputError(f"{source}: expected at least one class, got {last} of shape {shape}")
    if last not in state and architecture.headless:
        names = _persistent_names(make_template(architecture, 0).model)
        if all(name in state or name.endswith(_COUNTER) for name in names):
            return 0
    if last not in state or state[last].dim() == 0:
        found = f"{formatting.count(len(state), 'tensor')} starting with {next(iter(state), '')}"
        name = architecture.name
        raise InputError(f"{source}: expected a state dict of {name} with {last}, got {found}")
    return state[last].shape[0]


def check_state(
    state: State, template: nn.Module, *, arch: str, source: str, first_source: str | None
) -> None:
    """Raise InputError unless `state` has the names, shapes and dtype categories of `template`."""
    tensors = stacking.named_tensors(template)
    expected = {name: tensors[name] for name in _persistent_names(template)}
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
    states: Iterable[tuple[str, State]],
    *,
    arch: str | Function,
    count: int,
    copies: int,
    device: torch.device,
) -> list[nn.Module]:
    """`count` models in one stack, `copies` of each state; holds one state at a time in memory."""
    models: list[nn.Module] = []
    name, first_source = architectures.find(arch).name, None
    for index, (source, named) in enumerate(states):
        if first_source is None:
            template = template_of_state(arch, named, source=source)
        state = _without_ties(named, template.model)
        check_state(state, template.model, arch=name, source=source, first_source=first_source)
        _check_finite(state, source)
        if first_source is None:
            models, first_source = _allocate(template.model, count, device), source
        for model in models[index * copies : (index + 1) * copies]:
            _fill(model, template.constants | state)
    return models


def _persistent_names(model: nn.Module) -> list[str]:
    """The names, as in `stacking.named_tensors`, of the tensors that its state dict holds."""
    names = stacking.canonical_names(model)
    return list(dict.fromkeys(names[name] for name in model.state_dict() if name in names))


def _without_ties(state: State, template: nn.Module) -> State:
    """The state with one name of each tensor that the model has under several names."""
    names = stacking.canonical_names(template)
    return {names.get(name, name): tensor for name, tensor in state.items()}


def _seeded(architecture: Architecture, classes: int | None, seed: int) -> nn.Module:
    """A new model, constructed with torch's generator at `seed`, which is then restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed: all devices
        return architecture.construct(classes)


def _check_alike(found: State, expected: State, architecture: Architecture) -> None:
    """Raise InputError unless two calls of a function gave tensors of the same names and shapes."""
    shapes = [{name: tuple(one.shape) for name, one in some.items()} for some in (expected, found)]
    for name in shapes[0] | shapes[1]:
        before, now = (of.get(name, "none") for of in shapes)
        if before != now:
            message = f"expected {architecture.name} to give the same architecture in each call"
            message += f", got {name} of shape {now} after {before}"
            raise InputError(message, argument=architectures.ARGUMENT)


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
