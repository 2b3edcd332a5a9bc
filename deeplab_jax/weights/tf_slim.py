"""TF-slim checkpoints, version 1 and 2: `resnet_v2_{50,101,152}`.

A classification checkpoint holds the backbone; a checkpoint of the seed network
also holds the head.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deeplab_jax.runtime.errors import UserError, first_line
from deeplab_jax.weights.mapping import NameMap

_MODULES = {
  'resnet/conv1': 'backbone/stem',
  'resnet/postnorm': 'backbone/postnorm',
  'DeepLab_v3/ASPP_layer/image_level_conv_1x1': 'aspp/pooling/project/conv',
  'DeepLab_v3/ASPP_layer/conv_1x1_0': 'aspp/conv/conv',
  'DeepLab_v3/ASPP_layer/conv_3x3_1': 'aspp/atrous1/conv',
  'DeepLab_v3/ASPP_layer/conv_3x3_2': 'aspp/atrous2/conv',
  'DeepLab_v3/ASPP_layer/conv_3x3_3': 'aspp/atrous3/conv',
  'DeepLab_v3/ASPP_layer/conv_1x1_output': 'aspp/project/conv',
  'DeepLab_v3/logits': 'logits',
}
_UNIT = r'resnet/block(\d)/unit_(\d+)/bottleneck_v2/(preact|shortcut|conv[123])'
_UNUSED = {
  r'(.*/)?(global_step|beta[12]_power)': 'state of the training',
  r'.*/(Momentum|RMSProp(_1)?|Adam(_1)?|Adagrad)': 'state of the training',
  r'.*/ExponentialMovingAverage': 'state of the training',
  r'.*/mean_rgb': 'the input is normalized by the preset',
  r'resnet_v2_\d+/logits/(weights|biases)': 'ImageNet classifier',
}


def read_tf_slim(path: str | Path) -> dict[str, np.ndarray]:
  """Reads a checkpoint: the file of version 1, or the prefix of version 2.

  Raises `UserError` without TensorFlow, or if it cannot read the file.
  """
  try:
    import tensorflow as tf  # the extra 'tf'
  except ImportError as error:
    raise UserError(
      f'{path} is a TensorFlow checkpoint, which TensorFlow reads:'
      " pip install 'deeplab_jax[tf]'"
    ) from error
  try:
    reader = tf.train.load_checkpoint(str(path))
    names = reader.get_variable_to_shape_map()
    return {name: np.asarray(reader.get_tensor(name)) for name in names}
  except (tf.errors.OpError, ValueError, RuntimeError) as error:
    raise UserError(
      f'{path} is truncated or damaged, TensorFlow says: {first_line(error)}'
    ) from error


def map_tf_slim(names: Iterable[str]) -> NameMap:
  """Maps the names of a checkpoint, of backbone and head."""
  names = list(names)
  whole = any(name.startswith('DeepLab_v3/') for name in names)
  presets = ('seed',) if whole else ('slim', 'seed')
  return NameMap.build(names, _target, _UNUSED, presets)


def _target(name: str) -> tuple[str, str]:
  module, _, leaf = name.rpartition('/')
  bare = module.removesuffix('/BatchNorm')
  bare = re.sub(r'^resnet_v2_\d+', 'resnet', bare)
  path = _MODULES.get(bare, '')
  if unit := re.fullmatch(_UNIT, bare):
    path = 'backbone/block{}/unit{}/{}'.format(*unit.groups())
  if module.endswith('/BatchNorm'):  # conv1/BatchNorm is norm1 here
    before, found, after = path.rpartition('conv')
    path = f'{before}norm{after}' if found else ''
  return path, leaf
