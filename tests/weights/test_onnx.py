"""ONNX graphs in onnxruntime, beside the network and its golden outputs."""

import functools
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from flax import linen as nn
from reference import slim_shapes, weight

from deeplab_jax import deeplab_v3
from deeplab_jax.weights.mapping import merge_variables
from deeplab_jax.weights.onnx import onnx_model
from deeplab_jax.weights.tf_slim import map_tf_slim

pytestmark = pytest.mark.compiles

GOLDEN = Path(__file__).parents[1] / 'golden'
# Aligned, one more and one less than a cell, and less than one.
SIZES = ((65, 97), (66, 80), (64, 95), (7, 1))


def runtime(made):
  """Function (images) -> results of an ONNX model by name."""
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1  # else its threads outlive the test
  session = onnxruntime.InferenceSession(
    made.SerializeToString(), options, providers=['CPUExecutionProvider']
  )
  names = [output.name for output in session.get_outputs()]
  return lambda images: dict(
    zip(names, session.run(names, {'images': images}), strict=True)
  )


def images_of(size, batch=2):
  rng = np.random.default_rng(size)
  return rng.integers(0, 256, (batch, *size, 3), np.uint8)


def assert_like_the_network(found, logits, bound=1e-3, share=0.999):
  probabilities = np.asarray(jax.nn.softmax(logits))
  difference = np.abs(found['probabilities'] - probabilities).max()
  equal = (found['segmentation_map'] == logits.argmax(-1)).mean()
  print(f'{logits.shape}: {difference:.1e} at most, {equal:.4%} equal')
  assert found['segmentation_map'].dtype == np.uint8
  assert difference < bound
  assert equal >= share


# Each preset meets both units, and each stride as well.
@pytest.mark.parametrize(
  ('preset', 'backbone', 'stride', 'more'),
  [
    ('paper', 'resnet18', 8, {}),
    ('paper', 'resnet50', 16, {}),
    ('paper', 'resnet18', 16, {'decoder': 'v3plus'}),
    ('paper', 'resnet50_v1', 32, {'decoder': 'v3plus'}),
    ('seed', 'resnet18', 16, {}),
    ('seed', 'resnet50', 8, {}),
    ('slim', 'resnet18', 32, {}),
    ('slim', 'resnet50', 8, {}),
    ('keras', 'resnet50', 32, {}),
    ('keras', 'resnet18', 16, {}),
    ('timm', 'resnet50', 16, {}),
    ('timm', 'resnet18', 32, {}),
    ('torchvision', 'resnet50_v1', 8, {}),
    ('vainf', 'resnet18_v1', 16, {'decoder': 'v3plus'}),
  ],
)
def test_every_network_gives_its_own_probabilities_at_any_size(
  random_variables, preset, backbone, stride, more
):
  model = deeplab_v3(
    backbone,
    num_classes=5,
    output_stride=stride,
    preset=preset,
    width=0.125,
    aspp_features=16,
    **more,
  )
  variables = random_variables(model)
  run = runtime(onnx_model(model, variables, probabilities=True))
  batches = [images_of(size) for size in SIZES]
  # One program for all sizes compiles in less time than one each.
  apply = functools.partial(model.apply, train=False)
  expected = jax.jit(lambda v, x: [apply(v, images) for images in x])
  for images, logits in zip(batches, expected(variables, batches), strict=True):
    assert_like_the_network(run(images), logits)


@pytest.mark.parametrize('size', [(97, 129), (96, 128)], ids=str)
@pytest.mark.parametrize('stride', [16, 8])
def test_the_seed_as_onnx_gives_the_numbers_of_its_own_code(stride, size):
  model = deeplab_v3('resnet50', preset='seed', output_stride=stride)
  arrays = {name: weight(name, s, 'slim') for name, s in slim_shapes()}
  names = map_tf_slim(arrays)
  empty = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False)
  )
  variables, _ = merge_variables(
    empty,
    names.apply(arrays),
    initial={},
    unused=names.unused,
    unknown=names.unknown,
  )
  with np.load(GOLDEN / 'seed_resnet_v2_50.npz') as golden:
    expected = golden[f'os{stride}_{size[0]}x{size[1]}/upsampled']
  images = np.random.default_rng(7).integers(0, 256, (1, *size, 3))
  run = runtime(onnx_model(model, variables, probabilities=True))
  found = run(images.astype(np.uint8))
  part = {key: value[:, ::4, ::4] for key, value in found.items()}
  assert_like_the_network(part, expected)


@pytest.mark.parametrize(
  ('dtype', 'bound'), [(np.float16, 1e-3), (ml_dtypes.bfloat16, 1e-2)]
)
def test_kernels_may_be_stored_in_half_the_space(
  random_variables, dtype, bound
):
  model = deeplab_v3('resnet18', num_classes=3, width=0.25, aspp_features=16)
  variables = random_variables(model)
  small = jax.tree.map(
    lambda x: x.astype(dtype) if x.ndim == 4 else x, variables
  )
  made = onnx_model(model, small, probabilities=True)
  whole = onnx_model(model, variables).ByteSize()
  assert 0.5 * whole < made.ByteSize() < 0.53 * whole
  images = images_of((40, 50))
  logits = jax.jit(functools.partial(model.apply, train=False))(
    variables, images
  )
  assert_like_the_network(runtime(made)(images), logits, 20 * bound, 0.95)


def test_a_size_may_be_fixed(random_variables):
  model = deeplab_v3('resnet18', num_classes=3, width=0.125, aspp_features=8)
  made = onnx_model(model, random_variables(model), size=(40, 56))
  (given,) = made.graph.input
  shape = given.type.tensor_type.shape.dim
  assert [d.dim_value or d.dim_param for d in shape] == ['batch', 40, 56, 3]
  (found,) = runtime(made)(images_of((40, 56), 3)).values()
  assert found.shape == (3, 40, 56)


def test_batch_norms_that_follow_a_convolution_are_folded(random_variables):
  model = deeplab_v3('resnet50', width=0.125, aspp_features=8)
  variables = random_variables(model)
  kinds = [node.op_type for node in onnx_model(model, variables).graph.node]
  kernels = [x for x in jax.tree.leaves(variables) if x.ndim == 4]
  assert kinds.count('Conv') == len(kernels)
  # Left are those before the convolutions of 16 units, and the last.
  assert kinds.count('BatchNormalization') == 17


class Pool(nn.Module):
  """A backbone of anyone's."""

  output_stride: int = 8

  @nn.compact
  def __call__(self, x, *, train):
    return {'postnorm': x[:, ::8, ::8]}


def test_other_backbones_are_refused():
  model = deeplab_v3(Pool(), aspp_features=4)
  with pytest.raises(ValueError, match='other networks as StableHLO'):
    onnx_model(model, {'params': {}, 'batch_stats': {}})
