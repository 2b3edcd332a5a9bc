"""The outputs of the reference networks, from their own code, to 1e-4.

Weights follow a formula of the variable's name, see `golden/README.md`; they
pass through the project's own name mappings.
"""

import functools
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from deeplab_jax import deeplab_v3
from deeplab_jax.weights.mapping import merge_variables
from deeplab_jax.weights.tf_slim import map_tf_slim
from deeplab_jax.weights.timm import map_timm

GOLDEN = Path(__file__).parents[2] / 'shared' / 'golden'
SIZES = ((97, 129), (96, 128))

pytestmark = pytest.mark.skipif(
  not GOLDEN.is_dir(), reason=f'the reference outputs are not in {GOLDEN}'
)


def weight(name, shape, kind):
  """The formula of the reference outputs, copied from their README."""
  r = np.random.default_rng(zlib.crc32(name.encode()))
  if kind == 'slim':
    scale = name.endswith(('gamma', 'moving_variance'))
    shift = name.endswith(('beta', 'moving_mean', 'biases'))
    fan_in = np.prod(shape[:-1])  # HWIO
  else:
    norm = 'norm' in name
    scale = name.endswith('running_var') or (norm and name.endswith('weight'))
    shift = name.endswith(('bias', 'running_mean'))
    fan_in = np.prod(shape[1:])  # OIHW
  if scale:
    a = r.uniform(0.5, 1.5, shape)
  elif shift:
    a = r.normal(0, 0.1, shape)
  else:
    a = r.normal(0, 1, shape) * np.sqrt(1.0 / fan_in)
  return a.astype(np.float32)


UNITS, WIDTHS = (3, 4, 6, 3), (64, 128, 256, 512)


def slim_shapes():
  """Names and shapes of the seed's variables, written from the README."""

  def conv(name, *shape, biases=False, norm=False):
    yield f'{name}/weights', shape
    if biases:
      yield f'{name}/biases', shape[-1:]
    if norm:
      yield from bn(f'{name}/BatchNorm', shape[-1])

  def bn(name, width):
    for leaf in ('beta', 'gamma', 'moving_mean', 'moving_variance'):
      yield f'{name}/{leaf}', (width,)

  root = 'resnet_v2_50'
  yield from conv(f'{root}/conv1', 7, 7, 3, 64, biases=True)
  last = 64
  for b, (units, width) in enumerate(zip(UNITS, WIDTHS, strict=True), 1):
    for u in range(1, units + 1):
      unit = f'{root}/block{b}/unit_{u}/bottleneck_v2'
      yield from bn(f'{unit}/preact', last)
      if u == 1:
        yield from conv(f'{unit}/shortcut', 1, 1, last, 4 * width, biases=True)
      yield from conv(f'{unit}/conv1', 1, 1, last, width, norm=True)
      yield from conv(f'{unit}/conv2', 3, 3, width, width, norm=True)
      yield from conv(f'{unit}/conv3', 1, 1, width, 4 * width, biases=True)
      last = 4 * width
  yield from bn(f'{root}/postnorm', last)
  yield from conv(f'{root}/logits', 1, 1, last, 1000, biases=True)
  aspp = 'DeepLab_v3/ASPP_layer'
  for name in ('image_level_conv_1x1', 'conv_1x1_0'):
    yield from conv(f'{aspp}/{name}', 1, 1, last, 256, norm=True)
  for i in (1, 2, 3):
    yield from conv(f'{aspp}/conv_3x3_{i}', 3, 3, last, 256, norm=True)
  yield from conv(f'{aspp}/conv_1x1_output', 1, 1, 5 * 256, 256, norm=True)
  yield from conv('DeepLab_v3/logits', 1, 1, 256, 21, biases=True)


def timm_shapes():
  """Names and shapes of timm's variables, written from the README."""

  def bn(name, width):
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      yield f'{name}.{leaf}', (width,)

  yield 'stem.conv.weight', (64, 3, 7, 7)
  last = 64
  for s, (units, width) in enumerate(zip(UNITS, WIDTHS, strict=True)):
    for b in range(units):
      block = f'stages.{s}.blocks.{b}'
      for i, channels in enumerate((last, width, width), 1):
        yield from bn(f'{block}.norm{i}', channels)
      yield f'{block}.conv1.weight', (width, last, 1, 1)
      yield f'{block}.conv2.weight', (width, width, 3, 3)
      yield f'{block}.conv3.weight', (4 * width, width, 1, 1)
      if b == 0:
        yield f'{block}.downsample.conv.weight', (4 * width, last, 1, 1)
      last = 4 * width
  yield from bn('norm', last)
  yield 'head.fc.weight', (1000, last, 1, 1)
  yield 'head.fc.bias', (1000,)


def variables_of(model, shapes, kind, mapper, initial):
  arrays = {name: weight(name, shape, kind) for name, shape in shapes}
  names = mapper(arrays)
  empty = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False)
  )
  merged, report = merge_variables(
    empty, names.apply(arrays), initial=initial, names=names
  )
  return merged, report


@pytest.fixture(scope='module')
def seed_variables():
  model = deeplab_v3('resnet50', preset='seed')
  variables, report = variables_of(
    model, slim_shapes(), 'slim', map_tf_slim, {}
  )
  assert not report.initial
  assert set(report.unused.values()) == {'ImageNet classifier'}
  return variables


@pytest.fixture(scope='module')
def timm_variables():
  model = deeplab_v3('resnet50', preset='timm')
  initial = {'*/aspp/*': 'backbone', '*/logits/*': 'backbone'}
  merged, _ = variables_of(model, timm_shapes(), 'timm', map_timm, initial)
  return {key: merged[key]['backbone'] for key in merged}


def assert_equal_to_golden(ours, expected, what):
  assert ours.shape == expected.shape
  difference = np.abs(ours - expected).max() / expected.std()
  print(f'{what}: {difference:.2e} of the standard deviation')
  assert difference < 1e-4, what


def image_of(size):
  return (
    np.random.default_rng(7).integers(0, 256, (1, *size, 3)).astype(np.float32)
  )


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('stride', [16, 8])
def test_seed_network_gives_the_numbers_of_its_own_code(
  stride, size, seed_variables
):
  golden = np.load(GOLDEN / 'seed_resnet_v2_50.npz')
  model = deeplab_v3('resnet50', preset='seed', output_stride=stride)
  apply = functools.partial(
    model.apply,
    train=False,
    capture_intermediates=lambda module, _: (
      module.name in ('backbone', 'logits')
    ),
  )
  upsampled, captured = jax.jit(apply)(seed_variables, image_of(size))
  inner = captured['intermediates']
  (features,) = inner['backbone']['__call__']
  (logits,) = inner['logits']['__call__']
  ours = {
    'block4': features['block4'][..., ::16],
    'postnorm': features['postnorm'][..., ::16],
    'logits': logits,
    'upsampled': upsampled[:, ::4, ::4],
  }
  for key, value in ours.items():
    name = f'os{stride}_{size[0]}x{size[1]}/{key}'
    assert_equal_to_golden(np.asarray(value), golden[name], f'seed {name}')


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('stride', [32, 16, 8])
def test_timm_backbone_gives_the_numbers_of_its_own_code(
  stride, size, timm_variables
):
  golden = np.load(GOLDEN / 'timm_resnetv2_50.npz')
  model = deeplab_v3(
    'resnet50', preset='timm', output_stride=stride, multi_grid=(1, 1, 1)
  )
  apply = jax.jit(functools.partial(model.backbone.apply, train=False))
  ours = apply(timm_variables, image_of(size) / 127.5 - 1)['postnorm']
  name = f'os{stride}_{size[0]}x{size[1]}/features'
  assert_equal_to_golden(
    np.asarray(ours)[..., ::16], golden[name], f'timm {name}'
  )
