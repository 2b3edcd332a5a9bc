"""Pre-activation residual networks with atrous convolution.

He et al., "Identity Mappings in Deep Residual Networks" (2016), figure 1(b);
output stride and multi-grid from Chen et al., "Rethinking Atrous Convolution
for Semantic Image Segmentation" (2017), sections 3.1 and 3.2.1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from deeplab_jax import ops
from deeplab_jax.models.layers import Conv
from deeplab_jax.runtime.errors import check_choice, check_map, require


class UnitGeometry(NamedTuple):
  """Stride of a residual unit, its rate at that stride, and its rate after."""

  stride: int
  rate: int
  rate_out: int


STRIDE_UNITS = ('last', 'first')


def unit_geometry(
  units: Sequence[int],
  output_stride: int,
  multi_grid: Sequence[int],
  stride_unit: str = 'last',
) -> tuple[tuple[UnitGeometry, ...], ...]:
  """Gives each unit of the four blocks its stride and its atrous rates.

  Three units have stride 2: the last units of blocks 1 to 3 (TF-slim, Keras and
  the DeepLab code), or the first units of blocks 2 to 4 (timm). Once the
  network has reached `output_stride`, a unit that would stride keeps stride 1,
  and the rate of all convolutions after it doubles instead (atrous
  convolution). So each unit sees the same input pixels at every output stride.

  Args:
    units: number of units in each block.
    output_stride: 8, 16 or 32, input pixels per feature pixel.
    multi_grid: multiplies the rate of each unit of block 4, one factor per
      unit; a block of two units (ResNet-18) takes the first two.
    stride_unit: which unit of a block may have stride 2, 'last' or 'first'.

  Raises:
    ValueError: for an impossible value.
  """
  check_choice('stride_unit', stride_unit, STRIDE_UNITS)
  if output_stride not in (8, 16, 32):
    raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
  grid = tuple(multi_grid)[:2] if units[3] == 2 else tuple(multi_grid)
  if len(grid) != units[3] or min(grid) < 1:
    raise ValueError(
      f'multi_grid needs one factor from 1 for each of the {units[3]} units of'
      f' block4, got {tuple(multi_grid)}'
    )
  current_stride, rate, blocks = 4, 1, []
  for block, count in enumerate(units):
    geometry = []
    for unit in range(count):
      stride, rate_out = 1, rate
      last, first = block < 3 and unit == count - 1, block > 0 and unit == 0
      strides = last if stride_unit == 'last' else first
      if strides and current_stride < output_stride:
        stride = 2
        current_stride *= 2
      elif strides:
        rate_out *= 2
      factor = grid[unit] if block == 3 else 1
      geometry.append(UnitGeometry(stride, rate * factor, rate_out * factor))
      rate = rate_out
    blocks.append(tuple(geometry))
  return tuple(blocks)


class PreActBasicUnit(nn.Module):
  """Two 3x3 convolutions, each after BN and ReLU (ResNet-18 and 34).

  x [B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), features].
  """

  features: int
  geometry: UnitGeometry = UnitGeometry(1, 1, 1)
  conv_bias: bool = False
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Adds the residual; `train` uses and updates the batch statistics."""
    stride, rate, rate_out = self.geometry
    conv = functools.partial(Conv, self.features, dtype=self.dtype)
    norm = functools.partial(self.norm, use_running_average=not train)
    bias = self.conv_bias

    y = nn.relu(norm(name='preact')(x))
    if x.shape[-1] == self.features:
      shortcut = ops.subsample(x, stride)
    else:
      shortcut = conv(stride=stride, use_bias=bias, name='shortcut')(y)
    y = conv(3, stride, rate, name='conv1')(y)
    y = nn.relu(norm(name='norm1')(y))
    y = conv(3, rate=rate_out, use_bias=bias, name='conv2')(y)
    return shortcut + y


class PreActBottleneckUnit(nn.Module):
  """1x1, 3x3 and 1x1 convolution, each after BN and ReLU (ResNet-50 and up).

  x [B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), 4 * features].
  """

  features: int
  geometry: UnitGeometry = UnitGeometry(1, 1, 1)
  conv_bias: bool = False
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Adds the residual; `train` uses and updates the batch statistics."""
    stride, rate, _ = self.geometry
    conv = functools.partial(Conv, dtype=self.dtype)
    norm = functools.partial(self.norm, use_running_average=not train)
    out, bias = 4 * self.features, self.conv_bias

    y = nn.relu(norm(name='preact')(x))
    if x.shape[-1] == out:
      shortcut = ops.subsample(x, stride)
    else:
      shortcut = conv(out, stride=stride, use_bias=bias, name='shortcut')(y)
    y = conv(self.features, name='conv1')(y)
    y = nn.relu(norm(name='norm1')(y))
    y = conv(self.features, 3, stride, rate, name='conv2')(y)
    y = nn.relu(norm(name='norm2')(y))
    y = conv(out, use_bias=bias, name='conv3')(y)
    return shortcut + y


class Block(nn.Module):
  """Residual units in a row, named unit1, unit2, ..."""

  unit: Callable[..., nn.Module]
  geometry: tuple[UnitGeometry, ...]
  rematerialization: str = 'none'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Applies the units to [B, H, W, C]."""
    run = ops.remat(lambda f, x: f(x, train=train), self.rematerialization)
    for i, geometry in enumerate(self.geometry, 1):
      x = run(self.unit(geometry=geometry, name=f'unit{i}'), x)
    return x


class ResNetV2(nn.Module):
  """Pre-activation ResNet whose maps shrink no further than `output_stride`.

  Attributes:
    units: number of units in each of the four blocks.
    unit: `PreActBasicUnit` or `PreActBottleneckUnit`.
    output_stride, multi_grid, stride_unit: see `unit_geometry`.
    width: multiplies the number of channels (1 gives 64 in the stem).
    conv_bias: whether the stem, the shortcut convolutions and the last
      convolution of every unit have biases, as in TF-slim and Keras.
    stem_pool: padding of the stem's 3x3 pooling, see `ops.max_pool`.
    rematerialization: what the backward pass recomputes to save memory: 'none',
      'elementwise' (normalized maps and ReLUs) or 'block' (each residual unit
      from its input), see `ops.remat`.
    norm: makes a batch norm layer from `name` and `use_running_average`.
    dtype: type to compute in; parameters are always float32.
  """

  units: tuple[int, int, int, int]
  unit: Callable[..., nn.Module]
  output_stride: int = 16
  multi_grid: tuple[int, ...] = (1, 2, 4)
  width: float = 1.0
  stride_unit: str = 'last'
  conv_bias: bool = False
  stem_pool: str = 'symmetric'
  rematerialization: str = 'none'
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    unit_geometry(
      self.units, self.output_stride, self.multi_grid, self.stride_unit
    )
    check_choice('stem_pool', self.stem_pool, ops.POOL_PADDINGS)
    check_choice(
      'rematerialization', self.rematerialization, ops.REMATERIALIZATIONS
    )
    rule = 'width must be above 1/128, which leaves at least one of 64 channels'
    require(self.width > 0 and round(64 * self.width) >= 1, rule, self.width)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps normalized images [B, H, W, C] to the features of every stage.

    Returns a dict: 'stem' [B, H/4, W/4, 64], 'block1' to 'block4' (the last is
    [B, H/os, W/os, 2048], or 512 channels with basic units), and 'postnorm',
    block 4 after the final BN and ReLU. Sizes round up; channels for width 1.
    """
    check_map('x', x)
    base = round(64 * self.width)
    bias, dtype = self.conv_bias, self.dtype
    x = Conv(base, 7, 2, use_bias=bias, dtype=dtype, name='stem')(x)
    x = ops.max_pool(x, self.stem_pool)
    outputs = {'stem': x}
    blocks = unit_geometry(
      self.units, self.output_stride, self.multi_grid, self.stride_unit
    )
    for i, geometry in enumerate(blocks, 1):
      own = {'conv_bias': bias, 'norm': self.norm, 'dtype': dtype}
      unit = functools.partial(self.unit, base * 2 ** (i - 1), **own)
      block = Block(unit, geometry, self.rematerialization, name=f'block{i}')
      x = outputs[f'block{i}'] = block(x, train=train)
    x = self.norm(name='postnorm', use_running_average=not train)(x)
    outputs['postnorm'] = nn.relu(x)
    return outputs


# Each value takes the settings of `ResNetV2` except `units` and `unit`. A new
# backbone is a function that takes them and returns a `deeplab.Backbone`.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
  f'resnet{depth}': functools.partial(ResNetV2, units, unit)
  for depth, units, unit in (
    (18, (2, 2, 2, 2), PreActBasicUnit),
    (34, (3, 4, 6, 3), PreActBasicUnit),
    (50, (3, 4, 6, 3), PreActBottleneckUnit),
    (101, (3, 4, 23, 3), PreActBottleneckUnit),
    (152, (3, 8, 36, 3), PreActBottleneckUnit),
    (200, (3, 24, 36, 3), PreActBottleneckUnit),
  )
}
