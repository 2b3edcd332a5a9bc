"""Ways to compute one convolution; `layers.conv2d` chooses among them.

They take x [B, H, W, Cin] and a kernel [k, k, Cin, Cout], k odd, pad
symmetrically with `rate * (k - 1) / 2` zeros and return [B, ceil(H / stride),
ceil(W / stride), Cout], `by_winograd` at k 3 and stride 1 alone. All are linear
in x and in the kernel. The gradients of `by_taps` and `by_winograd` with
respect to the kernel are written out, for less memory than those JAX derives.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.ops.winograd import Winograd, winograd


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
  taps = lax.split(kernel.reshape(-1, features), [channels] * size**2)
  if transposed:
    taps = [tap.T for tap in reversed(taps)]
    features = channels
  total = jnp.zeros((x.shape[0], *out, features), dtype)
  for i, tap in enumerate(taps):
    if transposed and i and i % size == 0:
      # A row of taps after the other, lest the backward pass, when memory is
      # short, keeps the parts of all.
      x, total = lax.optimization_barrier((x, total))
    window, pads = _tap_window(x, i, size, stride, rate)
    if window.size:
      total += jnp.pad(matmul(window, tap, dtype), ((0, 0), *pads, (0, 0)))
  return total.astype(x.dtype)


def taps_kernel_gradient(
  x: jax.Array, gradient: jax.Array, size: int, stride: int = 1, rate: int = 1
) -> jax.Array:
  """Gradient of `by_taps` with respect to the kernel.

  Args:
    x: [B, H, W, Cin], of the convolution.
    gradient: [B, ceil(H / stride), ceil(W / stride), Cout], with respect to
      its result.
    size: k of the kernel.
    stride: of the convolution.
    rate: of the convolution.

  Returns:
    [k, k, Cin, Cout].
  """
  _, height, width, features = gradient.shape
  channels = x.shape[-1]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  taps = []
  for i in range(size**2):
    window, pads = _tap_window(x, i, size, stride, rate)
    (top, bottom), (left, right) = pads
    part = gradient[:, top : height - bottom, left : width - right]
    tap = lax.dot_general(
      window.reshape(-1, channels),
      part.reshape(-1, features),
      (((0,), (0,)), ((), ())),
      preferred_element_type=dtype,
    )
    # One after another, lest the windows of x are kept for all at once.
    x, tap = lax.optimization_barrier((x, tap))
    taps.append(tap)
  kernel = jnp.concatenate(taps).reshape(size, size, channels, features)
  return kernel.astype(x.dtype)


def _tap_window(
  x: jax.Array, tap: int, size: int, stride: int, rate: int
) -> tuple[jax.Array, list[tuple[int, int]]]:
  """Pixels under a tap, and how many places are off the map, by axis."""
  pads = []
  for axis, offset in ((1, tap // size), (2, tap % size)):
    x, off_map = under_tap(x, axis, rate * (offset - size // 2), stride)
    pads.append(off_map)
  return x, pads


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


def by_winograd(
  x: jax.Array, kernel: jax.Array, rate: int = 1, *, transposed: bool = False
) -> jax.Array:
  """Fewer products between transforms of the map and of the kernel, 3x3 alone.

  An atrous convolution is one of rate 1 on each of the `rate * rate` maps that
  take every `rate`th pixel of a row and of a column. Each is cut into tiles of
  3x3 pixels, which take 25 products a pair of channels instead of 81; where it
  is small enough to be taken whole, fewer do, see `winograd`.

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
    As many arrays as a line of the height takes products, each [products of a
    line of the width, Cin, Cout].

  Raises:
    ValueError: for a kernel of another size.
  """
  if kernel.shape[:2] != (3, 3):
    raise ValueError(f'kernel must be 3x3, got {kernel.shape[:2]}')
  order = slice(None, None, -1 if transposed else 1)
  down, across = (winograd(n, rate).kernel[:, order] for n in size)
  # `split`, since its transpose concatenates where that of slices would add.
  taps = [tap[0] for tap in lax.split(kernel, [1] * 3)]
  return tuple(_transform(across, _weighted_sum(row, taps)) for row in down)


def fit_winograd(
  kernels: Sequence[jax.Array], size: tuple[int, int], rate: int
) -> bool:
  """Whether `winograd_kernels` gives such for maps of this size."""
  down, across = (winograd(n, rate) for n in size)
  return (len(kernels), len(kernels[0])) == (down.products, across.products)


def by_winograd_kernels(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  rate: int = 1,
  *,
  transposed: bool = False,
) -> jax.Array:
  """`by_winograd` with a kernel that `winograd_kernels` has transformed.

  With `transposed` the kernels' last axis is that of x's channels.
  """
  down, across = (winograd(n, rate) for n in x.shape[1:3])
  contract = 2 if transposed else 1
  lines, parts = _lines(x, 1, down, rate), []
  # The products of a row at a time, while they are in the caches.
  for to_row, kernel in zip(down.input, kernels, strict=True):
    columns = _columns(lines, to_row, down, across, rate)
    products = lax.dot_general(
      columns, kernel, (((2,), (contract,)), ((0,), (0,)))
    )
    parts.append(_transform(across.output, products))
  return _assembled(parts, x.shape[:3], rate)


def winograd_kernel_gradient(
  x: jax.Array, gradient: jax.Array, rate: int = 1
) -> jax.Array:
  """Gradient of `by_winograd` with respect to the kernel.

  Args:
    x: [B, H, W, Cin], of the convolution.
    gradient: [B, H, W, Cout], with respect to its result.
    rate: of the convolution.

  Returns:
    [3, 3, Cin, Cout].
  """
  down, across = (winograd(n, rate) for n in x.shape[1:3])
  batch, height, width, channels = x.shape
  count = batch * rate**2 * down.count(height, rate) * across.count(width, rate)
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
    # One after another, lest the columns are kept for all at once.
    lines, to_kernel = lax.optimization_barrier((lines, to_kernel))
    kernels.append(to_kernel)
  kernel = jax.ShapeDtypeStruct((3, 3, channels, features), x.dtype)
  (to_kernel,) = jax.linear_transpose(
    lambda kernel: winograd_kernels(kernel, x.shape[1:3], rate), kernel
  )(tuple(kernels))
  return to_kernel


def _columns(
  lines: jax.Array,
  to_row: np.ndarray,
  down: Winograd,
  across: Winograd,
  rate: int,
) -> jax.Array:
  """What a row of kernels is multiplied by: [products, tiles, C]."""
  row = _weighted_sum(to_row, _windows(lines, 1, down))
  row = lax.optimization_barrier(_lines(row, 3, across, rate))
  columns = _windows(row, 3, across)
  columns = [_weighted_sum(weights, columns) for weights in across.input]
  return jnp.stack(columns).reshape(across.products, -1, lines.shape[-1])


def _assembled(
  parts: Sequence[jax.Array], shape: tuple[int, int, int], rate: int
) -> jax.Array:
  """The map [*shape, C] of the rows' products, [tile, tiles, C] each."""
  batch, height, width = shape
  down, across = (winograd(n, rate) for n in (height, width))
  high, wide = down.count(height, rate), across.count(width, rate)
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
    form = winograd(size, rate)
    share *= form.products * rate * form.count(size, rate) / taps
  return share


def _lines(x: jax.Array, axis: int, form: Winograd, rate: int) -> jax.Array:
  """Splits an axis in [pixels of a line, rate], with zeros around each line."""
  size = x.shape[axis]
  pixels = form.tile * form.count(size, rate) + 2 * form.border
  before = rate * form.border
  pads = [(0, 0)] * x.ndim
  pads[axis] = before, rate * pixels - before - size
  shape = *x.shape[:axis], pixels, rate, *x.shape[axis + 1 :]
  return jnp.pad(x, pads).reshape(shape)


def _windows(x: jax.Array, axis: int, form: Winograd) -> list[jax.Array]:
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
  matrix = jnp.asarray(matrix, x.dtype)
  y = lax.dot(matrix, x.reshape(len(x), -1))
  return y.reshape(-1, *x.shape[1:])
