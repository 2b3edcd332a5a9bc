"""TF-slim checkpoints, version 1 and 2: `resnet_v2_{50,101,152}`.

A classification checkpoint holds the backbone, one of the seed network the
head as well.
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.mapping import NameMap

_LEAVES = {
  'weights': ('params', 'kernel'),
  'biases': ('params', 'bias'),
  'gamma': ('params', 'scale'),
  'beta': ('params', 'bias'),
  'moving_mean': ('batch_stats', 'mean'),
  'moving_variance': ('batch_stats', 'var'),
}
_HEAD = {
  'ASPP_layer/image_level_conv_1x1': 'aspp/pooling/project',
  'ASPP_layer/conv_1x1_0': 'aspp/conv',
  'ASPP_layer/conv_3x3_1': 'aspp/atrous1',
  'ASPP_layer/conv_3x3_2': 'aspp/atrous2',
  'ASPP_layer/conv_3x3_3': 'aspp/atrous3',
  'ASPP_layer/conv_1x1_output': 'aspp/project',
}
_UNUSED = {
  r'(.*/)?(global_step|beta[12]_power)': 'state of the training',
  r'.*/(Momentum|RMSProp(_1)?|Adam(_1)?|Adagrad)': 'state of the training',
  r'.*/ExponentialMovingAverage': 'state of the training',
  r'.*/mean_rgb': 'the input is normalised by the preset',
  r'resnet_v2_\d+/logits/(weights|biases)': 'ImageNet classifier',
}


def read_tf_slim(path: str | Path) -> dict[str, np.ndarray]:
  """Reads a checkpoint with TensorFlow.

  Args:
    path: the file of a version 1 checkpoint, or the prefix of version 2.

  Raises:
    UserError: without TensorFlow, or if it cannot read the file.
  """
  try:
    tf = importlib.import_module('tensorflow')
  except ImportError as error:
    raise UserError(
      f'{path} is a TensorFlow checkpoint, which TensorFlow reads:'
      " pip install 'deeplab_jax[tf]'"
    ) from error
  try:
    reader = tf.train.load_checkpoint(str(path))
    return {
      name: np.asarray(reader.get_tensor(name))
      for name in reader.get_variable_to_shape_map()
    }
  except (tf.errors.OpError, ValueError, RuntimeError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
      f'{path} is truncated or damaged, TensorFlow says: {reason}'
    ) from error


def map_tf_slim(names: Iterable[str]) -> NameMap:
  """The place of every array of a checkpoint, see `golden/README.md`."""
  return NameMap.build(names, _target, _UNUSED)


def _target(name: str) -> str | None:
  module, _, leaf = name.rpartition('/')
  if leaf not in _LEAVES:
    return None
  path = _backbone(module) or _head(module)
  collection, leaf = _LEAVES[leaf]
  return path and f'{collection}/{path}/{leaf}'


def _backbone(module: str) -> str | None:
  found = re.fullmatch(r'resnet_v2_\d+/(.+)', module)
  if not found:
    return None
  top = {'conv1': 'backbone/stem', 'postnorm': 'backbone/postnorm'}
  if found[1] in top:
    return top[found[1]]
  found = re.fullmatch(
    r'block(\d)/unit_(\d+)/bottleneck_v2/(preact|shortcut|conv[123])'
    r'(/BatchNorm)?',
    found[1],
  )
  if not found:
    return None
  block, unit, layer, norm = found.groups()
  layer = layer.replace('conv', 'norm') if norm else layer
  return f'backbone/block{block}/unit{unit}/{layer}'


def _head(module: str) -> str | None:
  if module == 'DeepLab_v3/logits':
    return 'logits'
  module, norm, _ = module.removeprefix('DeepLab_v3/').partition('/BatchNorm')
  if module not in _HEAD:
    return None
  return f'{_HEAD[module]}/{"norm" if norm else "conv"}'
