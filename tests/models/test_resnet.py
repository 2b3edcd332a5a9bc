"""Backbones: exact sizes, rates, and one set of weights at every stride."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deeplab_jax.models.resnet import (
  BACKBONES,
  BasicUnit,
  BottleneckUnit,
  PreActBasicUnit,
  PreActBottleneckUnit,
  ResNetV1,
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
# (25,549,352 and 44,541,480) without their 1000-class layer of 2,049,000; those
# of v1.5 are torchvision's (11,689,512, 25,557,032 and 44,549,160) without it.
@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('resnet50', 23_500_352),
    ('resnet101', 42_492_480),
    ('resnet18_v1', 11_689_512 - 513_000),
    ('resnet50_v1', 25_557_032 - 2_049_000),
    ('resnet101_v1', 44_549_160 - 2_049_000),
  ],
)
def test_parameter_count_equals_timm_and_torchvision(name, count):
  assert parameters(BACKBONES[name]()) == count


def counted_by_hand(units, basic, v1):
  """Parameters of a ResNet, unit by unit."""
  total, channels = 7 * 7 * 3 * 64, 64
  for block, count in enumerate(units):
    width = 64 * 2**block
    out = width if basic else 4 * width
    for _ in range(count):
      # V2 normalizes what comes in, and v1 what the last convolution gives.
      total += 2 * (out if v1 else channels)
      if basic:
        total += 9 * channels * width + 2 * width + 9 * width * width
      else:
        total += channels * width + 2 * width + 9 * width**2 + 2 * width
        total += width * out
      if channels != out:
        total += channels * out + 2 * out * v1
      channels = out
  return total + 2 * (64 if v1 else channels)


@pytest.mark.parametrize('name', BACKBONES)
def test_parameter_count_equals_the_sum_over_units(name):
  backbone = BACKBONES[name]()
  basic = backbone.unit in (PreActBasicUnit, BasicUnit)
  v1 = isinstance(backbone, ResNetV1)
  assert parameters(backbone) == counted_by_hand(backbone.units, basic, v1)


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
  ('network', 'unit', 'size'),
  [
    (ResNetV2, PreActBasicUnit, (65, 50)),
    (ResNetV2, PreActBottleneckUnit, (50, 65)),
    (ResNetV1, BasicUnit, (50, 65)),
    (ResNetV1, BottleneckUnit, (65, 50)),
  ],
)
@pytest.mark.parametrize(
  'settings', [{}, {'stride_unit': 'first', 'conv_bias': True}]
)
def test_features_at_stride_8_subsampled_equal_those_at_16_and_32(
  network, unit, size, settings, random_variables
):
  norm = functools.partial(nn.BatchNorm, dtype=jnp.float64)
  images = np.random.default_rng(3).normal(size=(1, *size, 3))
  with jax.enable_x64(True):
    outputs, variables = {}, None
    for stride in (8, 16, 32):
      model = network(
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
  for stride in (16, 32):
    np.testing.assert_array_equal(
      outputs[stride]['low_level'], outputs[8]['low_level']
    )
  for key in ('block4', 'postnorm')[: 1 + (network is ResNetV2)]:
    dense = np.asarray(outputs[8][key])
    assert dense.dtype == np.float64
    assert dense.std() > 0.1
    for stride, step in ((16, 2), (32, 4)):
      np.testing.assert_allclose(
        outputs[stride][key], dense[:, ::step, ::step], rtol=0, atol=1e-10
      )


@pytest.mark.parametrize(
  ('name', 'last'), [('resnet18', 'last'), ('resnet18_v1', 'first')]
)
def test_output_sizes_round_up_at_any_input_size(name, last, random_variables):
  model = BACKBONES[name](width=0.125, stride_unit=last)
  variables = random_variables(model)
  for height, width in ((33, 50), (16, 1), (70, 31)):
    shapes = jax.eval_shape(
      lambda x: model.apply(variables, x, train=False),
      jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32),
    )
    for key, stride, channels in (
      ('stem', 4, 8),
      ('low_level', 4, 8),
      ('block1', 8 if last == 'last' else 4, 8),
      ('block2', 16 if last == 'last' else 8, 16),
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
