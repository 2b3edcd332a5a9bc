"""The network of Keras itself, on its JAX backend, to 1e-4."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from deeplab_jax import deeplab_v3, load_pretrained

pytestmark = pytest.mark.compiles

# Its own process: Keras chooses its backend when it is imported.
PROGRAM = """
import sys
import keras
import numpy as np

folder = sys.argv[1]
model = keras.applications.ResNet50V2(weights=None, include_top=False)
rng = np.random.default_rng(0)
for layer in model.layers:
  values = []
  for variable in layer.weights:
    name, shape = variable.name, variable.shape
    if name in ('gamma', 'moving_variance'):
      values.append(rng.uniform(0.5, 1.5, shape))
    elif name in ('beta', 'moving_mean', 'bias'):
      values.append(rng.normal(0, 0.1, shape))
    else:
      values.append(rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape))
  layer.set_weights(values)
model.save(f'{folder}/model.h5')
features = {}
for size in ((97, 129), (96, 128)):
  image = np.random.default_rng(7).integers(0, 256, (1, *size, 3))
  features[f'{size}'] = np.asarray(model(image.astype('float32') / 127.5 - 1))
np.savez(f'{folder}/features.npz', **features)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  # Not imported: it would choose another backend here.
  if importlib.util.find_spec('keras') is None:
    pytest.skip("Keras is missing: pip install 'deeplab_jax[test]'")
  folder = tmp_path_factory.mktemp('keras')
  environment = {
    **os.environ,
    'KERAS_BACKEND': 'jax',
    'KERAS_HOME': str(folder),
  }
  subprocess.run(
    [sys.executable, '-c', PROGRAM, str(folder)], check=True, env=environment
  )
  return folder


@pytest.fixture(scope='module')
def loaded(folder):
  model = deeplab_v3('resnet50', preset='keras')
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False)
  )
  source = str(folder / 'model.h5')
  return load_pretrained(source, shapes, preset='keras')


def test_file_of_keras_covers_the_backbone(loaded):
  _, report = loaded
  assert len(report.loaded) == 270 and not report.unused
  assert all('/backbone/' not in path for path in report.initial)


@pytest.mark.parametrize('size', [(97, 129), (96, 128)], ids=str)
def test_features_equal_those_of_keras(folder, loaded, size):
  variables = {key: tree['backbone'] for key, tree in loaded[0].items()}
  model = deeplab_v3(
    'resnet50', preset='keras', output_stride=32, multi_grid=(1, 1, 1)
  ).backbone
  image = np.random.default_rng(7).integers(0, 256, (1, *size, 3))
  ours = jax.jit(functools.partial(model.apply, train=False))(
    variables, image.astype(np.float32) / 127.5 - 1
  )['postnorm']
  theirs = np.load(folder / 'features.npz')[f'{size}']
  assert ours.shape == theirs.shape and theirs.std() > 0.1
  difference = np.abs(ours - theirs).max() / theirs.std()
  print(f'keras {size}: {difference:.2e} of the standard deviation')
  assert difference < 1e-4
