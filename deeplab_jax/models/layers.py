"""Convolution and resizing as every part of the network uses them.

All maps are [B, H, W, C]. Padding is explicit and symmetric, so that a strided
convolution equals the dense one subsampled, at odd and even sizes alike.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

# From this rate on, XLA's convolution on CPU takes about twice the time of one
# matrix product a tap, forward and backward, and spends much of it on padding.
_TAPS_FROM_RATE = 4


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises `ValueError` unless the setting `name` has one of its values."""
  if value not in choices:
    raise ValueError(
      f'{name} must be one of {", ".join(choices)}, got {value!r}'
    )


def conv2d(
  x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1
) -> jax.Array:
  """Convolves with symmetric zero padding of `rate * (k - 1) / 2` pixels.

  Args:
    x: [B, H, W, Cin].
    kernel: [k, k, Cin, Cout], k odd.
    stride: output pixel spacing in input pixels.
    rate: spacing of the kernel's taps in input pixels (atrous convolution).

  Returns:
    [B, ceil(H / stride), ceil(W / stride), Cout].
  """
  if kernel.shape[:2] == (1, 1):
    return _matmul(x[:, ::stride, ::stride], kernel[0, 0])
  if stride == 1 and rate >= _TAPS_FROM_RATE and _on_cpu():
    return _conv2d_by_taps(x, kernel, rate)
  pad = rate * (kernel.shape[0] - 1) // 2
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    rhs_dilation=(rate, rate),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def _matmul(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
  dimensions = (((x.ndim - 1,), (0,)), ((), ()))
  return lax.dot_general(x, matrix, dimensions, preferred_element_type=dtype)


def _conv2d_by_taps(x: jax.Array, kernel: jax.Array, rate: int) -> jax.Array:
  """One matrix product a tap, over the pixels where the tap is on the map."""
  _, height, width, _ = x.shape
  total = None
  for i in range(kernel.shape[0]):
    dy = rate * (i - kernel.shape[0] // 2)
    for j in range(kernel.shape[1]):
      dx = rate * (j - kernel.shape[1] // 2)
      if abs(dy) >= height or abs(dx) >= width:
        continue
      window = x[
        :,
        max(dy, 0) : height + min(dy, 0),
        max(dx, 0) : width + min(dx, 0),
      ]
      placed = jnp.pad(
        _matmul(window, kernel[i, j], jnp.promote_types(x.dtype, jnp.float32)),
        (
          (0, 0),
          (max(-dy, 0), max(dy, 0)),
          (max(-dx, 0), max(dx, 0)),
          (0, 0),
        ),
      )
      total = placed if total is None else total + placed
  return total.astype(x.dtype)


class Conv(nn.Module):
  """Square convolution, stride and rate in input pixels, see `conv2d`.

  Parameters, always float32: `kernel` [k, k, Cin, features] and, with
  `use_bias`, `bias` [features].
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
    x = conv2d(
      x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.rate
    )
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
      x = x + bias.astype(self.dtype)
    return x


class ConvNormRelu(nn.Module):
  """Convolution, batch norm and ReLU: [B, H, W, Cin] -> [B, H, W, features].

  Without `activation` the ReLU is left out.
  """

  features: int
  kernel_size: int = 1
  rate: int = 1
  activation: bool = True
  norm: Callable[..., nn.Module] = nn.BatchNorm
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
  if padding == 'same':
    return nn.max_pool(x, (3, 3), (2, 2), 'SAME')
  border = ((1, 1), (1, 1))
  if padding == 'zero':
    x, border = jnp.pad(x, ((0, 0), *border, (0, 0))), 'VALID'
  return nn.max_pool(x, (3, 3), (2, 2), border)


UPSAMPLINGS = ('align_corners', 'asymmetric')


def resize_bilinear(
  x: jax.Array, size: tuple[int, int], upsampling: str = 'align_corners'
) -> jax.Array:
  """Resizes by linear interpolation along both axes.

  Args:
    x: [B, H, W, C] float.
    size: (height, width) of the result.
    upsampling: with 'align_corners' the outermost pixel centres coincide: the
      source coordinate of output i is `i * (in - 1) / (out - 1)`, the
      convention of the DeepLab code, which makes 513 = 16 * 32 + 1 exact. With
      'asymmetric' it is `i * in / out`, clamped, TensorFlow 1's default.

  Returns:
    [B, height, width, C].
  """
  for axis, out in zip((1, 2), size, strict=True):
    if out != x.shape[axis]:
      matrix = jnp.asarray(
        _interpolation_matrix(x.shape[axis], out, upsampling), x.dtype
      )
      x = jnp.moveaxis(
        jnp.tensordot(matrix, x, (1, axis), precision=lax.Precision.HIGHEST),
        0,
        axis,
      )
  return x


def aligned_size(
  size: int, output_stride: int, upsampling: str, scale: float = 1.0
) -> int:
  """Smallest size from `scale * size` on whose upsampling is exact.

  There every feature pixel comes back to the image pixel that it was computed
  at: multiples of the output stride, and one more with aligned corners. At
  other sizes the logits are stretched, by up to a stride at the far edge.
  `scale` changes the distance of the outermost pixels with aligned corners,
  as the DeepLab code does: 1.5 * 513 is 769 there.
  """
  extra = 1 if upsampling == 'align_corners' else 0
  pixels = max(round((size - extra) * scale), 1 - extra)
  return -(-pixels // output_stride) * output_stride + extra


def _interpolation_matrix(size: int, out: int, upsampling: str) -> np.ndarray:
  """Weights [out, size] of linear interpolation, see `resize_bilinear`."""
  if upsampling == 'asymmetric':
    position = np.minimum(np.arange(out) * (size / out), size - 1)
  else:
    position = np.linspace(0, size - 1, out) if out > 1 else np.zeros(1)
  low = np.minimum(position.astype(int), max(size - 2, 0))
  fraction = position - low
  matrix = np.zeros((out, size))
  matrix[np.arange(out), low] = 1 - fraction
  matrix[np.arange(out), np.minimum(low + 1, size - 1)] += fraction
  return matrix
