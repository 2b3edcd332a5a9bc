"""State dicts of torchvision's ResNets and DeepLabs, and of VainF's DeepLabs.

VainF is github.com/VainF/DeepLabV3Plus-Pytorch: v3 and v3+ on torchvision's
backbones. Files that `torch.save` wrote are read by the user's own torch.
"""

import codecs
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.models.deeplab import PRESETS
from deeplab_jax.runtime.errors import UserError, first_line
from deeplab_jax.weights.mapping import NameMap

_URL = 'https://download.pytorch.org/models/'
# URL and the first 8 digits of the SHA-256, which is all that torchvision
# publishes, by its names: COCO images with the classes of VOC, and ImageNet.
PUBLISHED = {
  name: (f'{_URL}{file}-{digest}.pth', digest)
  for name, file, digest in (
    ('deeplabv3_resnet50', 'deeplabv3_resnet50_coco', 'cd0a2569'),
    ('deeplabv3_resnet101', 'deeplabv3_resnet101_coco', '586e9e4e'),
    ('resnet18', 'resnet18', 'f37072fd'),
    ('resnet34', 'resnet34', 'b627a593'),
    ('resnet50', 'resnet50', '11ad3fa6'),
    ('resnet101', 'resnet101', 'cd907fc2'),
    ('resnet152', 'resnet152', 'f82ba261'),
  )
}

_WRAPPERS = 'state_dict', 'model_state', 'model_state_dict', 'model'
_PREFIXES = r'^(module\.|_orig_mod\.|model\.)+'
_UNUSED = {
  r'(.+\.)?fc\.(weight|bias)': 'ImageNet classifier',
  r'.*\.num_batches_tracked': 'state of the training',
}
_TOP = {'conv1': 'stem', 'bn1': 'stem_norm'}
_SHORTCUT = {'downsample.0': 'shortcut', 'downsample.1': 'shortcut_norm'}
_PARTS = tuple(enumerate(('conv', 'norm')))  # of a Sequential
_ASPP = {
  f'{theirs}.{start + i}': f'aspp/{ours}/{part}'
  for theirs, start, ours in (
    ('convs.0', 0, 'conv'),
    *((f'convs.{i}', 0, f'atrous{i}') for i in (1, 2, 3)),
    ('convs.4', 1, 'pooling/project'),
    ('project', 0, 'project'),
  )
  for i, part in _PARTS
}
# Our module by theirs under `classifier.`
_V3 = {
  **{f'0.{name}': path for name, path in _ASPP.items()},
  **{f'{1 + i}': f'decoder/conv/{part}' for i, part in _PARTS},
  '4': 'logits',
}
_V3PLUS = {
  **{f'aspp.{name}': path for name, path in _ASPP.items()},
  **{f'project.{i}': f'decoder/low/{part}' for i, part in _PARTS},
  **{f'classifier.{i}': f'decoder/conv/{part}' for i, part in _PARTS},
  'classifier.3': 'logits',
}
_VAINF = {f'classifier.{name}': path for name, path in _V3.items()}
# Preset, decoder and modules of a head, by what its names start with; the first
# that fits counts.
_HEADS: dict[str, tuple[str, str, dict[str, str]]] = {
  'classifier.aspp.': ('vainf', 'v3plus', _V3PLUS),
  'classifier.classifier.': ('vainf', 'conv', _VAINF),
  'classifier.': ('torchvision', 'conv', _V3),
}
_AUXILIARY = {
  **{f'aux_classifier.{i}': f'auxiliary/conv/{part}' for i, part in _PARTS},
  'aux_classifier.4': 'auxiliary/logits',
}


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a state dict that `torch.save` wrote.

  A checkpoint may hold it under a name such as 'model_state'. Raises
  `UserError` without torch, or if the file is damaged or the state dict holds
  anything but tensors.
  """
  try:
    import torch  # the extra 'torch'
  except ImportError as error:
    raise UserError(
      f'{path} is a file of PyTorch, which torch reads: pip install'
      " 'deeplab_jax[torch]'; or save it as safetensors elsewhere"
    ) from error
  scalar = np.float64(0).__reduce__()[0]  # VainF's best score is one of numpy
  plain = [(scalar, 'numpy.core.multiarray.scalar'), scalar, codecs.encode]
  try:
    with torch.serialization.safe_globals(
      [*plain, np.dtype, type(np.dtype(np.float64))]
    ):
      state = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    raise UserError(
      f'{path} is damaged, or holds more than tensors, which could run anything'
      ' when it is opened, and is refused; save its state_dict() alone'
    ) from error
  except Exception as error:  # a damaged file may raise anything
    raise UserError(
      f'{path} is truncated or damaged, torch says: {first_line(error)}'
    ) from error
  while isinstance(state, dict):
    inner = [
      state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)
    ]
    if not inner:
      break
    state = inner[0]
  if not isinstance(state, dict) or not state:
    raise UserError(f'{path} holds no state dict, but {type(state).__name__}')
  for name, value in state.items():
    if not isinstance(value, torch.Tensor):
      kind = type(value).__name__
      raise UserError(f'{path}: {name} is no tensor, but of type {kind}')
  return {
    str(name): (x.float() if x.is_floating_point() else x).numpy(force=True)
    for name, x in state.items()
  }


def map_torchvision(names: Iterable[str]) -> NameMap:
  """Maps the names of a file."""
  bare = {name: re.sub(_PREFIXES, '', name) for name in names}
  presets: tuple[str, ...] = 'vainf', 'torchvision'
  settings: dict[str, Any] = {}
  modules = dict(_AUXILIARY)
  fits = (
    s for s in _HEADS if any(name.startswith(s) for name in bare.values())
  )
  if start := next(fits, ''):
    preset, decoder, head = _HEADS[start]
    own = {key: PRESETS[preset][key] for key in ('multi_grid', 'aspp_rates')}
    presets, settings = (preset,), own | {'decoder': decoder}
    modules |= {f'classifier.{name}': path for name, path in head.items()}

  def target(name: str) -> tuple[str, str]:
    module, _, leaf = bare[name].rpartition('.')
    path = modules.get(module) or _of_backbone(module)
    if leaf == 'weight':
      leaf = 'gamma' if re.search(r'norm\d?$', path) else 'kernel'
    return path, leaf

  return NameMap.build(
    *(bare, target, _UNUSED, presets, settings),
    kernels='OIHW',
    pooling_last=True,
  )


def _of_backbone(module: str) -> str:
  module = module.removeprefix('backbone.')
  found = re.fullmatch(r'layer([1-4])\.(\d{1,3})\.(.+)', module)
  if not found:
    return f'backbone/{_TOP[module]}' if module in _TOP else ''
  layer = _SHORTCUT.get(found[3], found[3].replace('bn', 'norm'))
  unit = f'block{found[1]}/unit{int(found[2]) + 1}'
  return f'backbone/{unit}/{layer}'
