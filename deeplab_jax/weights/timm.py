"""safetensors files of timm: `resnetv2_50`, `resnetv2_101` and their like."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors.numpy

from deeplab_jax.runtime.errors import UserError, first_line
from deeplab_jax.weights.mapping import NameMap

_LAYERS = {
  'norm1': 'preact',
  'conv1': 'conv1',
  'norm2': 'norm1',
  'conv2': 'conv2',
  'norm3': 'norm2',
  'conv3': 'conv3',
  'downsample.conv': 'shortcut',
}
_UNUSED = {
  r'head\.fc\.(weight|bias)': 'ImageNet classifier',
  r'.*\.num_batches_tracked': 'state of the training',
}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
  """Reads a safetensors file; raises `UserError` if it is damaged."""
  try:
    return safetensors.numpy.load_file(path)
  except Exception as error:  # a damaged file, or a new type, may raise any
    raise UserError(
      f'{path} is truncated or damaged, or of unknown type: {first_line(error)}'
    ) from error


def map_timm(names: Iterable[str]) -> NameMap:
  """Maps the names of a file."""
  return NameMap.build(names, _target, _UNUSED, ('timm',), kernels='OIHW')


def _target(name: str) -> tuple[str, str]:
  module, _, leaf = name.rpartition('.')
  if leaf == 'weight':
    leaf = 'gamma' if 'norm' in module else 'kernel'
  top = {'stem.conv': 'backbone/stem', 'norm': 'backbone/postnorm'}
  found = re.fullmatch(r'stages\.(\d)\.blocks\.(\d{1,3})\.(.+)', module)
  if not found or found[3] not in _LAYERS:
    return top.get(module, ''), leaf
  unit = f'block{int(found[1]) + 1}/unit{int(found[2]) + 1}'
  return f'backbone/{unit}/{_LAYERS[found[3]]}', leaf
