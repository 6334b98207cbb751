"""Checkpoint files -> eval-mode models, straight into one stack. Every error names its file."""

import difflib
import logging
import os
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ensemble import files
from ensemble.errors import InputError, first_line
from ensemble.machine import memory
from ensemble.models import stacking
from ensemble.models.meta import ByShape
from ensemble.models.vision import torchvision
from ensemble.report import words

_WRAPPERS = ("state_dict", "model")
_COUNTER = ".num_batches_tracked"  # absent before torch 0.4.1, of no use to a forward
_OLD_NAMES = (  # torchvision's published files keep the names of their day
    (re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # DenseNet
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),  # VisionTransformer
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
_REFUSED = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+) w")  # torch.load's words

State = dict[str, Tensor]

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
        found = f"{words.count(len(paths), 'file')} for {words.count(wanted, 'model')}"
        message = f"expected one file, or one for each model, found {found}"
        raise InputError(message, argument="paths")
    expected = stacking.named_tensors(build_skeleton(arch, None))
    states = (
        (str(path), _told(read_checkpoint(path), expected, source=str(path), say=say))
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


def read_checkpoint(path: str | os.PathLike[str]) -> State:
    """The plain state dict in a `.pth`, `.pt` or `.safetensors` file, unwrapped, on the CPU.

    Nothing that a pickle asks for is executed (`weights_only=True`).

    Raises:
        InputError: not there, not readable, not a checkpoint, not finite.
    """
    path = Path(path)
    if files.first_bytes(path, kind="a checkpoint file").lstrip().startswith(b"<"):
        found = "an HTML page (a bad download?)"
        raise InputError(f"{path}: expected a checkpoint file, found {found}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _unwrap(content, path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path}: expected finite weights, found NaN or infinity in {name}")
    return state


def without_prefix(state: State, expected: Collection[str]) -> tuple[State, str]:
    """A state under the names that `expected` has most of, and the prefix that was taken off.

    Training wraps a model and its names: `module.` (DataParallel), `_orig_mod.` (torch.compile),
    `model.` (Lightning), `backbone.`, several of them one after another. Of the beginnings that all
    names share as few parts go as give the most names of `expected`: where no names fit better for
    it, none.
    """
    parts = zip(*(name.split(".")[:-1] for name in state), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts)]
    prefixes = [".".join([*shared[:count], ""]) for count in range(len(shared) + 1)]
    hits = [sum(name.removeprefix(prefix) in expected for name in state) for prefix in prefixes]
    prefix = prefixes[hits.index(max(hits))]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}, prefix


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
    if last not in state or state[last].dim() == 0 or not len(state[last]):
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
        if first_source is None:
            models, first_source = _allocate(template, count, device), source
        for model in models[index * copies : (index + 1) * copies]:
            _fill(model, state)
    return models


def _told(
    state: State, expected: Collection[str], *, source: str, say: Callable[[str], None]
) -> State:
    state, prefix = without_prefix(state, expected)
    if prefix:
        say(f"{source}: all {len(state)} names begin with {prefix!r}: loaded without it")
    return state


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
            f"the weights of {words.count(num_models, 'model')} need"
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


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a safetensors file, found a truncated or damaged file,"
            f" or another format ({first_line(error)})"
        ) from error


def _read_pickle(path: Path) -> object:
    try:
        # Training scripts, torchvision's among them, save their options beside the weights.
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # of archives that are refused a line further on
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = "another format, or a damaged file"
        if refused := _REFUSED.search(str(error)):
            found = f"a pickle that asks for {refused[1]} (a whole module, or code to run)"
        raise InputError(f"{path}: expected a state dict of tensors, found {found}") from error
    except Exception as error:  # torch.load raises what its many readers do
        if "TorchScript archive" in str(error):
            found = "a TorchScript archive"
            raise InputError(f"{path}: expected a state dict of tensors, found {found}") from error
        raise InputError(
            f"{path}: expected a checkpoint, found a truncated or damaged file"
            f" ({first_line(error)})"
        ) from error


def _unwrap(content: object, path: Path) -> State:
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a state dict, found a {type(content).__name__}")
    if not content:
        raise InputError(f"{path}: expected a state dict, found an empty one")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"a {type(value).__name__} under {name!r}"
            raise InputError(f"{path}: expected a state dict of tensors, found {found}")
        if value.layout != torch.strided or value.is_meta:
            found = f"{value.layout} on {value.device}"
            raise InputError(f"{path}: expected {name} to be a dense tensor, found {found}")
    return {_current_name(name): value for name, value in content.items()}


def _current_name(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name
