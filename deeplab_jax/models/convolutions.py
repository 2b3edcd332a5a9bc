"""Ways to compute one convolution; `layers.conv2d` chooses among them.

They take x [B, H, W, Cin] and a kernel [k, k, Cin, Cout], k odd, pad
symmetrically with `rate * (k - 1) / 2` zeros and return [B, ceil(H / stride),
ceil(W / stride), Cout], `by_winograd` at k 3 and stride 1 alone. All are linear
in x and in the kernel, and can be transposed in either.
"""

from typing import Any

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


def _toom_cook(
  points: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Matrices that convolve a tile of a line with a kernel of 3 taps.

  Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016):
  the product of two polynomials from their values at the points and at
  infinity.

  Returns:
    `output` [tile, p], `kernel` [p, 3] and `input` [p, tile + 2], such that
    `output @ ((kernel @ k) * (input @ x))` is the convolution of `tile + 2`
    pixels x; p is one more than the points, and `tile` one less.
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
  return output, kernel, solution.round(12)  # zeros are zeros


# Of tiles of 3, these points have the least rounding: twice that of tiles of 2.
_OUTPUT, _KERNEL, _INPUT = _toom_cook((0.0, 1.0, -0.5, -2.0))
_PRODUCTS, _TILE = _KERNEL.shape[0], _OUTPUT.shape[0]


def by_winograd(
  x: jax.Array, kernel: jax.Array, rate: int = 1, *, transposed: bool = False
) -> jax.Array:
  """Fewer products between transforms of the map and of the kernel, 3x3 alone.

  An atrous convolution is one of rate 1 on each of the `rate * rate` maps that
  take every `rate`th pixel of a row and of a column. Each is cut into tiles of
  3x3 pixels, which take 25 products a pair of channels instead of 81.

  With `transposed` it maps [B, H, W, Cout] to [B, H, W, Cin], as the gradient
  of the convolution with respect to x does.
  """
  if kernel.shape[:2] != (3, 3):
    raise ValueError(f'kernel must be 3x3, got {kernel.shape[:2]}')
  batch, height, width, channels = x.shape
  high, wide = (_tiles(size, rate) for size in (height, width))
  x = jnp.pad(
    x,
    (
      (0, 0),
      (rate, rate * (_TILE * high + 1) - height),
      (rate, rate * (_TILE * wide + 1) - width),
      (0, 0),
    ),
  )
  x = x.reshape(batch, _TILE * high + 2, rate, _TILE * wide + 2, rate, channels)
  rows = _windows(x, 1)
  kernel = kernel.reshape(9, *kernel.shape[2:])
  to_products = _KERNEL[:, ::-1] if transposed else _KERNEL
  parts = []
  # The products of a row at a time, while they are in the caches.
  for to_row, to_kernel in zip(_INPUT, to_products, strict=True):
    row = lax.optimization_barrier(_weighted_sum(to_row, rows))
    columns = _windows(row, 3)
    columns = jnp.stack([_weighted_sum(weights, columns) for weights in _INPUT])
    y = lax.dot_general(
      columns.reshape(_PRODUCTS, -1, channels),
      _transform(np.kron(to_kernel, to_products), kernel),
      (((2,), (2 if transposed else 1,)), ((0,), (0,))),
    )
    parts.append(_transform(_OUTPUT, y))
  y = jnp.stack([_weighted_sum(weights, parts) for weights in _OUTPUT])
  y = y.reshape(_TILE, _TILE, batch, high, rate, wide, rate, -1)
  y = y.transpose(2, 3, 0, 4, 5, 1, 6, 7)
  y = y.reshape(batch, _TILE * rate * high, _TILE * rate * wide, -1)
  return y[:, :height, :width]


def winograd_share(height: int, width: int, rate: int) -> float:
  """Its products over those of `by_taps`."""
  share = 1.0
  for size in (height, width):
    taps = sum(max(size - rate * abs(i), 0) for i in (-1, 0, 1))
    share *= _PRODUCTS * rate * _tiles(size, rate) / taps
  return share


def _tiles(size: int, rate: int) -> int:
  return -(-size // (_TILE * rate))


def _windows(x: jax.Array, axis: int) -> list[jax.Array]:
  """The first pixels of all tiles' windows along an axis, the second, ..."""
  stop = x.shape[axis] - _TILE - 1
  return [
    lax.slice_in_dim(x, i, i + stop, _TILE, axis) for i in range(_TILE + 2)
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
