"""HDF5 files of Keras's ResNet V2: weights alone, or models saved whole."""

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

  Raises `UserError` if it is damaged, or no file of Keras.
  """
  import h5py  # Imported here: it takes 0.1 s, and few programs read HDF5.

  try:
    with h5py.File(path, 'r') as file:
      root = file.get('model_weights', file)
      if 'layer_names' in root.attrs:
        return _layers(root)
  except (OSError, KeyError, RuntimeError, ValueError) as error:
    raise UserError(f'{path} is truncated or damaged: {error}') from error
  raise UserError(
    f'{path} is HDF5, but has no layers of Keras; save it as'
    " model.save('NAME.h5')"
  )


def _layers(root: Any) -> dict[str, np.ndarray]:
  arrays = {}
  for layer in root.attrs['layer_names'].astype(str):  # bytes or str in a file
    for weight in root[layer].attrs['weight_names'].astype(str):
      name = weight.rpartition('/')[2].removesuffix(':0')
      arrays[f'{layer}/{name}'] = root[layer][weight][()]
  return arrays


def map_keras(names: Iterable[str]) -> NameMap:
  """Maps the names that `read_keras` gives."""
  return NameMap.build(names, _target, _UNUSED, ('keras',))


def _target(name: str) -> tuple[str, str]:
  layer, _, leaf = name.rpartition('/')
  top = {'conv1_conv': 'backbone/stem', 'post_bn': 'backbone/postnorm'}
  found = re.fullmatch(r'conv([2-5])_block(\d+)_(.+)', layer)
  if not found or found[3] not in _LAYERS:
    return top.get(layer, ''), leaf
  unit = f'block{int(found[1]) - 1}/unit{found[2]}'
  return f'backbone/{unit}/{_LAYERS[found[3]]}', leaf
