"""Convolution and resizing as every part of the network uses them.

All maps are [B, H, W, C]. Padding is explicit and symmetric, so that a strided
convolution equals the dense one subsampled, at odd and even sizes alike.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from deeplab_jax.ops import convolutions
from deeplab_jax.ops.linear import linear_call

# From this rate on, XLA's convolution on CPU takes about twice the time of one
# matrix product a tap, forward and backward, and spends much of it on padding.
_TAPS_FROM_RATE = 4

# Up to this many input channels the taps are gathered in one matrix product
# for the gradient of the kernel.
_PATCHES_TO_INPUTS = 64

# Winograd's algorithm saves products and adds transforms: those of the map take
# as long as the products of few channels, that of the kernel as those of few
# pixels.
_WINOGRAD_UP_TO = 0.55
_PREPARED_UP_TO = 0.8  # with the kernel transformed before: rate 18 on 33x33
_WINOGRAD_FROM_SIZE = 16
_WINOGRAD_FROM_CHANNELS = 64


REMATERIALIZATIONS = ('', 'none', 'elementwise', 'block')


def rematerialize(function: Callable[..., Any]) -> Callable[..., Any]:
  """`nn.remat` that keeps the batch statistics, sums over devices included.

  Of batch normalisation, ReLU and a convolution in a row, the maps between take
  the memory of the convolutions once more, and next to no time to compute
  again. The last convolution is not computed again: its gradient needs its
  input and kernel, not its result.
  """
  return nn.remat(function, policy=_keeps)


def _keeps(primitive: Any, *_: Any, **__: Any) -> bool:
  return primitive.name in ('reduce_sum', 'psum')


def on_cpu() -> bool:
  """Whether JAX computes on a CPU."""
  return jax.default_backend() == 'cpu'


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises `ValueError` unless the setting `name` has one of its values."""
  if value not in choices:
    raise ValueError(
      f'{name} must be one of {", ".join(choices)}, got {value!r}'
    )


def check_map(name: str, x: jax.Array, channels: int | None = None) -> None:
  """Raises `ValueError` unless x is a map [B, H, W, C] of at least a pixel.

  Args:
    name: of x, for the message.
    x: anything with a shape, also a tracer: it costs nothing at run time.
    channels: C; None for any number.
  """
  shape = jnp.shape(x)
  right = len(shape) == 4 and 0 not in shape[1:]
  if right and channels in (None, shape[-1]):
    return
  raise ValueError(
    f'{name} must be [B, H, W, {channels or "C"}], got'
    f' {list(shape)}{_shape_hint(name, shape, channels)}'
  )


def _shape_hint(name: str, shape: tuple[int, ...], channels: int | None) -> str:
  """What makes the shape right, where that is evident."""
  if len(shape) == 4 and channels in shape[1:2]:
    return f'; the channels are second: {name}.transpose(0, 2, 3, 1)'
  if len(shape) == 3 and channels in (None, shape[2]):
    return f'; the batch axis is missing: {name}[None]'
  if len(shape) == 3 and channels == shape[0]:
    return (
      '; the batch axis is missing and the channels are first:'
      f' {name}.transpose(1, 2, 0)[None]'
    )
  return ''


def conv2d(
  x: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  rate: int = 1,
  prepared: Sequence[jax.Array] = (),
) -> jax.Array:
  """Convolves with symmetric zero padding of `rate * (k - 1) / 2` pixels.

  Args:
    x: [B, H, W, Cin].
    kernel: [k, k, Cin, Cout], k odd.
    stride: output pixel spacing in input pixels.
    rate: spacing of the kernel's taps in input pixels (atrous convolution).
    prepared: of the same kernel, see `prepare_kernel`; not used where it does
      not suit x. Gradients do not go through it to the kernel.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), Cout]. It has derivatives of every
    order, in forward and in reverse mode.

  Raises:
    ValueError: for a kernel that is not odd and square.
  """
  if kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
    raise ValueError(f'the kernel must be odd and square, got {kernel.shape}')
  if kernel.shape[0] == 1:
    x, stride, rate = x[:, ::stride, ::stride], 1, 1
  if on_cpu():
    if (
      prepared
      and _winograd_pays(x, kernel, stride, rate, _PREPARED_UP_TO)
      and convolutions.fit_winograd(prepared, x.shape[1:3], rate)
    ):
      return convolutions.by_winograd_kernels(
        x, prepared, rate, transposed=True
      )
    return _conv2d_on_cpu(x, kernel, stride, rate)
  if kernel.shape[0] == 1:
    return convolutions.matmul(x, kernel[0, 0])
  return convolutions.by_xla(x, kernel, stride, rate)


def prepare_kernel(
  x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1
) -> tuple[jax.Array, ...]:
  """What `conv2d` computes from the kernel alone; empty where that is nothing.

  It suits maps of the size of x, and most others.
  """
  if on_cpu() and _winograd_pays(x, kernel, stride, rate, _PREPARED_UP_TO):
    # `transposed` in `conv2d`: XLA's products of few rows take a matrix with
    # the channels of the result in front in less time.
    return convolutions.winograd_kernels(
      kernel.swapaxes(2, 3), x.shape[1:3], rate
    )
  return ()


def _conv2d_forward(
  x: jax.Array, kernel: jax.Array, stride: int, rate: int
) -> jax.Array:
  if _winograd_pays(x, kernel, stride, rate):
    return convolutions.by_winograd(x, kernel, rate)
  taps = _taps_pay(kernel, stride, rate)
  form = convolutions.by_taps if taps else convolutions.by_xla
  return form(x, kernel, stride, rate)


def _taps_pay(kernel: jax.Array, stride: int, rate: int) -> bool:
  return stride == 1 and (kernel.shape[0] == 1 or rate >= _TAPS_FROM_RATE)


def _winograd_pays(
  x: jax.Array,
  kernel: jax.Array,
  stride: int,
  rate: int,
  up_to: float = _WINOGRAD_UP_TO,
) -> bool:
  return (
    kernel.shape[0] == 3
    and stride == 1
    and x.dtype == jnp.float32
    and min(x.shape[1:3]) >= _WINOGRAD_FROM_SIZE
    and min(kernel.shape[2:]) >= _WINOGRAD_FROM_CHANNELS
    and convolutions.winograd_share(*x.shape[1:3], rate) <= up_to
  )


def _conv2d_backward(
  x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int, rate: int
) -> tuple[jax.Array, jax.Array]:
  """Gradients with respect to x and to the kernel.

  XLA's convolution takes two to six times as long for the second.
  """
  # Tied to the gradient, lest windows of x are kept from the forward pass.
  x, kernel, gradient = lax.optimization_barrier((x, kernel, gradient))
  if _winograd_pays(x, kernel, stride, rate):
    to_x = convolutions.by_winograd(gradient, kernel, rate, transposed=True)
    to_kernel = convolutions.winograd_kernel_gradient(x, gradient, rate)
  else:
    if _taps_pay(kernel, stride, rate):
      # Transposed by JAX it would add in x's dtype.
      to_x = convolutions.by_taps(gradient, kernel, rate=rate, transposed=True)
    else:
      (to_x,) = jax.linear_transpose(
        lambda x: convolutions.by_xla(x, kernel, stride, rate), x
      )(gradient)
    if kernel.shape[2] <= _PATCHES_TO_INPUTS:
      (to_kernel,) = jax.linear_transpose(
        lambda kernel: convolutions.by_patches(x, kernel, stride, rate), kernel
      )(gradient)
    else:
      to_kernel = convolutions.taps_kernel_gradient(
        x, gradient, kernel.shape[0], stride, rate
      )
  # Added up here, lest its parts are kept for whoever reads the sum; and tied,
  # since a kernel that is updated before its last use here has to be copied.
  return lax.optimization_barrier((to_x, to_kernel))


_conv2d_on_cpu = jax.custom_jvp(_conv2d_forward, nondiff_argnums=(2, 3))


@_conv2d_on_cpu.defjvp
def _conv2d_differential(
  stride: int,
  rate: int,
  values: tuple[jax.Array, jax.Array],
  tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  y = _conv2d_on_cpu(*values, stride, rate)
  settings = {'stride': stride, 'rate': rate}
  return y, linear_call(
    functools.partial(_conv2d_tangent, **settings),
    functools.partial(_conv2d_backward, **settings),
    values,
    tangents,
    like=y,
  )


def _conv2d_tangent(
  x: jax.Array,
  kernel: jax.Array,
  x_dot: jax.Array,
  kernel_dot: jax.Array,
  stride: int,
  rate: int,
) -> jax.Array:
  to_x = _conv2d_on_cpu(x_dot, kernel, stride, rate)
  return to_x + _conv2d_on_cpu(x, kernel_dot, stride, rate)


class Conv(nn.Module):
  """Square convolution, stride and rate in input pixels, see `conv2d`.

  Parameters, always float32: `kernel` [k, k, Cin, features] and, with
  `use_bias`, `bias` [features]. Applied with the collection 'prepared' mutable,
  and 'params' not, it puts there what `prepare_kernel` gives; it uses what it
  finds there.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  rate: int = 1
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, Cin] to [B, ceil(H/stride), ceil(W/stride), features]."""
    k = self.kernel_size
    kernel = self.param(
      'kernel',
      nn.initializers.he_normal(),
      (k, k, x.shape[-1], self.features),
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    # Asked for by name: in `init`, for one, all collections are mutable.
    mutable = self.is_mutable_collection
    if mutable('prepared') and not mutable('params'):
      new = prepare_kernel(x, kernel, self.stride, self.rate)
      if new:
        self.put_variable('prepared', 'kernel', new)
    prepared = self.get_variable('prepared', 'kernel', ())
    x = conv2d(x, kernel, self.stride, self.rate, prepared)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
      x = x + bias.astype(self.dtype)
    return x


class BatchNorm(nn.Module):
  """Batch normalisation: variables and numbers of `flax.linen.BatchNorm`.

  Written as one product and one sum a value, `x * a + b`, its gradient needs
  nothing but x of the forward pass, where the other keeps `x - mean` too.

  Parameters `scale` and `bias` [C], statistics `mean` and `var` [C] in the
  collection 'batch_stats', all float32. Ioffe and Szegedy, "Batch
  Normalization" (2015), algorithm 1.

  Attributes:
    momentum: decay of the running statistics.
    epsilon: added to the variance.
    axis_name: mapped axis over whose devices the statistics are averaged.
    dtype: of the result.
  """

  momentum: float = 0.99
  epsilon: float = 1e-5
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
    """Normalises [..., C] by its own or by the running statistics."""
    shape = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones_init(), shape)
    bias = self.param('bias', nn.initializers.zeros_init(), shape)
    zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
    running_mean = self.variable('batch_stats', 'mean', zeros, None, shape)
    running_var = self.variable('batch_stats', 'var', ones, None, shape)
    if use_running_average:
      mean, var = running_mean.value, running_var.value
    else:
      mean, var = self._statistics(x)
      if not self.is_initializing():
        for running, new in ((running_mean, mean), (running_var, var)):
          running.value = (
            self.momentum * running.value + (1 - self.momentum) * new
          )
    factor = scale * lax.rsqrt(var + self.epsilon)
    return (x * factor + (bias - mean * factor)).astype(self.dtype)

  def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean, square = x.mean(axes), jnp.square(x).mean(axes)
    name = self.axis_name
    if name and not self.is_initializing() and lax.axis_size(name) > 1:
      mean, square = lax.pmean((mean, square), name)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


class ConvNormRelu(nn.Module):
  """Convolution, batch norm and ReLU: [B, H, W, Cin] -> [B, H, W, features].

  Without `activation` the ReLU is left out.
  """

  features: int
  kernel_size: int = 1
  rate: int = 1
  activation: bool = True
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Applies them in turn; `train` uses and updates the batch statistics."""
    x = Conv(
      self.features,
      self.kernel_size,
      rate=self.rate,
      dtype=self.dtype,
      name='conv',
    )(x)
    x = self.norm(name='norm')(x, use_running_average=not train)
    return nn.relu(x) if self.activation else x


POOL_PADDINGS = ('symmetric', 'same', 'zero')


def max_pool(x: jax.Array, padding: str = 'symmetric') -> jax.Array:
  """Maximum over 3x3 windows at stride 2: [B, H, W, C] -> half, rounded up.

  Args:
    x: [B, H, W, C].
    padding: 'symmetric' adds a border that never wins; 'same' is TensorFlow's,
      which at even sizes has one at the far end alone; 'zero' adds a border of
      zeros, as Keras does, which wins over negative values.
  """
  check_choice('stem_pool', padding, POOL_PADDINGS)
  if not on_cpu():
    return _max_pool_by_xla(x, padding)
  for axis in (1, 2):
    # How far the first window reaches out; 'same' pads even sizes at the end.
    before = 0 if padding == 'same' and x.shape[axis] % 2 == 0 else 1
    taps = [convolutions.under_tap(x, axis, i - before, 2) for i in range(3)]
    out = -(-x.shape[axis] // 2)
    ends = {end for _, (front, back) in taps for end in (front, out - back)}
    parts = []
    for start, stop in itertools.pairwise(sorted(ends)):
      window: list[Any] = []
      for tap, (front, back) in taps:
        if front <= start and stop <= out - back:
          window.append(
            lax.slice_in_dim(tap, start - front, stop - front, axis=axis)
          )
        elif padding == 'zero':
          window.append(jnp.zeros((), x.dtype))
      parts.append(functools.reduce(_larger, window))
    # Beside each other, since XLA makes copies to pad.
    x = jnp.concatenate(parts, axis)
  return x


class MaxPool(nn.Module):
  """`max_pool` as a module: [B, H, W, C] -> half, rounded up."""

  padding: str = 'symmetric'

  def __call__(self, x: jax.Array) -> jax.Array:
    """Pools; it has no variables."""
    return max_pool(x, self.padding)


def _max_pool_by_xla(x: jax.Array, padding: str) -> jax.Array:
  """The same; on CPUs its gradient takes ten times as long."""
  if padding == 'zero':
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  pads = {'symmetric': [(1, 1)] * 2, 'same': 'SAME', 'zero': 'VALID'}
  return nn.max_pool(x, (3, 3), (2, 2), pads[padding])


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
  """A maximum, NaN if either is.

  Its gradient goes to the first of equal values, as that of a maximum in XLA
  does.
  """
  return jnp.where((x >= y) | jnp.isnan(x), x, y)


UPSAMPLINGS = ('align_corners', 'asymmetric')


def resample(
  x: jax.Array,
  size: tuple[int, int],
  step: tuple[float, float],
  sizes: jax.Array | None = None,
) -> jax.Array:
  """Reads a map on another grid of the same origin, by linear interpolation.

  Args:
    x: [B, H, W, C] float.
    size: (height, width) of the result.
    step: (vertical, horizontal) distance of its pixels, in pixels of x.
    sizes: int [B, 2], height and width of each map without what pads it to
      H, W; None where nothing does.

  Returns:
    [B, height, width, C], whose (i, j) is x at (i * step[0], j * step[1]); past
    the last row or column of a map it is that row or column.
  """
  batch, height, width, channels = x.shape
  heights, widths = (None, None) if sizes is None else sizes.T
  if (size[1], step[1]) != (width, 1):
    x = jnp.einsum(
      '...ow,...hwc->...hoc' if sizes is not None else 'ow,bhwc->bhoc',
      _interpolation(width, size[1], step[1], widths).astype(x.dtype),
      x,
      precision=lax.Precision.HIGHEST,
    )
  if (size[0], step[0]) != (height, 1):
    # Last, and with the batch in front, so that the large result is not
    # transposed.
    matrix = _interpolation(height, size[0], step[0], heights).astype(x.dtype)
    x = lax.dot_general(
      jnp.broadcast_to(matrix, (batch, *matrix.shape[-2:])),
      x.reshape(batch, height, size[1] * channels),
      (((2,), (1,)), ((0,), (0,))),
      precision=lax.Precision.HIGHEST,
    )
  return x.reshape(batch, *size, channels)


def _interpolation(
  length: int, out: int, step: float, lengths: jax.Array | None
) -> np.ndarray | jax.Array:
  """Weights [out, length] of `resample`; [B, out, length] with lengths [B]."""
  position = np.arange(out) * step
  if lengths is None:
    position = np.minimum(position, length - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(length)))
  position = jnp.minimum(position, lengths[:, None] - 1)
  return jnp.maximum(0, 1 - jnp.abs(position[..., None] - np.arange(length)))
