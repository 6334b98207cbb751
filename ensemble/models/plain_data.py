"""Allow list of the data types that training scripts save along with the weights."""

import numpy

# module -> types, or functions that reconstruct them.
_TYPES = {
    # or_, getattr: flags (Python 3.11.0 to 3.11.3) and some enum members are pickled by them; the
    # placeholders do not look anything up.
    "_operator": "or_",
    "argparse": "Namespace",
    "array": "array",
    "builtins": "Ellipsis NotImplemented bool bytes dict float frozenset getattr int list object"
    " range slice str tuple type",
    "collections": "ChainMap UserDict UserList",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "ipaddress": "IPv4Address IPv6Address",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "random": "Random",
    "re": "_compile",
    "time": "struct_time",
    "types": "SimpleNamespace",
    "typing": "Any",
    "uuid": "SafeUUID UUID",
    "torch.torch_version": "TorchVersion",
    "numpy": "dtype ndarray bool bool_",
    "numpy.core.multiarray": "_reconstruct scalar",  # numpy 1
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.ma": "MaskedArray",
    "numpy.ma.core": "_mareconstruct",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    # Saved by PyTorch Lightning, Hydra and OpenMMLab.
    "mmengine.logging.history_buffer": "HistoryBuffer",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode",
}
OBJECT_TYPES = (
    *(f"{module}.{name}" for module, names in _TYPES.items() for name in names.split()),
    *sorted({f"numpy.{scalar.__name__}" for scalar in numpy.sctypeDict.values()}),
    *(f"numpy.dtypes.{name}" for name in numpy.dtypes.__all__),
)
LIST_TYPES = ("collections.deque",)
DICT_TYPES = (
    "collections.defaultdict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
# Names for messages of the objects that these functions reconstruct.
DISPLAY_NAMES = {"_reconstruct": "numpy array", "scalar": "numpy number"}
