"""Merging is strict, and says what it did."""

import jax
import numpy as np
import pytest
from reference import keras_shapes, slim_shapes, timm_shapes

from deeplab_jax import deeplab_v3
from deeplab_jax.models.resnet import BACKBONES
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.keras import map_keras
from deeplab_jax.weights.mapping import (
  NameMap,
  backbone_of,
  flatten,
  merge_variables,
)
from deeplab_jax.weights.tf_slim import map_tf_slim
from deeplab_jax.weights.timm import map_timm

VARIABLES = {
  'params': {'a': {'kernel': np.zeros((1, 1, 2, 3)), 'bias': np.zeros(3)}},
  'batch_stats': {'n': {'mean': np.zeros(2)}},
}
KERNEL, BIAS, MEAN = 'params/a/kernel', 'params/a/bias', 'batch_stats/n/mean'


def arrays(**changes):
  values = {
    KERNEL: np.ones((1, 1, 2, 3), np.float32),
    BIAS: np.ones(3, np.float32),
    MEAN: np.ones(2, np.float32),
  }
  values |= {path.replace('__', '/'): v for path, v in changes.items()}
  return {path: value for path, value in values.items() if value is not None}


def merge(values, initial=None, unknown=()):
  return merge_variables(
    VARIABLES, values, initial=initial or {}, unknown=unknown
  )


def test_every_variable_is_replaced_by_its_array_in_float32():
  merged, report = merge(arrays(params__a__bias=np.full(3, 2.0)))
  assert merged['params']['a']['bias'].tolist() == [2, 2, 2]
  assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype('float32')}
  assert jax.tree.structure(merged) == jax.tree.structure(VARIABLES)
  assert set(report.loaded) == {KERNEL, BIAS, MEAN}
  assert str(report).splitlines() == [
    'loaded: 3 arrays',
    'kept at the initial value: nothing',
    'not used: nothing',
  ]


def test_half_precision_is_widened():
  merged, _ = merge(arrays(params__a__bias=np.full(3, 0.5, np.float16)))
  assert merged['params']['a']['bias'].dtype == np.float32


@pytest.mark.parametrize(
  'values, unknown, words',
  [
    (arrays(params__a__bias=None), (), f'1 array missing in the file: {BIAS}'),
    (
      arrays(params__b=np.ones(1)),
      (),
      '1 array without a place in the network',
    ),
    (arrays(), ('x', 'y'), '2 arrays without a place in the network: x, y'),
    (
      arrays(params__a__bias=np.ones(4)),
      (),
      f'1 array of another shape: {BIAS} is (4,) in the file and (3,) here',
    ),
    (
      arrays(params__a__bias=np.array([1, np.nan, 1])),
      (),
      f'1 array not finite: {BIAS}',
    ),
    (
      arrays(params__a__bias=np.array([1, 1e300, 1])),
      (),
      f'1 array not finite: {BIAS}',
    ),
    (arrays(params__a__bias=np.ones(3, int)), (), f'{BIAS} holds int64'),
    (arrays(params__a__bias=np.ones(3, 'S1')), (), f'{BIAS} holds |S1'),
  ],
)
def test_what_does_not_fit_is_named(values, unknown, words):
  with pytest.raises(UserError) as error:
    merge(values, unknown=unknown)
  assert words in str(error.value)


def test_long_lists_are_counted():
  with pytest.raises(UserError, match=r'^9 arrays .*: a, b, c, d, e, f and 3'):
    merge(arrays(), unknown=tuple('abcdefghi'))


def test_variables_allowed_by_pattern_stay_and_are_reported():
  merged, report = merge(
    arrays(params__a__bias=None), {'params/*/bias': 'a reason'}
  )
  assert merged['params']['a']['bias'] is VARIABLES['params']['a']['bias']
  assert report.initial == {BIAS: 'a reason'}
  assert 'kept at the initial value: 1 array (a reason): a/bias' in str(report)


def test_two_arrays_for_one_variable_are_refused():
  names = NameMap({'x': BIAS, 'y': BIAS})
  with pytest.raises(
    ValueError, match=f'y and another array both go to {BIAS}'
  ):
    names.apply({'x': np.ones(3), 'y': np.ones(3)})


def test_kernels_of_torch_are_turned():
  kernel = np.arange(24).reshape(4, 3, 2, 1)  # OIHW
  names = NameMap({'x': KERNEL}, kernels='OIHW')
  turned = names.apply({'x': kernel})[KERNEL]
  assert turned.shape == (2, 1, 3, 4)
  assert turned[1, 0, 2, 3] == kernel[3, 2, 1, 0]


def test_map_is_printed_a_line_for_a_name():
  names = NameMap({'x': BIAS}, {'y': 'a reason'}, ('z',))
  assert str(names).splitlines() == [
    f'x -> {BIAS}',
    'y -- not used: a reason',
    'z -- fits nothing',
  ]


@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone_is_told_by_its_paths(name):
  model = deeplab_v3(name, width=0.125, aspp_features=8)
  paths = flatten(
    jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False
      )
    )
  )
  assert backbone_of(paths) == name
  assert backbone_of(path for path in paths if 'block4' not in path) == ''


@pytest.mark.parametrize(
  'mapper, shapes, unused',
  [
    (map_tf_slim, slim_shapes, 2),
    (map_keras, lambda: keras_shapes(top=True), 2),
    (map_timm, timm_shapes, 2),
  ],
)
def test_every_name_of_a_reference_has_one_place(mapper, shapes, unused):
  names = mapper(dict(shapes()))
  assert not names.unknown
  assert len(set(names.targets.values())) == len(names.targets)
  assert set(names.unused.values()) == {'ImageNet classifier'}
  assert len(names.unused) == unused


@pytest.mark.parametrize(
  'mapper, name',
  [
    (map_tf_slim, 'resnet_v2_50/conv1/weights/Momentum'),
    (map_tf_slim, 'resnet_v2_50/block1/unit_1/bottleneck_v2/x/weights/Adam_1'),
    (map_tf_slim, 'DeepLab_v3/logits/biases/ExponentialMovingAverage'),
    (map_tf_slim, 'global_step'),
    (map_tf_slim, 'beta1_power'),
    (map_timm, 'norm.num_batches_tracked'),
  ],
)
def test_state_of_a_training_is_not_used(mapper, name):
  assert mapper([name]).unused == {name: 'state of the training'}


@pytest.mark.parametrize(
  'mapper, name',
  [
    (map_tf_slim, 'resnet_v1_50/conv1/weights'),
    (map_tf_slim, 'resnet_v2_50/block1/unit_1/bottleneck_v2/conv4/weights'),
    (map_tf_slim, 'resnet_v2_50/conv1/strange'),
    (map_tf_slim, 'conv1'),
    (map_keras, 'conv2_block1_0_bn/gamma'),
    (map_keras, 'conv1_conv/strange'),
    (map_timm, 'layer1.0.conv1.weight'),
    (map_timm, 'stem.conv.strange'),
    (map_timm, 'x'),
  ],
)
def test_strange_names_fit_nothing(mapper, name):
  assert mapper([name]).unknown == (name,)
