"""State dicts of torchvision's ResNets and DeepLabs, and of VainF's DeepLabs.

VainF is github.com/VainF/DeepLabV3Plus-Pytorch: v3 and v3+ on torchvision's
backbones.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from deeplab_jax.models.deeplab import PRESETS
from deeplab_jax.weights.mapping import NameMap

_UNUSED = {
  r'fc\.(weight|bias)': 'ImageNet classifier',
  r'.*\.num_batches_tracked': 'state of the training',
}
_TOP = {'conv1': 'stem', 'bn1': 'stem_norm'}
_SHORTCUT = {'downsample.0': 'shortcut', 'downsample.1': 'shortcut_norm'}
# The ASPP's modules by PyTorch's numbers; a branch is a Sequential.
_BRANCHES = {
  'convs.0.0': 'conv/conv',
  'convs.0.1': 'conv/norm',
  'convs.4.1': 'pooling/project/conv',
  'convs.4.2': 'pooling/project/norm',
  'project.0': 'project/conv',
  'project.1': 'project/norm',
} | {
  f'convs.{i}.{part}': f'atrous{i}/{("conv", "norm")[part]}'
  for i in (1, 2, 3)
  for part in (0, 1)
}
# The modules of a head under `classifier.`.
_V3 = {f'0.{name}': f'aspp/{path}' for name, path in _BRANCHES.items()} | {
  '1': 'decoder/conv/conv',
  '2': 'decoder/conv/norm',
  '4': 'logits',
}
_HEADS = {
  'torchvision': _V3,
  'vainf': {f'classifier.{name}': path for name, path in _V3.items()},
  'v3plus': {
    **{f'aspp.{name}': f'aspp/{path}' for name, path in _BRANCHES.items()},
    'project.0': 'decoder/low/conv',
    'project.1': 'decoder/low/norm',
    'classifier.0': 'decoder/conv/conv',
    'classifier.1': 'decoder/conv/norm',
    'classifier.3': 'logits',
  },
}
_AUXILIARY = {
  'aux_classifier.0': 'auxiliary/conv/conv',
  'aux_classifier.1': 'auxiliary/conv/norm',
  'aux_classifier.4': 'auxiliary/logits',
}


def head_of(names: Iterable[str]) -> str:
  """Returns whose head a file holds, a key of `_HEADS`; '' for none."""
  for head, start in (
    ('v3plus', 'classifier.aspp.'),
    ('vainf', 'classifier.classifier.'),
    ('torchvision', 'classifier.0.'),
  ):
    if any(name.startswith(start) for name in names):
      return head
  return ''


def map_torchvision(names: Iterable[str]) -> NameMap:
  """Maps the names of a file."""
  names = list(names)
  modules = {
    f'classifier.{name}': path
    for name, path in _HEADS.get(head_of(names), {}).items()
  } | _AUXILIARY

  def target(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition('.')
    path = modules.get(module) or _of_backbone(module)
    if leaf == 'weight':
      leaf = 'gamma' if re.search(r'norm\d?$', path) else 'kernel'
    return path, leaf.replace('bias', 'beta' if 'norm' in path else 'bias')

  return NameMap.build(
    names, target, _UNUSED, kernels='OIHW', pooling_last=True
  )


def _of_backbone(module: str) -> str:
  module = module.removeprefix('backbone.')
  found = re.fullmatch(r'layer([1-4])\.(\d+)\.(.+)', module)
  if not found:
    return f'backbone/{_TOP[module]}' if module in _TOP else ''
  layer = _SHORTCUT.get(found[3], found[3].replace('bn', 'norm'))
  unit = f'block{found[1]}/unit{int(found[2]) + 1}'
  return f'backbone/{unit}/{layer}'


def presets_of(names: Iterable[str]) -> tuple[str, ...]:
  """Returns the presets that the weights of these names fit."""
  head = head_of(names)
  owner = {'v3plus': 'vainf'}.get(head, head)
  return (owner,) if owner else ('torchvision', 'vainf')


def settings_of(names: Iterable[str]) -> Mapping[str, Any]:
  """Returns the arguments of `deeplab_v3` that the names determine."""
  names = list(names)
  preset = PRESETS[presets_of(names)[0]]
  settings = {'multi_grid': preset['multi_grid']}
  if head := head_of(names):
    settings['aspp_rates'] = preset['aspp_rates']
    settings['decoder'] = 'v3plus' if head == 'v3plus' else 'conv'
  return settings
