"""Shard N models over ranks, in contiguous ranges as even as possible. No torch."""

from ensemble.errors import InputError


def shard_ranges(num_models: int, ranks: int) -> tuple[range, ...]:
    """The models of each rank, in order; the first ranks hold one more if N does not divide.

    Raises:
        InputError: fewer models than ranks.
    """
    if num_models < ranks:
        message = f"expected at least {ranks}, one for each rank, got {num_models}"
        raise InputError(message, argument="num_models")
    least, remainder = divmod(num_models, ranks)
    ends = [least * (rank + 1) + min(rank + 1, remainder) for rank in range(ranks)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends], ends, strict=False))


def equal_ranges(shards: tuple[range, ...]) -> tuple[range, ...]:
    """For each rank a range that contains its shard and has the length of the largest shard.

    A scatter needs parts of equal size: a smaller shard is extended by a neighbor, so that each
    part is a view and nothing is copied for padding.
    """
    largest, count = max(map(len, shards)), shards[-1].stop
    begins = (min(shard.start, count - largest) for shard in shards)
    return tuple(range(begin, begin + largest) for begin in begins)
