"""HDF5 files of Keras: `ResNet50V2`, `ResNet101V2` and `ResNet152V2`.

Read are the weight files of `keras.applications` (with or without the top),
and models saved whole as `.h5`.
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.mapping import NameMap

_URL = 'https://storage.googleapis.com/tensorflow/keras-applications/resnet/'
_FILE = '{}v2_weights_tf_dim_ordering_tf_kernels_notop.h5'

# URL and MD5 of the published weights without the top, by backbone.
PUBLISHED = {
  name: (_URL + _FILE.format(name), md5)
  for name, md5 in (
    ('resnet50', 'fac2f116257151a9d068a22e544a4917'),
    ('resnet101', 'c0ed64b8031c3730f411d2eb4eea35b5'),
    ('resnet152', 'ed17cf2e0169df9d443503ef94b23b33'),
  )
}

_LEAVES = {
  'kernel': ('params', 'kernel'),
  'bias': ('params', 'bias'),
  'gamma': ('params', 'scale'),
  'beta': ('params', 'bias'),
  'moving_mean': ('batch_stats', 'mean'),
  'moving_variance': ('batch_stats', 'var'),
}
_LAYERS = {
  'preact_bn': 'preact',
  '0_conv': 'shortcut',
  '1_conv': 'conv1',
  '1_bn': 'norm1',
  '2_conv': 'conv2',
  '2_bn': 'norm2',
  '3_conv': 'conv3',
}
_UNUSED = {r'(predictions|probs)/(kernel|bias)': 'ImageNet classifier'}


def read_keras(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a file as `layer/array`, `conv1_conv/kernel`.

  Raises:
    UserError: if it is damaged, or no file of Keras.
  """
  try:
    h5py = importlib.import_module('h5py')
  except ImportError as error:
    raise UserError(
      f'{path} is an HDF5 file, which h5py reads: pip install h5py'
    ) from error
  try:
    with h5py.File(path, 'r') as file:
      root = file.get('model_weights', file)
      if 'layer_names' not in root.attrs:
        raise UserError(
          f'{path} is HDF5, but has no layers of Keras; save it as'
          " model.save('NAME.h5')"
        )
      return _layers(root)
  except (OSError, KeyError, RuntimeError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{path} is truncated or damaged: {error}') from error


def _layers(root: Any) -> dict[str, np.ndarray]:
  arrays = {}
  for layer in root.attrs['layer_names']:
    layer = _text(layer)
    for weight in root[layer].attrs['weight_names']:
      name = _text(weight).rpartition('/')[2].removesuffix(':0')
      arrays[f'{layer}/{name}'] = root[layer][_text(weight)][()]
  return arrays


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)


def map_keras(names: Iterable[str]) -> NameMap:
  """The place of every array, by `layer/array`."""
  return NameMap.build(names, _target, _UNUSED)


def _target(name: str) -> str | None:
  layer, _, leaf = name.rpartition('/')
  top = {'conv1_conv': 'stem', 'post_bn': 'postnorm'}
  found = re.fullmatch(r'conv([2-5])_block(\d+)_(.+)', layer)
  if layer in top:
    path = top[layer]
  elif found and found[3] in _LAYERS:
    path = f'block{int(found[1]) - 1}/unit{found[2]}/{_LAYERS[found[3]]}'
  else:
    return None
  if leaf not in _LEAVES:
    return None
  collection, leaf = _LEAVES[leaf]
  return f'{collection}/backbone/{path}/{leaf}'
