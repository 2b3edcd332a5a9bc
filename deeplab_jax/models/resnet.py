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

from deeplab_jax.models.layers import (
  BatchNorm,
  Conv,
  MaxPool,
  check_choice,
  check_map,
  on_cpu,
  rematerialize,
)


class UnitGeometry(NamedTuple):
  """Where a residual unit samples: its stride, and rates in map pixels.

  `rate` is the rate on entering the unit, `rate_out` the one for convolutions
  behind its strided one. They differ where a stride was traded for rate.
  """

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
  """Spreads the output stride over the units of the four blocks.

  Three units stride by 2: the last ones of blocks 1 to 3, as in TF-slim, Keras
  and the DeepLab code, or the first ones of blocks 2 to 4, as in timm. Once
  `output_stride` is reached such a unit keeps stride 1 and every later
  convolution doubles its rate instead (atrous convolution), so each unit sees
  the same input pixels at every output stride.

  Args:
    units: number of units in each of the four blocks.
    output_stride: 8, 16 or 32, input pixels per feature pixel.
    multi_grid: factor on the rate of each unit of block 4.
    stride_unit: 'last' or 'first', the unit of a block that strides.

  Returns:
    For each block, a `UnitGeometry` for each unit.

  Raises:
    ValueError: at another output stride or stride unit, or with a multi-grid of
      another length than block 4.
  """
  check_choice('stride_unit', stride_unit, STRIDE_UNITS)
  if output_stride not in (8, 16, 32):
    raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
  if len(multi_grid) != units[3] or min(multi_grid) < 1:
    raise ValueError(
      f'multi_grid needs one factor from 1 for each of the {units[3]} units of'
      f' block4, got {tuple(multi_grid)}'
    )
  current_stride, rate, blocks = 4, 1, []
  for block, count in enumerate(units):
    geometry = []
    for unit in range(count):
      stride, rate_out = 1, rate
      if stride_unit == 'last':
        strides = block < 3 and unit == count - 1
      else:
        strides = block > 0 and unit == 0
      if strides:
        if current_stride < output_stride:
          stride = 2
          current_stride *= 2
        else:
          rate_out *= 2
      grid = multi_grid[unit] if block == 3 else 1
      geometry.append(UnitGeometry(stride, rate * grid, rate_out * grid))
      rate = rate_out
    blocks.append(tuple(geometry))
  return tuple(blocks)


class PreActBasicUnit(nn.Module):
  """Two 3x3 convolutions, each behind BN and ReLU (ResNet-18 and 34).

  The first convolution carries the stride. `x [B, H, W, Cin] ->
  [B, ceil(H / stride), ceil(W / stride), features]`. With `rematerialization`
  'elementwise' the maps between convolutions are computed again, see
  `ResNetV2`.
  """

  features: int
  geometry: UnitGeometry = UnitGeometry(1, 1, 1)
  conv_bias: bool = False
  rematerialization: str = 'none'
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  expansion = 1

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Adds the residual; `train` uses and updates the batch statistics."""
    stride, rate, rate_out = self.geometry
    conv = functools.partial(Conv, self.features, 3, dtype=self.dtype)
    conv1 = functools.partial(conv, stride, rate, name='conv1')
    conv2 = functools.partial(
      conv, rate=rate_out, use_bias=self.conv_bias, name='conv2'
    )
    shortcut, y = _enter(self, conv1, self.features, x, train)
    return shortcut + _norm_relu_conv(self, 'norm1', conv2, y, train)


class PreActBottleneckUnit(nn.Module):
  """1x1, 3x3 and 1x1 convolution, each behind BN and ReLU (ResNet-50 and up).

  The 3x3 convolution carries stride and rate. `x [B, H, W, Cin] ->
  [B, ceil(H / stride), ceil(W / stride), 4 * features]`. With
  `rematerialization` 'elementwise' the maps between convolutions are computed
  again, see `ResNetV2`.
  """

  features: int
  geometry: UnitGeometry = UnitGeometry(1, 1, 1)
  conv_bias: bool = False
  rematerialization: str = 'none'
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Adds the residual; `train` uses and updates the batch statistics."""
    stride, rate, _ = self.geometry
    conv = functools.partial(Conv, dtype=self.dtype)
    out = self.expansion * self.features
    conv1 = functools.partial(conv, self.features, name='conv1')
    conv2 = functools.partial(
      conv, self.features, 3, stride, rate, name='conv2'
    )
    conv3 = functools.partial(conv, out, use_bias=self.conv_bias, name='conv3')
    shortcut, y = _enter(self, conv1, out, x, train)
    y = _norm_relu_conv(self, 'norm1', conv2, y, train)
    return shortcut + _norm_relu_conv(self, 'norm2', conv3, y, train)


def _enter(
  unit: nn.Module,
  conv: Callable[[], nn.Module],
  features: int,
  x: jax.Array,
  train: bool,
) -> tuple[jax.Array, jax.Array]:
  """The path that the residual is added to, and the first convolution.

  Both read the input behind BN and ReLU, unless the first can be the input
  itself.
  """
  stride = unit.geometry.stride

  def run(unit: nn.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    preact = nn.relu(unit.norm(name='preact')(x, use_running_average=not train))
    if x.shape[-1] == features:
      return x[:, ::stride, ::stride], conv()(preact)
    shortcut = Conv(
      features,
      stride=stride,
      use_bias=unit.conv_bias,
      dtype=unit.dtype,
      name='shortcut',
    )
    return shortcut(preact), conv()(preact)

  return _rematerialized(unit, run)(unit, x)


def _norm_relu_conv(
  unit: nn.Module,
  norm: str,
  conv: Callable[[], nn.Module],
  x: jax.Array,
  train: bool,
) -> jax.Array:
  """BN of that name, ReLU and convolution, a group for rematerialisation."""

  def run(unit: nn.Module, x: jax.Array) -> jax.Array:
    x = unit.norm(name=norm)(x, use_running_average=not train)
    return conv()(nn.relu(x))

  return _rematerialized(unit, run)(unit, x)


def _rematerialized(
  unit: nn.Module, run: Callable[..., Any]
) -> Callable[..., Any]:
  """`run`, or one that computes its maps again if the unit is to."""
  return rematerialize(run) if unit.rematerialization == 'elementwise' else run


class Block(nn.Module):
  """Units of equal width in a row, named unit1, unit2, ..."""

  unit: Callable[..., nn.Module]
  features: int
  geometry: tuple[UnitGeometry, ...]
  conv_bias: bool = False
  rematerialization: str = 'none'
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Applies the units to [B, H, W, C]."""

    def apply(unit: nn.Module, x: jax.Array) -> jax.Array:
      return unit(x, train=train)

    if self.rematerialization == 'block':
      apply = rematerialize(apply)
    for i, geometry in enumerate(self.geometry, 1):
      unit = self.unit(
        self.features,
        geometry,
        conv_bias=self.conv_bias,
        rematerialization=self.rematerialization,
        norm=self.norm,
        dtype=self.dtype,
        name=f'unit{i}',
      )
      x = apply(unit, x)
    return x


class ResNetV2(nn.Module):
  """Pre-activation ResNet that keeps its maps at `output_stride`.

  Attributes:
    units: number of units in each of the four blocks.
    unit: `PreActBasicUnit` or `PreActBottleneckUnit`.
    output_stride: 8, 16 or 32, input pixels per feature pixel.
    multi_grid: factor on the rate of each unit of block 4.
    width: factor on the number of channels (1: 64 in the stem).
    stride_unit: 'last' or 'first', see `unit_geometry`.
    conv_bias: biases on the stem, on every shortcut convolution and on the last
      convolution of every unit, as in TF-slim and Keras.
    stem_pool: padding of the stem's 3x3 pooling, see `max_pool`.
    rematerialization: what the backward pass computes again instead of keeping
      it: 'none', 'elementwise' (normalised maps and ReLUs) or 'block' (all but
      the input of each residual unit); '' for 'elementwise' on a CPU, whose
      memory is slow, and 'none' elsewhere. On a CPU it takes effect with the
      options of `deeplab_jax.host`.
    norm: batch normalisation; called with `name`, then with the map and
      `use_running_average`.
    dtype: of the computation; parameters stay float32.
  """

  units: tuple[int, int, int, int]
  unit: Callable[..., nn.Module]
  output_stride: int = 16
  multi_grid: tuple[int, ...] = (1, 2, 4)
  width: float = 1.0
  stride_unit: str = 'last'
  conv_bias: bool = False
  stem_pool: str = 'symmetric'
  rematerialization: str = ''
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Computes the features of every stage.

    Args:
      x: [B, H, W, 3], normalised, any height and width.
      train: use and update the batch statistics.

    Returns:
      'stem' [B, H/4, W/4, 64], 'block1' to 'block4' (up to [B, H/os, W/os,
      2048] for bottleneck units, 512 for basic ones), and 'postnorm', block 4
      behind the final BN and ReLU. Sizes round up.

    Raises:
      ValueError: at an impossible value of an attribute, and for x of another
        number of axes or without a pixel.
    """
    check_map('x', x)
    base = round(64 * self.width)
    if base < 1:
      raise ValueError(f'width must leave at least 1 channel, got {self.width}')
    rematerialization = self.rematerialization
    if not rematerialization:
      rematerialization = 'elementwise' if on_cpu() else 'none'
    blocks = unit_geometry(
      self.units, self.output_stride, self.multi_grid, self.stride_unit
    )
    x = Conv(
      base, 7, 2, use_bias=self.conv_bias, dtype=self.dtype, name='stem'
    )(x)
    x = MaxPool(self.stem_pool, name='pool')(x)
    outputs = {'stem': x}
    for i, geometry in enumerate(blocks):
      name = f'block{i + 1}'
      x = Block(
        self.unit,
        base * 2**i,
        geometry,
        conv_bias=self.conv_bias,
        rematerialization=rematerialization,
        norm=self.norm,
        dtype=self.dtype,
        name=name,
      )(x, train=train)
      outputs[name] = x
    x = self.norm(name='postnorm')(x, use_running_average=not train)
    outputs['postnorm'] = nn.relu(x)
    return outputs


BACKBONES = {
  'resnet18': ((2, 2, 2, 2), PreActBasicUnit),
  'resnet34': ((3, 4, 6, 3), PreActBasicUnit),
  'resnet50': ((3, 4, 6, 3), PreActBottleneckUnit),
  'resnet101': ((3, 4, 23, 3), PreActBottleneckUnit),
  'resnet152': ((3, 8, 36, 3), PreActBottleneckUnit),
  'resnet200': ((3, 24, 36, 3), PreActBottleneckUnit),
}
