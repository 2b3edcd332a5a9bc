"""3x3 convolutions by few products, between transforms of map and kernel.

Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks" (2016).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Longer lines take tiles: in two dimensions a line has as many kernels as the
# square of its products, and each serves `rate * rate` lines of an image.
_LINES_UP_TO = 3
_SHARED_FROM_RATE = 8
_SHARED_LINES_UP_TO = 5


class Form(NamedTuple):
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
    """Pixels at each end of the tile that its result depends on."""
    return (self.input.shape[1] - self.tile) // 2

  def cover(self, size: int, rate: int) -> int:
    """How many tiles cover one of the `rate` lines in `size` pixels."""
    return -(-size // (self.tile * rate))


def form_of(size: int, rate: int) -> Form:
  """The form for an axis of `size` pixels and taps `rate` pixels apart."""
  pixels = -(-size // rate)
  shared = rate >= _SHARED_FROM_RATE
  if 1 < pixels <= (_SHARED_LINES_UP_TO if shared else _LINES_UP_TO):
    return line(pixels)
  # Of tiles of 3, these points have the least rounding: twice that of 2.
  return tiles((0.0, 1.0, -0.5, -2.0))


@functools.cache
def tiles(points: tuple[float, ...]) -> Form:
  """Tiles of `len(points) - 1` pixels, by Toom and Cook.

  The product of two polynomials follows from their values at the points and at
  infinity: two products more than pixels.
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
  return Form(output, kernel, solution.round(12))  # zeros are zeros


@functools.cache
def line(pixels: int) -> Form:
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
  return Form(
    (after / scales[1]).T.round(12),
    (np.vstack(kernel) * scales[0] * scales[1]).round(12),
    (before / scales[0]).round(12),
  )


def convolve(
  x: jax.Array, kernel: jax.Array, rate: int = 1, *, transposed: bool = False
) -> jax.Array:
  """Convolves [B, H, W, Cin] with [3, 3, Cin, Cout] at stride 1.

  An atrous convolution is a convolution of rate 1 on each of `rate * rate` maps
  that take every `rate`th pixel of a row and of a column. Each is cut into
  tiles of 3x3 pixels, which take 25 products per pair of channels instead of
  81. A map of few pixels is taken whole and takes fewer, see `form_of`.

  With `transposed` it maps [B, H, W, Cout] to [B, H, W, Cin]: the gradient with
  respect to x.
  """
  kernels = transform(kernel, x.shape[1:3], rate, transposed=transposed)
  return convolve_transformed(x, kernels, rate, transposed=transposed)


def transform(
  kernel: jax.Array,
  size: Sequence[int],
  rate: int = 1,
  *,
  transposed: bool = False,
) -> tuple[jax.Array, ...]:
  """The kernel [3, 3, Cin, Cout] transformed for maps of a height and width.

  These are as many arrays as a column takes products, each [products of a row,
  Cin, Cout].
  """
  if kernel.shape[:2] != (3, 3):
    raise ValueError(f'kernel must be 3x3, got {kernel.shape[:2]}')
  order = slice(None, None, -1 if transposed else 1)
  down, across = (form_of(n, rate).kernel[:, order] for n in size)
  # `split`, since its transpose concatenates where that of slices would add.
  taps = [tap[0] for tap in lax.split(kernel, [1] * 3)]
  return tuple(_transform(across, _weighted_sum(row, taps)) for row in down)


def fits(kernels: Sequence[jax.Array], size: Sequence[int], rate: int) -> bool:
  """Whether `transform` gives the same shapes for maps of this size."""
  down, across = (form_of(n, rate) for n in size)
  return (len(kernels), len(kernels[0])) == (down.products, across.products)


def convolve_transformed(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  rate: int = 1,
  *,
  transposed: bool = False,
) -> jax.Array:
  """`convolve` with a transformed kernel.

  With `transposed` the last axis of the kernels matches the channels of x.
  """
  down, across = (form_of(n, rate) for n in x.shape[1:3])
  contract = 2 if transposed else 1
  lines, parts = _lines(x, 1, down, rate), []
  # One row of products at a time, while it is in the caches.
  for to_row, kernel in zip(down.input, kernels, strict=True):
    columns = _columns(lines, to_row, down, across, rate)
    products = lax.dot_general(
      columns, kernel, (((2,), (contract,)), ((0,), (0,)))
    )
    parts.append(_transform(across.output, products))
  return _assembled(parts, x.shape[:3], rate)


def kernel_gradient(
  x: jax.Array, gradient: jax.Array, rate: int = 1
) -> jax.Array:
  """Gradient of `convolve` with respect to the kernel, [3, 3, Cin, Cout].

  `gradient` [B, H, W, Cout] is the gradient of the result.
  """
  down, across = (form_of(n, rate) for n in x.shape[1:3])
  batch, height, width, channels = x.shape
  count = batch * rate**2 * down.cover(height, rate) * across.cover(width, rate)
  features = gradient.shape[-1]
  part = jax.ShapeDtypeStruct((across.tile, count, features), x.dtype)
  (to_parts,) = jax.linear_transpose(
    lambda parts: _assembled(parts, x.shape[:3], rate), [part] * down.products
  )(gradient)
  lines, kernels = _lines(x, 1, down, rate), []
  for to_row, to_part in zip(down.input, to_parts, strict=True):
    columns = _columns(lines, to_row, down, across, rate)
    to_products = _transform(across.output.T, to_part)
    to_kernel = lax.dot_general(
      columns, to_products, (((1,), (1,)), ((0,), (0,)))
    )
    # One at a time, so that only its columns are kept.
    lines, to_kernel = lax.optimization_barrier((lines, to_kernel))
    kernels.append(to_kernel)
  kernel = jax.ShapeDtypeStruct((3, 3, channels, features), x.dtype)
  (to_kernel,) = jax.linear_transpose(
    lambda kernel: transform(kernel, x.shape[1:3], rate), kernel
  )(tuple(kernels))
  return to_kernel


def _columns(
  lines: jax.Array, to_row: np.ndarray, down: Form, across: Form, rate: int
) -> jax.Array:
  """The factors of a row of kernels: [products, tiles, C]."""
  row = _weighted_sum(to_row, _windows(lines, 1, down))
  row = lax.optimization_barrier(_lines(row, 3, across, rate))
  columns = _windows(row, 3, across)
  columns = [_weighted_sum(weights, columns) for weights in across.input]
  return jnp.stack(columns).reshape(across.products, -1, lines.shape[-1])


def _assembled(
  parts: list[jax.Array], shape: Sequence[int], rate: int
) -> jax.Array:
  """The map [*shape, C] of the rows' products, [tile, tiles, C] each."""
  batch, height, width = shape
  down, across = (form_of(n, rate) for n in (height, width))
  high, wide = down.cover(height, rate), across.cover(width, rate)
  y = jnp.stack([_weighted_sum(weights, parts) for weights in down.output])
  y = y.reshape(down.tile, across.tile, batch, high, rate, wide, rate, -1)
  y = y.transpose(2, 3, 0, 4, 5, 1, 6, 7)
  y = y.reshape(batch, down.tile * rate * high, across.tile * rate * wide, -1)
  return y[:, :height, :width]


def share(size: Sequence[int], rate: int) -> float:
  """Its number of products over that of one matrix product per tap."""
  share = 1.0
  for length in size:
    taps = sum(max(length - rate * abs(i), 0) for i in (-1, 0, 1))
    form = form_of(length, rate)
    share *= form.products * rate * form.cover(length, rate) / taps
  return share


def _lines(x: jax.Array, axis: int, form: Form, rate: int) -> jax.Array:
  """Splits an axis in [pixels of a line, rate], with zeros around each line."""
  size = x.shape[axis]
  pixels = form.tile * form.cover(size, rate) + 2 * form.border
  before = rate * form.border
  pads = [(0, 0)] * x.ndim
  pads[axis] = before, rate * pixels - before - size
  shape = *x.shape[:axis], pixels, rate, *x.shape[axis + 1 :]
  return jnp.pad(x, pads).reshape(shape)


def _windows(x: jax.Array, axis: int, form: Form) -> list[jax.Array]:
  """The first pixels of all tiles' windows along an axis, the second, ..."""
  pixels = form.tile + 2 * form.border
  stop = x.shape[axis] - pixels + 1
  return [
    lax.slice_in_dim(x, i, i + stop, form.tile, axis) for i in range(pixels)
  ]


def _weighted_sum(weights: np.ndarray, terms: Sequence[jax.Array]) -> jax.Array:
  parts = [
    term * weight.astype(term.dtype)
    for weight, term in zip(weights, terms, strict=True)
    if weight
  ]
  return functools.reduce(jnp.add, parts)


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
  """[m, n] times [n, ...] -> [m, ...]."""
  y = lax.dot(jnp.asarray(matrix, x.dtype), x.reshape(len(x), -1))
  return y.reshape(-1, *x.shape[1:])
