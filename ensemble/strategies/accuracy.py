"""Do fast algorithms keep what is quiet beside what is loud, in the outputs of the models?

Winograd's and Strassen's errors are bounded by the largest number that goes in, not by what comes
out (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, chapter 23). Outputs that
are a thousandth of others may keep few of their digits, where a direct product keeps them all. So
outputs are compared with float64 by channel and by place, and an error is held against what the
plain loop in the models' own dtype loses there: where large terms cancel, what is left is off by
much of itself in any algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import is_close
from ensemble.errors import UnavailableError
from ensemble.machine.memory import is_out_of_memory
from ensemble.strategies import eager
from ensemble.strategies.arguments import weight_dtype

# An error of so much of what is largest in a channel, or at a place, is looked into; by dtype.
SUSPECT = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# So many times what the plain loop loses there is too much. In ResNets Winograd loses 5 to 10 times
# as much; one number, not a channel, may by luck lose little in the plain loop,
TIMES = 300
DRAWS = 3  # so this is asked of several images that differ by rounding alone.


class Judge:
    """What is known of the models' true outputs for an example, `(B, C, H, W)` or per model."""

    def __init__(self, models: Sequence[nn.Module], example: Tensor, *, closely: bool) -> None:
        """closely: the outputs are computed in float64, where the models run in that."""
        self._models, self._example, self._closely = models, example, closely
        self._dtype = weight_dtype(models, example)
        self._exact: Tensor | None = None

    def check(self, found: Tensor) -> None:
        """Does what was built compute what the models compute?

        Raises:
            UnavailableError: it computes something else: a trace has missed what their code does.
        """
        is_fake = type(self._example) is not Tensor
        if is_fake or (type(found) is Tensor and is_close(found, self._true_outputs())):
            return
        raise UnavailableError(
            "torch cannot trace this model: its trace gives another result than the model"
        )

    def loses_quiet_outputs(self, found: Tensor) -> bool:
        """Are outputs `(N, B, channels, ...)` of the example off by more than rounding explains, in
        any channel or at any place of any model? False where they are no rounded numbers."""
        if self._dtype not in SUSPECT or not found.is_floating_point():
            return False
        if found.dim() < 3 or not found.numel():
            return False
        exact = self._true_outputs()
        return any(
            self._loses(index, found[index : index + 1], exact[index : index + 1])
            for index in range(len(self._models))
        )

    def _true_outputs(self) -> Tensor:
        """In float64; in the models' own dtype where their code does not run in that."""
        if self._exact is None and self._closely:
            try:
                self._exact = eager.logits_in(self._models, self._example, torch.float64)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
        if self._exact is None:
            self._exact = self._plain(slice(None), self._example)
        return self._exact

    def _plain(self, models: slice, example: Tensor) -> Tensor:
        return eager.logits_in(self._models[models], example, self._dtype)

    def _loses(self, index: int, found: Tensor, exact: Tensor) -> bool:
        """Of one model."""
        is_finite = found.isfinite() & exact.isfinite()
        error, size = (_masked(t, is_finite) for t in (found - exact, exact))
        suspects = [largest(error) > SUSPECT[self._dtype] * largest(size) for largest in _GROUPS]
        noises = [torch.zeros_like(suspect, dtype=torch.float64) for suspect in suspects]
        one = slice(index, index + 1)
        per_model = self._example.dim() == 5
        example = self._example[one] if per_model else self._example
        for draw in range(DRAWS):
            if not any(bool(suspect.any()) for suspect in suspects):
                return False
            plain = self._plain(one, _rounded_anew(example, draw)).double()
            noise = _masked(plain - exact, is_finite)
            for place, largest in enumerate(_GROUPS):
                noises[place] = noises[place].maximum(largest(noise))
                suspects[place] &= largest(error) > TIMES * noises[place]
        return any(bool(suspect.any()) for suspect in suspects)


def _masked(values: Tensor, is_finite: Tensor) -> Tensor:
    """Sizes `(N, B, C, places)` of values `(N, B, C, ...)`, of numbers that are not finite 0."""
    return values.double().abs().where(is_finite, 0).reshape(*values.shape[:3], -1)


def _by_channel(sizes: Tensor) -> Tensor:
    """The largest of each channel: `(N, B, C, places)` -> `(N, C)`."""
    return sizes.amax((1, 3))


def _by_place(sizes: Tensor) -> Tensor:
    """The largest at each place of each image: `(N, B, C, places)` -> `(N, B, places)`."""
    return sizes.amax(2)


_GROUPS: tuple[Callable[[Tensor], Tensor], ...] = (_by_channel, _by_place)


def _rounded_anew(x: Tensor, draw: int) -> Tensor:
    """x, and after the first draw x with each number off by up to half a unit in its last place."""
    if draw == 0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(draw)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device) - 0.5
    return (x.double() * (1 + torch.finfo(x.dtype).eps * noise)).to(x.dtype)
