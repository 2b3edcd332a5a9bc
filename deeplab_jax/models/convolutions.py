"""Ways to compute one convolution; `layers.conv2d` chooses among them.

They take x [B, H, W, Cin] and a kernel [k, k, Cin, Cout], k odd, pad
symmetrically with `rate * (k - 1) / 2` zeros and return [B, ceil(H / stride),
ceil(W / stride), Cout], `by_winograd` at k 3 and stride 1 alone. All are linear
in x and in the kernel, and can be transposed in either.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def matmul(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
  """[..., Cin] times [Cin, Cout]."""
  # Of two dimensions, since the gradient with respect to `matrix` contracts
  # all but the last, and XLA transposes a copy to contract more than one.
  y = lax.dot_general(
    x.reshape(-1, x.shape[-1]),
    matrix,
    (((1,), (0,)), ((), ())),
    preferred_element_type=dtype,
  )
  return y.reshape(*x.shape[:-1], matrix.shape[-1])


def by_xla(
  x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1
) -> jax.Array:
  """XLA's own convolution."""
  pad = rate * (kernel.shape[0] - 1) // 2
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    rhs_dilation=(rate, rate),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def by_patches(
  x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1
) -> jax.Array:
  """One matrix product with all taps of an output pixel in a row."""
  size, _, _, features = kernel.shape
  out = [-(-n // stride) for n in x.shape[1:3]]
  pad = rate * (size // 2)
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  for axis in (2, 1):  # first along the rows, so that few slices are narrow
    stop = stride * (out[axis - 1] - 1) + 1
    x = jnp.concatenate(
      [
        lax.slice_in_dim(x, rate * i, rate * i + stop, stride, axis)
        for i in range(size)
      ],
      -1,
    )
  return matmul(x, kernel.reshape(-1, features))


def by_taps(
  x: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  rate: int = 1,
  *,
  transposed: bool = False,
) -> jax.Array:
  """One matrix product a tap, over the pixels where the tap is on the map.

  They are added in float32 at least. With `transposed`, at stride 1 alone, it
  maps [B, H, W, Cout] to [B, H, W, Cin], as the gradient of the convolution
  with respect to x does.
  """
  size, _, channels, features = kernel.shape
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  out = [-(-n // stride) for n in x.shape[1:3]]
  # `split`, since its transpose concatenates where that of slices would add.
  taps = lax.split(kernel.reshape(-1, features), [channels] * size**2)
  if transposed:
    taps = [tap.T for tap in reversed(taps)]
    features = channels
  total = jnp.zeros((x.shape[0], *out, features), dtype)
  for i, tap in enumerate(taps):
    window, pads = x, [(0, 0)]
    for axis, offset in ((1, i // size), (2, i % size)):
      window, off_map = under_tap(
        window, axis, rate * (offset - size // 2), stride
      )
      pads.append(off_map)
    if window.size:
      total += jnp.pad(matmul(window, tap, dtype), (*pads, (0, 0)))
  return total.astype(x.dtype)


def under_tap(
  x: jax.Array, axis: int, offset: int, stride: int = 1
) -> tuple[jax.Array, tuple[int, int]]:
  """The pixels at `offset` from every `stride`th one of an axis.

  Args:
    x: [..., n, ...].
    axis: of the n pixels.
    offset: in pixels; below 0 for those in front. May lead off the map.
    stride: the result has ceil(n / stride) places.

  Returns:
    The m pixels on the map, [..., m, ...], and how many places before and
    behind them are off the map.
  """
  size = x.shape[axis]
  out = -(-size // stride)
  first = max(-(offset // stride), 0)
  last = min((size - 1 - offset) // stride, out - 1)
  if first > last:
    return lax.slice_in_dim(x, 0, 0, axis=axis), (out, 0)
  start, stop = first * stride + offset, last * stride + offset + 1
  window = lax.slice_in_dim(x, start, stop, stride, axis)
  return window, (first, out - 1 - last)


class _Winograd(NamedTuple):
  """Convolves a tile of a line with a kernel k of 3 taps.

  `output @ ((kernel @ k) * (input @ x))` is the result on `tile` pixels, x the
  same pixels and `border` more at each end.
  """

  output: np.ndarray
  kernel: np.ndarray
  input: np.ndarray

  @property
  def tile(self) -> int:
    return self.output.shape[0]

  @property
  def products(self) -> int:
    return self.kernel.shape[0]

  @property
  def border(self) -> int:
    return (self.input.shape[1] - self.tile) // 2

  def tiles(self, size: int, rate: int) -> int:
    return -(-size // (self.tile * rate))


def _toom_cook(points: tuple[float, ...]) -> _Winograd:
  """Tiles of one pixel less than there are points, for one product more.

  Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016):
  the product of two polynomials from their values at the points and at
  infinity.
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
  return _Winograd(output, kernel, solution.round(12))  # zeros are zeros


# Of tiles of 3, these points have the least rounding: twice that of tiles of 2.
_TILES = _toom_cook((0.0, 1.0, -0.5, -2.0))

# Lines between zeros take one product less. Of two pixels, both results hold
# k1 * (x0 + x1).
_PAIR = _Winograd(
  np.array([[1, 1, 0], [1, 0, 1]]),
  np.array([[0, 1, 0], [0, -1, 1], [1, -1, 0]]),
  np.array([[1, 1], [0, 1], [1, 0]]),
)

# Of three pixels, the sum and the difference of the ends, with the pixel in the
# middle, are each multiplied by a matrix of 2x2 in which the taps stand; the
# middle tap's share of the middle result, 9/8 and -1/8, is such that both
# matrices have real eigenvalues whatever the taps, and eigenvectors that do not
# depend on them.
_TRIPLE = _Winograd(
  np.array([[6, -6, 4, 4], [9, 9, 2, -2], [6, -6, -4, -4]]) / 16,
  np.array([[2, 3, 2], [-2, 3, -2], [6, 3, -6], [-6, 3, 6]]) / 3,
  np.array([[4, 6, 4], [-4, 6, -4], [6, -3, -6], [6, 3, -6]]) / 6,
)


def by_winograd(
  x: jax.Array, kernel: jax.Array, rate: int = 1, *, transposed: bool = False
) -> jax.Array:
  """Fewer products between transforms of the map and of the kernel, 3x3 alone.

  An atrous convolution is one of rate 1 on each of the `rate * rate` maps that
  take every `rate`th pixel of a row and of a column. Each is cut into tiles of
  3x3 pixels, which take 25 products a pair of channels instead of 81; where it
  is no larger than one, 16 do, and 9 for one of 2x2.

  With `transposed` it maps [B, H, W, Cout] to [B, H, W, Cin], as the gradient
  of the convolution with respect to x does.
  """
  kernels = winograd_kernels(kernel, x.shape[1:3], rate, transposed=transposed)
  return by_winograd_kernels(x, kernels, rate, transposed=transposed)


def winograd_kernels(
  kernel: jax.Array,
  size: tuple[int, int],
  rate: int = 1,
  *,
  transposed: bool = False,
) -> tuple[jax.Array, ...]:
  """The kernel [3, 3, Cin, Cout] transformed for maps of a height and width.

  Returns:
    An array [products of a column, Cin, Cout] a product of a row.

  Raises:
    ValueError: for a kernel of another size.
  """
  if kernel.shape[:2] != (3, 3):
    raise ValueError(f'kernel must be 3x3, got {kernel.shape[:2]}')
  order = slice(None, None, -1 if transposed else 1)
  down, across = (_winograd(n, rate).kernel[:, order] for n in size)
  kernel = kernel.reshape(9, *kernel.shape[2:])
  return tuple(_transform(np.kron(row, across), kernel) for row in down)


def fit_winograd(
  kernels: Sequence[jax.Array], size: tuple[int, int], rate: int
) -> bool:
  """Whether `winograd_kernels` gives such for maps of this size."""
  down, across = (_winograd(n, rate) for n in size)
  return (len(kernels), len(kernels[0])) == (down.products, across.products)


def by_winograd_kernels(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  rate: int = 1,
  *,
  transposed: bool = False,
) -> jax.Array:
  """`by_winograd` with a kernel that `winograd_kernels` has transformed."""
  batch, height, width, channels = x.shape
  down, across = (_winograd(n, rate) for n in (height, width))
  high, wide = down.tiles(height, rate), across.tiles(width, rate)
  pads, shape = [(0, 0)], [batch]
  for size, form, tiles in ((height, down, high), (width, across, wide)):
    pixels = form.tile * tiles + 2 * form.border
    before = rate * form.border
    pads.append((before, rate * pixels - before - size))
    shape += [pixels, rate]
  x = jnp.pad(x, (*pads, (0, 0))).reshape(*shape, channels)
  rows = _windows(x, 1, down)
  parts = []
  # The products of a row at a time, while they are in the caches.
  for to_row, kernel in zip(down.input, kernels, strict=True):
    row = lax.optimization_barrier(_weighted_sum(to_row, rows))
    columns = _windows(row, 3, across)
    columns = [_weighted_sum(weights, columns) for weights in across.input]
    y = lax.dot_general(
      jnp.stack(columns).reshape(across.products, -1, channels),
      kernel,
      (((2,), (2 if transposed else 1,)), ((0,), (0,))),
    )
    parts.append(_transform(across.output, y))
  y = jnp.stack([_weighted_sum(weights, parts) for weights in down.output])
  y = y.reshape(down.tile, across.tile, batch, high, rate, wide, rate, -1)
  y = y.transpose(2, 3, 0, 4, 5, 1, 6, 7)
  y = y.reshape(batch, down.tile * rate * high, across.tile * rate * wide, -1)
  return y[:, :height, :width]


def winograd_share(height: int, width: int, rate: int) -> float:
  """Its products over those of `by_taps`."""
  share = 1.0
  for size in (height, width):
    taps = sum(max(size - rate * abs(i), 0) for i in (-1, 0, 1))
    form = _winograd(size, rate)
    share *= form.products * rate * form.tiles(size, rate) / taps
  return share


def _winograd(size: int, rate: int) -> _Winograd:
  whole = (form for form in (_PAIR, _TRIPLE) if size <= form.tile * rate)
  return next(whole, _TILES)


def _windows(x: jax.Array, axis: int, form: _Winograd) -> list[jax.Array]:
  """The first pixels of all tiles' windows along an axis, the second, ..."""
  pixels = form.tile + 2 * form.border
  stop = x.shape[axis] - pixels + 1
  return [
    lax.slice_in_dim(x, i, i + stop, form.tile, axis) for i in range(pixels)
  ]


def _weighted_sum(weights: np.ndarray, terms: list[jax.Array]) -> jax.Array:
  total = None
  for weight, term in zip(weights, terms, strict=True):
    if weight:
      part = term * weight.astype(term.dtype)
      total = part if total is None else total + part
  return total


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
  """[m, n] times [n, ...] -> [m, ...]."""
  matrix = jnp.asarray(np.atleast_2d(matrix), x.dtype)
  y = lax.dot(matrix, x.reshape(len(x), -1))
  return y.reshape(-1, *x.shape[1:])
