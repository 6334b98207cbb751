"""Accuracy check of the final outputs: do small outputs keep their digits next to large ones?

The errors of Winograd's and Strassen's algorithms are bounded by the largest input, not
componentwise (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, chapter 23).
Outputs a thousand times smaller than others may lose digits that a direct product keeps. So the
check compares outputs with float64 per channel and per pixel, and relates each error to the
rounding error of the plain loop in the models' own dtype: where large terms cancel, any algorithm
has a large relative error.
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

# Relative errors per channel or pixel that are suspect, by dtype.
SUSPECT = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# The factor over the plain loop's error that is too much. In ResNets Winograd's error is 5 to 10
# times as large. A single number may by luck have a small error in the plain loop,
MAX_FACTOR = 300
DRAWS = 3  # so several images are tried that differ by rounding only.


class OutputAccuracy:
    """Compares outputs for an example, `(B, C, H, W)` or per model, with the models' exact ones."""

    def __init__(self, models: Sequence[nn.Module], example: Tensor, *, in_float64: bool) -> None:
        """in_float64: compute the exact outputs in float64, if the models run in it."""
        self._models, self._example, self._in_float64 = models, example, in_float64
        self._dtype = weight_dtype(models, example)
        self._exact: Tensor | None = None

    def check(self, found: Tensor) -> None:
        """Check that outputs are those of the models, up to a generous rounding tolerance.

        Raises:
            UnavailableError: they are not: the trace has missed what the models' code does.
        """
        is_fake = type(self._example) is not Tensor
        if is_fake or (type(found) is Tensor and is_close(found, self._exact_outputs())):
            return
        raise UnavailableError(
            "torch cannot trace this model: its trace gives another result than the model"
        )

    def loses_small_outputs(self, found: Tensor) -> bool:
        """Has any channel or pixel of any model an error that rounding does not explain?

        found: `(N, B, channels, ...)` for the example. False for dtypes without rounding.
        """
        if self._dtype not in SUSPECT or not found.is_floating_point():
            return False
        if found.dim() < 3 or not found.numel():
            return False
        exact = self._exact_outputs()
        return any(
            self._loses(index, found[index : index + 1], exact[index : index + 1])
            for index in range(len(self._models))
        )

    def _exact_outputs(self) -> Tensor:
        """In float64, or in the models' own dtype if their code does not run in float64."""
        if self._exact is None and self._in_float64:
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
        """Whether one model loses digits."""
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
            plain = self._plain(one, _perturbed(example, draw)).double()
            noise = _masked(plain - exact, is_finite)
            for group, largest in enumerate(_GROUPS):
                noises[group] = noises[group].maximum(largest(noise))
                suspects[group] &= largest(error) > MAX_FACTOR * noises[group]
        return any(bool(suspect.any()) for suspect in suspects)


def _masked(values: Tensor, is_finite: Tensor) -> Tensor:
    """Magnitudes `(N, B, C, pixels)` of values `(N, B, C, ...)`; 0 where these are not finite."""
    return values.double().abs().where(is_finite, 0).reshape(*values.shape[:3], -1)


def _by_channel(sizes: Tensor) -> Tensor:
    """The largest of each channel: `(N, B, C, pixels)` -> `(N, C)`."""
    return sizes.amax((1, 3))


def _by_pixel(sizes: Tensor) -> Tensor:
    """The largest at each pixel of each image: `(N, B, C, pixels)` -> `(N, B, pixels)`."""
    return sizes.amax(2)


_GROUPS: tuple[Callable[[Tensor], Tensor], ...] = (_by_channel, _by_pixel)


def _perturbed(x: Tensor, draw: int) -> Tensor:
    """x for draw 0; later x perturbed by up to half a unit in the last place (ULP)."""
    if draw == 0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(draw)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device) - 0.5
    return (x.double() * (1 + torch.finfo(x.dtype).eps * noise)).to(x.dtype)
