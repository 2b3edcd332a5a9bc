"""Convolutions of short lines by few products: numbers, in NumPy alone.

Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks" (2016).
"""

import functools
from typing import NamedTuple

import numpy as np

# A line of more pixels takes tiles: in two dimensions it has as many kernels as
# the square of its products, and each serves `rate * rate` lines of an image.
_LINES_UP_TO = 3
_SHARED_FROM_RATE = 8
_SHARED_LINES_UP_TO = 5


class Winograd(NamedTuple):
  """Convolves a tile of a line with a kernel k of 3 taps.

  `output @ ((kernel @ k) * (input @ x))` is the result on `tile` pixels, x the
  same pixels and `border` more at each end.
  """

  output: np.ndarray
  kernel: np.ndarray
  input: np.ndarray

  @property
  def tile(self) -> int:
    """Pixels of the result."""
    return self.output.shape[0]

  @property
  def products(self) -> int:
    """Multiplications of the line by the kernel."""
    return self.kernel.shape[0]

  @property
  def border(self) -> int:
    """Pixels beside the tile that have a part in its result."""
    return (self.input.shape[1] - self.tile) // 2

  def count(self, size: int, rate: int) -> int:
    """How many tiles cover one of the `rate` lines in `size` pixels."""
    return -(-size // (self.tile * rate))


def winograd(size: int, rate: int) -> Winograd:
  """The one for an axis of `size` pixels and taps `rate` pixels apart."""
  pixels = -(-size // rate)
  shared = rate >= _SHARED_FROM_RATE
  if 1 < pixels <= (_SHARED_LINES_UP_TO if shared else _LINES_UP_TO):
    return line(pixels)
  # Of tiles of 3, these points have the least rounding: twice that of 2.
  return tiles((0.0, 1.0, -0.5, -2.0))


@functools.cache
def tiles(points: tuple[float, ...]) -> Winograd:
  """Tiles of one pixel less than there are points, for one product more.

  Toom and Cook: the product of two polynomials from their values at the points
  and at infinity.
  """
  tile = len(points) - 1
  output = np.vander(points, tile, increasing=True)
  kernel = np.vander(points, 3, increasing=True)
  for i, point in enumerate(points):
    kernel[i] /= np.prod(point - np.delete(points, i))
  output = np.vstack([output, np.eye(tile)[-1:]]).T
  kernel = np.vstack([kernel, np.eye(3)[-1:]])
  # `input` from what it has to do: output j is the sum of k[s] * x[j + s].
  both = np.einsum('jp,ps->jsp', output, kernel).reshape(3 * tile, -1)
  wanted = [np.eye(tile + 2)[j + s] for j in range(tile) for s in range(3)]
  solution = np.linalg.lstsq(both, np.array(wanted))[0]
  return Winograd(output, kernel, solution.round(12))  # zeros are zeros


@functools.cache
def line(pixels: int) -> Winograd:
  """A whole line, 2 pixels at least, between zeros: 3 products for 2 pixels.

  With one of the zeros the line is periodic, and a convolution multiplies its
  Fourier transform by that of the kernel: at the angle a, p + iq by b + ic, p
  and q the sums of x[j] cos aj and x[j] sin aj, b = k1 + (k0 + k2) cos a and
  c = (k0 - k2) sin a. Two products, of b + tc with p + tq and of b - tc with
  p - tq, t any number, give all that c has a part in and leave a multiple of
  bp. Those of all angles take the even part of the line to that of the result,
  by one symmetric matrix times k1 and another times k0 + k2, and so a product
  an axis that both matrices have.
  """
  points = pixels + 1
  places = np.arange(1, points)
  angles = 2 * np.pi / points * np.arange(1, pixels // 2 + 1)
  # Rounding is least near 1.25; at 60 and 120 degrees the other t makes a third
  # of the numbers 0, or more, and saves sums.
  t = 3**-0.5 if pixels in (2, 5) else 1.25
  cosine, sine = np.cos(angles), np.sin(angles)
  p, q = (f(np.outer(angles, places)) for f in (np.cos, np.sin))
  ones = np.ones_like(angles)
  kernel = [
    np.stack([cosine + s * sine, ones, cosine - s * sine], 1) for s in (t, -t)
  ]
  inputs = [p + t * q, p - t * q]
  outputs = [-rows / (points * t**2) for rows in reversed(inputs)]

  # Even parts, by their first half; the angles 0 and pi have no sine.
  half = pixels - pixels // 2
  even = np.vstack([p, places**0, (-1.0) ** places])[:, :half]
  weights = np.append(2 * (1 + t**-2) * ones, [1, points % 2 == 0]) / points
  of_middle = np.linalg.cholesky(even.T * weights @ even)
  of_ends = even.T * weights * np.append(cosine, [1, -1]) @ even
  inverse = np.linalg.inv(of_middle)
  ratios, axes = np.linalg.eigh(inverse @ of_ends @ inverse.T)
  axes = (of_middle @ axes).T
  axes = np.hstack([axes, axes[:, : pixels // 2][:, ::-1]])
  kernel.append(np.stack([ratios, ratios**0, ratios], 1))
  inputs.append(axes)
  outputs.append(axes)

  # Ones in place of the largest numbers save products.
  before, after = (np.vstack(rows) for rows in (inputs, outputs))
  scales = [np.abs(rows).max(1, keepdims=True) for rows in (before, after)]
  return Winograd(
    (after / scales[1]).T.round(12),
    (np.vstack(kernel) * scales[0] * scales[1]).round(12),
    (before / scales[0]).round(12),
  )
