"""The Triton kernels: the implicit GEMM, and the sum of its splits.

Images are `(N, B, H, W, C)` in memory, and so are results.
"""

# ruff: noqa: N803
import triton
import triton.language as tl

# `planning.step.Activation`, as constants that kernels can read.
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
SIGMOID = tl.constexpr(3)
SILU = tl.constexpr(4)
HARDSIGMOID = tl.constexpr(5)
HARDSWISH = tl.constexpr(6)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """An activation in float32. NaN stays NaN: comparisons with it are false."""
    if ACTIVATION == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == RELU6:
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == SIGMOID:
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == SILU:
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == HARDSIGMOID or ACTIVATION == HARDSWISH:  # noqa: SIM109
        gate = x + 3.0
        gate = tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) / 6.0
        x = gate if ACTIVATION == HARDSIGMOID else x * gate
    return x


@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """Pixels as a factor of a product, rounded to TF32 if it is one: tensor cores ignore the lower
    13 bits, so each product would be too small, and the errors of a network's layers would add up.

    To nearest, as `cvt.rna.tf32` does. NaN and infinities stay. Weights are rounded at build
    (`problem.rounded_to_tf32`).
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)
    return x


@triton.jit
def gathered(image, y, x, height, width, row, column, valid):
    """Of each output pixel, the offset of the input pixel under a tap, and whether it is one: not
    padding."""
    inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return image + y * row + x * column, inside


# A loop of one block would be unrolled, and the loop over tiles pipelined in its place.
@triton.jit(do_not_specialize=["blocks_per_tap", "depth_blocks", "shortcut_blocks"])
def implicit_gemm(
    x,  # (N, B, C, H, W), strides below; of a model 0 if the models share it
    weight,  # descriptor of (N * groups * depth, columns)
    bias,  # (N, K) in float32
    other,  # (N, B, OH, OW, K), its stride of a model below
    shortcut,  # (N, B, C, H, W), strides below
    out,  # (N, B, OH, OW, K); with SPLITS, as many of them in float32
    rows,
    columns,
    channels,
    products,
    row_tiles,
    column_tiles,
    height,
    width,
    out_height,
    out_width,
    x_model,
    x_image,
    x_row,
    x_column,
    x_channel,
    other_model,
    shortcut_channels,
    shortcut_model,
    shortcut_image,
    shortcut_row,
    shortcut_column,
    blocks_per_tap,
    depth_blocks,  # of the convolution
    shortcut_blocks,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SHORTCUT_STRIDE_H: tl.constexpr,
    SHORTCUT_STRIDE_W: tl.constexpr,
    FEW_CHANNELS: tl.constexpr,  # the channels of a group if a block spans several taps, else 0
    HAS_BIAS: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Persistent programs over the tiles of all products, model by model: each model's weights
    leave memory once, and its next tiles find them in the L2 cache."""
    tiles = products * column_tiles * SPLITS * row_tiles
    total_blocks = depth_blocks + shortcut_blocks
    blocks_per_split = (total_blocks + SPLITS - 1) // SPLITS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile = tile % row_tiles
        split = tile // row_tiles % SPLITS
        column_tile = tile // (row_tiles * SPLITS) % column_tiles
        product = tile // (row_tiles * SPLITS * column_tiles)
        model = (product // GROUPS).to(tl.int64)
        group = product % GROUPS

        pixel = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        is_pixel = pixel < rows
        out_x = pixel % out_width
        out_y = pixel // out_width % out_height
        # Offsets within a model's images are 32 bits: they take half of the registers.
        image = pixel // (out_width * out_height)
        images = x + model * x_model + group * channels * x_channel
        image_offset = image * x_image
        first_y = out_y * STRIDE_H - PADDING_H
        first_x = out_x * STRIDE_W - PADDING_W

        in_block = tl.arange(0, BLOCK_K)
        first_column = column_tile * BLOCK_N
        first_row = product * (total_blocks * BLOCK_K)  # of the packed weights
        begin = split * blocks_per_split
        end = tl.minimum(begin + blocks_per_split, total_blocks)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.range(begin, tl.minimum(end, depth_blocks)):
            if FEW_CHANNELS > 0:
                depth = block * BLOCK_K + in_block
                tap = depth // FEW_CHANNELS
                channel = depth % FEW_CHANNELS
                offsets, inside = gathered(
                    image_offset[:, None],
                    first_y[:, None] + (tap // KERNEL_W * DILATION_H)[None, :],
                    first_x[:, None] + (tap % KERNEL_W * DILATION_W)[None, :],
                    height,
                    width,
                    x_row,
                    x_column,
                    is_pixel[:, None] & (tap < KERNEL_H * KERNEL_W)[None, :],
                )
                offsets += (channel * x_channel)[None, :]
            else:
                tap = block // blocks_per_tap
                channel = block % blocks_per_tap * BLOCK_K + in_block
                pixels, is_inside = gathered(
                    image_offset,
                    first_y + tap // KERNEL_W * DILATION_H,
                    first_x + tap % KERNEL_W * DILATION_W,
                    height,
                    width,
                    x_row,
                    x_column,
                    is_pixel,
                )
                offsets = pixels[:, None] + (channel * x_channel)[None, :]
                inside = is_inside[:, None] & (channel < channels)[None, :]
            left = tl.load(images + offsets, mask=inside, other=0.0)
            right = weight.load([first_row + block * BLOCK_K, first_column])
            sums = tl.dot(factor(left, PRECISION), right, sums, input_precision=PRECISION)
        if HAS_SHORTCUT:
            sources = shortcut + model * shortcut_model
            source_offset = image * shortcut_image
            source_offset += out_y * SHORTCUT_STRIDE_H * shortcut_row
            source_offset += out_x * SHORTCUT_STRIDE_W * shortcut_column
            for block in tl.range(tl.maximum(begin, depth_blocks), end):
                channel = (block - depth_blocks) * BLOCK_K + in_block
                left = tl.load(
                    sources + source_offset[:, None] + channel[None, :],
                    mask=is_pixel[:, None] & (channel < shortcut_channels)[None, :],
                    other=0.0,
                )
                right = weight.load([first_row + block * BLOCK_K, first_column])
                sums = tl.dot(factor(left, PRECISION), right, sums, input_precision=PRECISION)

        column = first_column + tl.arange(0, BLOCK_N)
        filter_index = group * columns + column
        place = pixel[:, None] * (GROUPS * columns) + filter_index[None, :]
        per_model = rows * (GROUPS * columns)
        valid = is_pixel[:, None] & (column < columns)[None, :]
        if SPLITS > 1:
            part = split * (products // GROUPS) + model
            tl.store(out + part * per_model + place, sums, mask=valid)
        else:
            if HAS_BIAS:
                shifts = bias + model * (GROUPS * columns) + filter_index
                sums += tl.load(shifts, mask=column < columns, other=0.0)[None, :]
            if HAS_OTHER:
                residuals = tl.load(other + model * other_model + place, mask=valid, other=0.0)
                sums += residuals.to(tl.float32)
            sums = activated(sums, ACTIVATION)
            result = sums.to(out.dtype.element_ty)
            tl.store(out + model * per_model + place, result, mask=valid)


@triton.jit
def sum_splits(
    partial,  # (SPLITS, N, per_model) in float32
    bias,  # (N, K) in float32
    other,  # (N, per_model), its stride of a model below
    out,  # (N, per_model)
    per_model,  # rows * K
    filters,  # K
    other_model,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the splits in their order, so that every call rounds alike, and the epilogue."""
    model = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < per_model
    stride = tl.num_programs(1).to(tl.int64) * per_model
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        pointers = partial + split * stride + model * per_model + place
        sums += tl.load(pointers, mask=valid, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + model * filters + place % filters, mask=valid, other=0.0)
    if HAS_OTHER:
        residuals = tl.load(other + model * other_model + place, mask=valid, other=0.0)
        sums += residuals.to(tl.float32)
    sums = activated(sums, ACTIVATION)
    tl.store(out + model * per_model + place, sums.to(out.dtype.element_ty), mask=valid)
