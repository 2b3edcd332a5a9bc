"""Residual networks with atrous convolution, version 2 and version 1.5.

V2 is He et al., "Identity Mappings in Deep Residual Networks" (2016), figure
1(b). V1.5 is He et al., "Deep Residual Learning for Image Recognition" (2015),
with the stride in a unit's 3x3 convolution, as in torchvision. Output stride
and multi-grid are from Chen et al., "Rethinking Atrous Convolution for Semantic
Image Segmentation" (2017), sections 3.1 and 3.2.1.
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
  the DeepLab code), or the first units of blocks 2 to 4 (PyTorch's). Once the
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


class _Unit(nn.Module):
  """What all residual units share; see `ResNetV2`."""

  features: int
  geometry: UnitGeometry = UnitGeometry(1, 1, 1)
  conv_bias: bool = False
  norm: Callable[..., nn.Module] = nn.BatchNorm
  dtype: Any = jnp.float32


class PreActBasicUnit(_Unit):
  """Two 3x3 convolutions, each after BN and ReLU (ResNet-18 and 34).

  x [B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), features].
  """

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


class PreActBottleneckUnit(_Unit):
  """1x1, 3x3 and 1x1 convolution, each after BN and ReLU (ResNet-50 and up).

  x [B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), 4 * features].
  """

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


class BasicUnit(_Unit):
  """Two 3x3 convolutions, BN after each, ReLU after the sum (ResNet-18, 34).

  x [B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), features].
  """

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Adds the residual; `train` uses and updates the batch statistics."""
    stride, rate, rate_out = self.geometry
    bias, dtype = self.conv_bias, self.dtype
    conv = functools.partial(Conv, self.features, use_bias=bias, dtype=dtype)
    norm = functools.partial(self.norm, use_running_average=not train)

    y = conv(3, stride, rate, name='conv1')(x)
    y = nn.relu(norm(name='norm1')(y))
    y = conv(3, rate=rate_out, name='conv2')(y)
    y = norm(name='norm2')(y)
    if x.shape[-1] == self.features:
      shortcut = ops.subsample(x, stride)
    else:
      shortcut = conv(stride=stride, name='shortcut')(x)
      shortcut = norm(name='shortcut_norm')(shortcut)
    return nn.relu(shortcut + y)


class BottleneckUnit(_Unit):
  """1x1, 3x3 and 1x1 convolution, BN after each, ReLU after the sum.

  x [B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), 4 * features].
  """

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Adds the residual; `train` uses and updates the batch statistics."""
    stride, rate, _ = self.geometry
    conv = functools.partial(Conv, use_bias=self.conv_bias, dtype=self.dtype)
    norm = functools.partial(self.norm, use_running_average=not train)
    out = 4 * self.features

    y = nn.relu(norm(name='norm1')(conv(self.features, name='conv1')(x)))
    y = conv(self.features, 3, stride, rate, name='conv2')(y)
    y = nn.relu(norm(name='norm2')(y))
    y = norm(name='norm3')(conv(out, name='conv3')(y))
    if x.shape[-1] == out:
      shortcut = ops.subsample(x, stride)
    else:
      shortcut = conv(out, stride=stride, name='shortcut')(x)
      shortcut = norm(name='shortcut_norm')(shortcut)
    return nn.relu(shortcut + y)


class Block(nn.Module):
  """Residual units in a row, named unit1, unit2, ..."""

  unit: Callable[..., nn.Module]
  geometry: tuple[UnitGeometry, ...]
  rematerialization: str = 'none'

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Applies the units to [B, H, W, C].

    Returns the result, and the finest map of the block: that before its last
    unit, if this unit strides.
    """
    run = ops.remat(lambda f, x: f(x, train=train), self.rematerialization)
    before = x
    for i, geometry in enumerate(self.geometry, 1):
      before, x = x, run(self.unit(geometry=geometry, name=f'unit{i}'), x)
    return x, before if self.geometry[-1].stride > 1 else x


class _ResNet(nn.Module):
  """What both versions share; see `ResNetV2`."""

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
    remat = 'rematerialization', self.rematerialization
    check_choice(*remat, ops.REMATERIALIZATIONS)
    rule = 'width must be above 1/128, which leaves at least one of 64 channels'
    require(self.width > 0 and round(64 * self.width) >= 1, rule, self.width)
    super().__post_init__()

  def _stem(self, x: jax.Array) -> jax.Array:
    check_map('x', x)
    base, bias, dtype = round(64 * self.width), self.conv_bias, self.dtype
    return Conv(base, 7, 2, use_bias=bias, dtype=dtype, name='stem')(x)

  def _blocks(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    own = {'conv_bias': self.conv_bias, 'norm': self.norm, 'dtype': self.dtype}
    outputs, base = {'stem': x}, round(64 * self.width)
    blocks = unit_geometry(
      self.units, self.output_stride, self.multi_grid, self.stride_unit
    )
    for i, geometry in enumerate(blocks, 1):
      unit = functools.partial(self.unit, base * 2 ** (i - 1), **own)
      block = Block(unit, geometry, self.rematerialization, name=f'block{i}')
      x, fine = block(x, train=train)
      outputs[f'block{i}'] = x
      outputs.setdefault('low_level', fine)
    return outputs


class ResNetV2(_ResNet):
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

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Maps normalized images [B, H, W, C] to the features of every stage.

    Returns a dict: 'stem' [B, H/4, W/4, 64], 'block1' to 'block4' (the last is
    [B, H/os, W/os, 2048], or 512 channels with basic units), 'low_level', the
    last map of block 1 of H/4 rows (256 or 64 channels), and 'postnorm', block
    4 after the final BN and ReLU. Sizes round up; channels for width 1.
    """
    x = ops.max_pool(self._stem(x), self.stem_pool)
    outputs = self._blocks(x, train=train)
    norm = self.norm(name='postnorm', use_running_average=not train)
    return outputs | {'postnorm': nn.relu(norm(outputs['block4']))}


class ResNetV1(_ResNet):
  """ResNet v1.5; `unit` is `BasicUnit` or `BottleneckUnit`, see `ResNetV2`."""

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Gives the maps of `ResNetV2`; 'postnorm' is 'block4', after its ReLU."""
    norm = self.norm(name='stem_norm', use_running_average=not train)
    x = ops.max_pool(nn.relu(norm(self._stem(x))), self.stem_pool)
    outputs = self._blocks(x, train=train)
    return outputs | {'postnorm': outputs['block4']}


# Each value takes the settings of `ResNetV2` except `units` and `unit`. A new
# backbone is a function that takes them and returns a `deeplab.Backbone`.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
  f'resnet{depth}{version}': functools.partial(
    network, units, units_of[depth > 34]
  )
  for version, network, units_of in (
    ('', ResNetV2, (PreActBasicUnit, PreActBottleneckUnit)),
    ('_v1', ResNetV1, (BasicUnit, BottleneckUnit)),
  )
  for depth, units in (
    (18, (2, 2, 2, 2)),
    (34, (3, 4, 6, 3)),
    (50, (3, 4, 6, 3)),
    (101, (3, 4, 23, 3)),
    (152, (3, 8, 36, 3)),
    (200, (3, 24, 36, 3)),
  )
}
