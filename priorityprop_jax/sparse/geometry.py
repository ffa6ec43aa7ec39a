"""What a convolution is but for its weight: sizes, strides, padding, dilation and groups."""

from __future__ import annotations

from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """A convolution over two axes; static, so that it can be an argument of compiled code.

    Attributes:
      kernel: ``(height, width)`` of the kernel.
      strides: steps between two outputs.
      padding: zeros in front of and behind each axis.
      dilation: steps between two elements of the kernel.
      groups: how many groups the channels are split into.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for those of an input, at least 0."""
        axes = zip(size, self.kernel, self.strides, self.padding, self.dilation, strict=True)
        height, width = (
            max(0, (length + low + high - (kernel - 1) * dilation - 1) // stride + 1)
            for length, kernel, stride, (low, high), dilation in axes
        )
        return height, width
