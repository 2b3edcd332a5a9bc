"""safetensors files of timm: `resnetv2_50`, `resnetv2_101` and their like."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deeplab_jax.runtime.errors import UserError
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


def read_timm(path: str | Path) -> dict[str, np.ndarray]:
  """Reads a safetensors file.

  Raises:
    UserError: if it is damaged, or holds what numpy cannot.
  """
  try:
    safetensors = importlib.import_module('safetensors')
    numpy = importlib.import_module('safetensors.numpy')
  except ImportError as error:
    raise UserError(
      f'{path} is read by safetensors: pip install safetensors'
    ) from error
  try:
    return numpy.load_file(path)
  except (safetensors.SafetensorError, TypeError, KeyError, OSError) as error:
    raise UserError(
      f'{path} is truncated or damaged, or no safetensors file: {error}'
    ) from error


def hub_file(repository: str) -> Path:
  """Downloads `model.safetensors` of a repository on the Hugging Face hub.

  Args:
    repository: 'timm/resnetv2_50.a1h_in1k'.

  Raises:
    UserError: without huggingface_hub, or if the file cannot be had.
  """
  try:
    hub = importlib.import_module('huggingface_hub')
  except ImportError as error:
    raise UserError(
      f'hf://{repository} is fetched by huggingface_hub:'
      " pip install 'deeplab_jax[hf]'"
    ) from error
  try:
    return Path(hub.hf_hub_download(repository, 'model.safetensors'))
  except Exception as error:  # of whichever HTTP client the hub has
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
      f'hf://{repository} cannot be fetched: {reason}; download its'
      ' model.safetensors elsewhere and name the file'
    ) from error


def map_timm(names: Iterable[str]) -> NameMap:
  """The place of every array, see `golden/README.md`."""
  return NameMap.build(names, _target, _UNUSED, kernels='OIHW')


def _target(name: str) -> str | None:
  module, _, leaf = name.rpartition('.')
  found = re.fullmatch(r'stages\.(\d)\.blocks\.(\d+)\.(.+)', module)
  top = {'stem.conv': 'stem', 'norm': 'postnorm'}
  if module in top:
    path = top[module]
  elif found and found[3] in _LAYERS:
    block, unit = int(found[1]) + 1, int(found[2]) + 1
    path = f'block{block}/unit{unit}/{_LAYERS[found[3]]}'
  else:
    return None
  norm = 'norm' in module
  leaves = {
    'weight': ('params', 'scale' if norm else 'kernel'),
    'bias': ('params', 'bias'),
    'running_mean': ('batch_stats', 'mean'),
    'running_var': ('batch_stats', 'var'),
  }
  if leaf not in leaves:
    return None
  collection, leaf = leaves[leaf]
  return f'{collection}/backbone/{path}/{leaf}'
