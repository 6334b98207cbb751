"""Which of N models each rank holds: blocks, as even as can be. Knows nothing of torch."""

from ensemble.errors import InputError


def blocks(num_models: int, ranks: int) -> tuple[range, ...]:
    """The models of each rank, in order; the first ranks hold one more where N does not divide.

    Raises:
        InputError: fewer models than ranks.
    """
    if num_models < ranks:
        message = f"expected at least {ranks}, one for each rank, found {num_models}"
        raise InputError(message, argument="num_models")
    least, more = divmod(num_models, ranks)
    ends = [least * (rank + 1) + min(rank + 1, more) for rank in range(ranks)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends], ends, strict=False))


def windows(shards: tuple[range, ...]) -> tuple[range, ...]:
    """Of each rank a range as long as the largest block, which holds its block.

    Collectives move parts of one size: a smaller block takes a neighbour along, so that each part
    is a piece of the whole as it lies, and nothing is copied to make room.
    """
    most, count = max(map(len, shards)), shards[-1].stop
    begins = (min(block.start, count - most) for block in shards)
    return tuple(range(begin, begin + most) for begin in begins)
