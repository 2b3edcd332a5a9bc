"""Convolution and resampling, used by every part of the network.

All maps are [B, H, W, C]. Padding is explicit and symmetric, so that a strided
convolution equals the dense one subsampled, at odd and even sizes alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from deeplab_jax import ops


class Conv(nn.Module):
  """Square convolution, stride and rate in input pixels, see `ops.conv2d`.

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
    shape = (self.kernel_size,) * 2 + (x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    x = ops.conv2d(x.astype(self.dtype), kernel, self.stride, self.rate)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
      x = x + bias.astype(self.dtype)
    return x


class ConvNormRelu(nn.Module):
  """Convolution, batch norm and, with `activation`, ReLU."""

  features: int
  kernel_size: int = 1
  rate: int = 1
  activation: bool = True
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Applies them in turn; `train` uses and updates the batch statistics."""
    size, dtype = self.kernel_size, self.dtype
    conv = Conv(self.features, size, rate=self.rate, dtype=dtype, name='conv')
    x = self.norm(name='norm', use_running_average=not train)(conv(x))
    return nn.relu(x) if self.activation else x


def resample(
  x: jax.Array,
  size: Sequence[int],
  step: tuple[float, float],
  sizes: jax.Array | None = None,
  *,
  center: float = 0.0,
  shift: Any = (0.0, 0.0),
) -> jax.Array:
  """Reads a map on another grid, by linear interpolation.

  Pixel (i, j) of the result [B, *size, C] is x [B, H, W, C], float, at row
  (i + center) * step[0] - center + shift[0], columns alike. With a `center` of
  0.5 the corners of both grids coincide, with 0 the centers of their first
  pixels. Outside a map, its nearest row or column is repeated. `sizes`, int
  [B, 2], are the sizes of the maps before padding at the bottom and right.
  """
  batch, height, width, channels = x.shape
  heights, widths = (None, None) if sizes is None else sizes.T
  rows, columns = (
    (jnp.arange(n) + center) * by - center + start
    for n, by, start in zip(size, step, shift, strict=True)
  )
  if (size[1], step[1]) != (width, 1):
    x = jnp.einsum(
      '...ow,...hwc->...hoc' if sizes is not None else 'ow,bhwc->bhoc',
      _interpolation(width, columns, widths).astype(x.dtype),
      x,
      precision=lax.Precision.HIGHEST,
    )
  if (size[0], step[0]) != (height, 1):
    # Last, and with the batch first, so that no large result is transposed.
    matrix = _interpolation(height, rows, heights).astype(x.dtype)
    x = lax.dot_general(
      jnp.broadcast_to(matrix, (batch, *matrix.shape[-2:])),
      x.reshape(batch, height, size[1] * channels),
      (((2,), (1,)), ((0,), (0,))),
      precision=lax.Precision.HIGHEST,
    )
  return x.reshape(batch, *size, channels)


def _interpolation(
  length: int, positions: jax.Array, lengths: jax.Array | None
) -> jax.Array:
  """Weights [out, length] of `resample`; [B, out, length] with lengths [B]."""
  last = length - 1 if lengths is None else lengths[:, None] - 1
  positions = jnp.clip(positions, 0, last)
  places = jnp.arange(length)
  return jnp.maximum(0, 1 - jnp.abs(positions[..., None] - places))
