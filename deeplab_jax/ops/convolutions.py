"""Ways to compute a convolution, and which of them a CPU takes.

They take x [B, H, W, Cin] and a kernel [k, k, Cin, Cout], k odd, pad with
`rate * (k - 1) / 2` zeros on every side, and return [B, ceil(H / stride),
ceil(W / stride), Cout]. All are linear in x and in the kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.ops import winograd

# From this rate on, XLA's convolution on CPUs takes about twice the time of one
# matrix product per tap, in both passes, and spends much of it on padding.
_TAPS_FROM_RATE = 4

# Up to this many input channels, one matrix product over all taps gives the
# gradient of the kernel.
_PATCHES_TO_INPUTS = 64

# Winograd's algorithm saves products and adds transforms. The transforms of the
# map take as long as the products of few channels, those of the kernel as long
# as the products of few pixels.
_WINOGRAD_UP_TO = 0.55
_CACHED_UP_TO = 0.8  # where the kernel is transformed once: rate 18 on 33x33
_WINOGRAD_FROM_SIZE = 16
_WINOGRAD_FROM_CHANNELS = 64


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


def xla_gradients(
  x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int, rate: int
) -> tuple[jax.Array, jax.Array]:
  """Gradients of `by_xla` with respect to x and to the kernel."""
  return (
    _transpose(lambda x: by_xla(x, kernel, stride, rate), x, gradient),
    _transpose(lambda k: by_xla(x, k, stride, rate), kernel, gradient),
  )


def _transpose(function: Any, value: jax.Array, gradient: Any) -> jax.Array:
  """The gradient of a linear function's argument, which `value` stands for."""
  (result,) = jax.linear_transpose(function, value)(gradient)
  return result


def on_cpu(
  x: jax.Array,
  kernel: jax.Array,
  cached: tuple[jax.Array, ...],
  stride: int,
  rate: int,
) -> jax.Array:
  """The fastest form on CPUs; `cached` is what `transform` gave, or empty.

  A transformed kernel is used where it suits x.
  """
  fits = cached and winograd.fits(cached, x.shape[1:3], rate)
  if fits and winograd_pays(x, kernel, stride, rate, _CACHED_UP_TO):
    return winograd.convolve_transformed(x, cached, rate, transposed=True)
  if winograd_pays(x, kernel, stride, rate):
    return winograd.convolve(x, kernel, rate)
  form = by_taps if _taps_pay(kernel, stride, rate) else by_xla
  return form(x, kernel, stride, rate)


def gradients_on_cpu(
  x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int, rate: int
) -> tuple[jax.Array, jax.Array]:
  """Gradients with respect to x and to the kernel.

  XLA's convolution takes two to six times as long for the kernel's gradient.
  """
  # Tied to the gradient, so that the forward pass keeps no windows of x.
  x, kernel, gradient = lax.optimization_barrier((x, kernel, gradient))
  if winograd_pays(x, kernel, stride, rate):
    to_x = winograd.convolve(gradient, kernel, rate, transposed=True)
    to_kernel = winograd.kernel_gradient(x, gradient, rate)
  else:
    if _taps_pay(kernel, stride, rate):
      # JAX's transpose would add in the type of x.
      to_x = by_taps(gradient, kernel, rate=rate, transposed=True)
    else:
      to_x = _transpose(lambda x: by_xla(x, kernel, stride, rate), x, gradient)
    if kernel.shape[2] <= _PATCHES_TO_INPUTS:
      to_kernel = _transpose(
        lambda k: by_patches(x, k, stride, rate), kernel, gradient
      )
    else:
      to_kernel = taps_kernel_gradient(
        x, gradient, kernel.shape[0], stride, rate
      )
  # Summed here, so that no parts are kept for whoever reads the sum; and tied,
  # since a kernel that is updated before its last use here has to be copied.
  return lax.optimization_barrier((to_x, to_kernel))


def transform(
  kernel: jax.Array, x: jax.ShapeDtypeStruct, stride: int, rate: int
) -> tuple[jax.Array, ...]:
  """What `on_cpu` takes as `cached` for maps like x; empty for none."""
  if not winograd_pays(x, kernel, stride, rate, _CACHED_UP_TO):
    return ()
  # Transposed: XLA's products of few rows take a matrix with the channels of
  # the result first in less time.
  return winograd.transform(kernel.swapaxes(2, 3), x.shape[1:3], rate)


def winograd_pays(
  x: Any, kernel: Any, stride: int, rate: int, up_to: float = _WINOGRAD_UP_TO
) -> bool:
  """Whether Winograd's algorithm is faster for maps like x."""
  return (
    kernel.shape[0] == 3
    and stride == 1
    and x.dtype == jnp.float32
    and min(x.shape[1:3]) >= _WINOGRAD_FROM_SIZE
    and min(kernel.shape[2:]) >= _WINOGRAD_FROM_CHANNELS
    and winograd.share(x.shape[1:3], rate) <= up_to
  )


def _taps_pay(kernel: jax.Array, stride: int, rate: int) -> bool:
  return stride == 1 and (kernel.shape[0] == 1 or rate >= _TAPS_FROM_RATE)


def matmul(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
  """[..., Cin] times [Cin, Cout]."""
  # Of two dimensions, since the gradient with respect to `matrix` contracts
  # all but the last, and XLA transposes a copy to contract more than one.
  y = lax.dot(x.reshape(-1, x.shape[-1]), matrix, preferred_element_type=dtype)
  return y.reshape(*x.shape[:-1], matrix.shape[-1])


def by_patches(
  x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1
) -> jax.Array:
  """One matrix product, with all taps of an output pixel in a row."""
  size, _, _, features = kernel.shape
  out = [-(-n // stride) for n in x.shape[1:3]]
  pad = rate * (size // 2)
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  for axis in (2, 1):  # along the rows first, so that few slices are narrow
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
  """One matrix product per tap, over the pixels where the tap is on the map.

  The products are added in float32 at least. With `transposed` (stride 1 only)
  it maps [B, H, W, Cout] to [B, H, W, Cin]: the gradient with respect to x.
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
      # One row of taps at a time, so that only its parts are kept.
      x, total = lax.optimization_barrier((x, total))
    window, pads = _tap_window(x, i, size, stride, rate)
    if window.size:
      total += jnp.pad(matmul(window, tap, dtype), ((0, 0), *pads, (0, 0)))
  return total.astype(x.dtype)


def taps_kernel_gradient(
  x: jax.Array, gradient: jax.Array, size: int, stride: int = 1, rate: int = 1
) -> jax.Array:
  """Gradient of `by_taps` with respect to the kernel, [k, k, Cin, Cout].

  `gradient` [B, ceil(H / stride), ceil(W / stride), Cout] is the gradient of
  the result, and `size` is k.
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
    # One at a time, so that only one window of x is kept.
    x, tap = lax.optimization_barrier((x, tap))
    taps.append(tap)
  kernel = jnp.concatenate(taps).reshape(size, size, channels, features)
  return kernel.astype(x.dtype)


def _tap_window(
  x: jax.Array, tap: int, size: int, stride: int, rate: int
) -> tuple[jax.Array, list[tuple[int, int]]]:
  """The pixels under a tap, and per axis how many places are off the map."""
  pads = []
  for axis, offset in ((1, tap // size), (2, tap % size)):
    x, off_map = under_tap(x, axis, rate * (offset - size // 2), stride)
    pads.append(off_map)
  return x, pads


def under_tap(
  x: jax.Array, axis: int, offset: int, stride: int = 1
) -> tuple[jax.Array, tuple[int, int]]:
  """The pixels at `offset` from every `stride`th pixel of an axis.

  `offset` may be negative, and may lead off the map. The axis would have
  ceil(n / stride) places; returned are the pixels that are on the map, and how
  many places before and after them are off it.
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
