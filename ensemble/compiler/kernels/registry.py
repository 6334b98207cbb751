"""The table of kernels: a new one is a file in this folder, a `Kind`, and a line here."""

from ensemble.compiler.kernels.activation import ACTIVATION
from ensemble.compiler.kernels.channel_conv import CHANNEL_CONV
from ensemble.compiler.kernels.direct import DIRECT, DIRECT_BF16
from ensemble.compiler.kernels.gather import GATHER
from ensemble.compiler.kernels.group_norm import GROUP_NORM
from ensemble.compiler.kernels.grouped import GROUPED
from ensemble.compiler.kernels.layer_norm import LAYER_NORM
from ensemble.compiler.kernels.pixel_shuffle import PIXEL_SHUFFLE
from ensemble.compiler.kernels.pointwise import (
    AFFINE,
    COPY,
    SCALE,
    SUM,
)
from ensemble.compiler.kernels.pooling import AVERAGE_POOL, MAX_POOL
from ensemble.compiler.kernels.resample import RESAMPLE
from ensemble.compiler.kernels.strassen import STRASSEN
from ensemble.compiler.kernels.winograd import WINOGRAD_2, WINOGRAD_4
from ensemble.compiler.planning.step import Kind

KERNELS = {
    Kind.DIRECT: DIRECT,
    Kind.DIRECT_BF16: DIRECT_BF16,
    Kind.WINOGRAD_2: WINOGRAD_2,
    Kind.WINOGRAD_4: WINOGRAD_4,
    Kind.MAX_POOL: MAX_POOL,
    Kind.GROUPED: GROUPED,
    Kind.STRASSEN: STRASSEN,
    Kind.AVERAGE_POOL: AVERAGE_POOL,
    Kind.ACTIVATION: ACTIVATION,
    Kind.SUM: SUM,
    Kind.SCALE: SCALE,
    Kind.AFFINE: AFFINE,
    Kind.COPY: COPY,
    Kind.GATHER: GATHER,
    Kind.GROUP_NORM: GROUP_NORM,
    Kind.LAYER_NORM: LAYER_NORM,
    Kind.CHANNEL_CONV: CHANNEL_CONV,
    Kind.PIXEL_SHUFFLE: PIXEL_SHUFFLE,
    Kind.RESAMPLE: RESAMPLE,
}
