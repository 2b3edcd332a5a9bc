"""The outputs of the reference networks, from their own code, to 1e-4.

Weights follow a formula of the variable's name, see `golden/README.md`; they
pass through the project's own name mappings.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import slim_shapes, timm_shapes, weight

from deeplab_jax import deeplab_v3
from deeplab_jax.weights.mapping import merge_variables
from deeplab_jax.weights.tf_slim import map_tf_slim
from deeplab_jax.weights.timm import map_timm

GOLDEN = Path(__file__).parents[3] / 'shared' / 'golden'
SIZES = ((97, 129), (96, 128))

pytestmark = pytest.mark.skipif(
  not GOLDEN.is_dir(), reason=f'the reference outputs are not in {GOLDEN}'
)


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
