"""Backbones: exact sizes, rates, and one set of weights at every stride."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deeplab_jax.models.resnet import (
  BACKBONES,
  PreActBasicUnit,
  PreActBottleneckUnit,
  ResNetV2,
  unit_geometry,
)

pytestmark = pytest.mark.compiles


def parameters(model):
  init = functools.partial(model.init, train=False)
  images = jnp.zeros((1, 33, 33, 3))
  params = jax.eval_shape(init, jax.random.key(0), images)['params']
  return sum(x.size for x in jax.tree.leaves(params))


# The bottleneck counts are those of timm's resnetv2_50 and resnetv2_101
# (25,549,352 and 44,541,480) without their 1000-class layer of 2,049,000.
@pytest.mark.parametrize(
  ('name', 'count'), [('resnet50', 23_500_352), ('resnet101', 42_492_480)]
)
def test_parameter_count_equals_timm(name, count):
  assert parameters(BACKBONES[name]()) == count


def counted_by_hand(units, basic):
  """Parameters of a pre-activation ResNet, unit by unit."""
  total, channels = 7 * 7 * 3 * 64, 64
  for block, count in enumerate(units):
    width = 64 * 2**block
    out = width if basic else 4 * width
    for _ in range(count):
      total += 2 * channels
      if basic:
        total += 9 * channels * width + 2 * width + 9 * width * width
      else:
        total += channels * width + 2 * width + 9 * width**2 + 2 * width
        total += width * out
      total += channels * out if channels != out else 0
      channels = out
  return total + 2 * channels


@pytest.mark.parametrize('name', BACKBONES)
def test_parameter_count_equals_the_sum_over_units(name):
  backbone = BACKBONES[name]()
  expected = counted_by_hand(backbone.units, backbone.unit is PreActBasicUnit)
  assert parameters(backbone) == expected


def test_geometry_at_each_output_stride_equals_the_slim_tables():
  def table(output_stride):
    blocks = unit_geometry((3, 4, 6, 3), output_stride, (1, 2, 4))
    return [[(g.stride, g.rate, g.rate_out) for g in b] for b in blocks]

  one, two = (1, 1, 1), (2, 1, 1)
  grid = [(1, g, g) for g in (1, 2, 4)]
  assert table(32) == [
    [one] * 2 + [two],
    [one] * 3 + [two],
    [one] * 5 + [two],
    grid,
  ]
  assert table(16) == [
    [one] * 2 + [two],
    [one] * 3 + [two],
    [one] * 5 + [(1, 1, 2)],
    [(1, 2 * g, 2 * g) for g in (1, 2, 4)],
  ]
  assert table(8) == [
    [one] * 2 + [two],
    [one] * 3 + [(1, 1, 2)],
    [(1, 2, 2)] * 5 + [(1, 2, 4)],
    [(1, 4 * g, 4 * g) for g in (1, 2, 4)],
  ]


def test_geometry_with_striding_first_units_equals_the_timm_tables():
  def table(output_stride):
    blocks = unit_geometry((3, 4, 6, 3), output_stride, (1, 2, 4), 'first')
    return [[(g.stride, g.rate, g.rate_out) for g in b] for b in blocks]

  one, two = (1, 1, 1), (2, 1, 1)
  assert table(32) == [
    [one] * 3,
    [two] + [one] * 3,
    [two] + [one] * 5,
    [two, (1, 2, 2), (1, 4, 4)],
  ]
  assert table(16) == [
    [one] * 3,
    [two] + [one] * 3,
    [two] + [one] * 5,
    [(1, 1, 2), (1, 4, 4), (1, 8, 8)],
  ]
  assert table(8) == [
    [one] * 3,
    [two] + [one] * 3,
    [(1, 1, 2)] + [(1, 2, 2)] * 5,
    [(1, 2, 4), (1, 8, 8), (1, 16, 16)],
  ]


@pytest.mark.parametrize(
  ('unit', 'size'),
  [(PreActBasicUnit, (65, 50)), (PreActBottleneckUnit, (50, 65))],
)
@pytest.mark.parametrize(
  'settings', [{}, {'stride_unit': 'first', 'conv_bias': True}]
)
def test_features_at_stride_8_subsampled_equal_those_at_16_and_32(
  unit, size, settings, random_variables
):
  norm = functools.partial(nn.BatchNorm, dtype=jnp.float64)
  images = np.random.default_rng(3).normal(size=(1, *size, 3))
  with jax.enable_x64(True):
    outputs, variables = {}, None
    for stride in (8, 16, 32):
      model = ResNetV2(
        (2, 2, 2, 3),
        unit,
        output_stride=stride,
        width=0.125,
        norm=norm,
        dtype=jnp.float64,
        **settings,
      )
      variables = variables or random_variables(model)
      outputs[stride] = jax.jit(functools.partial(model.apply, train=False))(
        variables, images
      )
  for key in ('block4', 'postnorm'):
    dense = np.asarray(outputs[8][key])
    assert dense.dtype == np.float64
    assert dense.std() > 0.1
    for stride, step in ((16, 2), (32, 4)):
      np.testing.assert_allclose(
        outputs[stride][key], dense[:, ::step, ::step], rtol=0, atol=1e-10
      )


def test_output_sizes_round_up_at_any_input_size(random_variables):
  model = BACKBONES['resnet18'](width=0.125)
  variables = random_variables(model)
  for height, width in ((33, 50), (16, 1), (70, 31)):
    shapes = jax.eval_shape(
      lambda x: model.apply(variables, x, train=False),
      jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32),
    )
    for key, stride, channels in (
      ('stem', 4, 8),
      ('block1', 8, 8),
      ('block2', 16, 16),
      ('block4', 16, 64),
    ):
      expected = (2, -(-height // stride), -(-width // stride), channels)
      assert shapes[key].shape == expected, key


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'output_stride': 12}, 'output_stride must be 8, 16 or 32, got 12'),
    ({'multi_grid': (1, 2)}, 'multi_grid needs one factor from 1 for each of'),
    (
      {'stride_unit': 'middle'},
      "stride_unit must be one of last, first, got 'middle'",
    ),
    ({'stem_pool': 'valid'}, 'stem_pool must be one of symmetric, same, zero'),
    ({'width': 0.001}, 'width must be above 1.128, which .*, got 0.001'),
  ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    BACKBONES['resnet50'](**settings)
