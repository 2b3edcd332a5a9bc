"""Weights from any source: found, told apart by content, and merged."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.runtime.download import download
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.files import kind_of, unpacked
from deeplab_jax.weights.keras import PUBLISHED, map_keras, read_keras
from deeplab_jax.weights.mapping import (
  MergeReport,
  NameMap,
  backbone_of,
  flatten,
  merge_variables,
)
from deeplab_jax.weights.tf_slim import map_tf_slim, read_tf_slim
from deeplab_jax.weights.timm import hub_file, map_timm, read_timm


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """Weights of a source, by the names of this project.

  Attributes:
    source: as it was named.
    names: from its names to paths of variables.
    arrays: by path.
    presets: keys of `PRESETS` whose networks they fit, the first by default.
    settings: arguments of `deeplab_v3` that they fix.
    dataset: what the classes mean, if the source says so.
  """

  source: str
  names: NameMap
  arrays: dict[str, np.ndarray]
  presets: tuple[str, ...]
  settings: dict[str, Any]
  dataset: dict[str, Any] | None = None

  @property
  def num_classes(self) -> int | None:
    """Channels of the class layer, None if there is none."""
    bias = self.arrays.get('params/logits/bias')
    return None if bias is None else bias.shape[0]

  def preset_for(self, asked: str) -> str:
    """The preset to build the network with, `asked` unless that is ''.

    Raises:
      UserError: if the weights do not fit that preset.
    """
    if asked and asked not in self.presets:
      raise UserError(
        f'{self.source} holds weights for the preset'
        f' {" or ".join(self.presets)}, which contradicts preset={asked}'
      )
    return asked or self.presets[0]

  def merge_into(
    self, variables: Mapping[str, Any], allow: Iterable[str] = ()
  ) -> tuple[dict[str, Any], MergeReport]:
    """Puts the weights in the place of a model's variables.

    Args:
      variables: of `model.init`.
      allow: patterns of names in the file that may fit nothing, and of paths
        that may stay as initialised.

    Returns:
      The new variables, and what was done.

    Raises:
      UserError: see `merge_variables`.
    """
    allow, leaves = tuple(allow), flatten(variables)
    ours, theirs = backbone_of(leaves), backbone_of(self.arrays)
    if theirs and ours != theirs:
      raise UserError(
        f'{self.source} looks like {theirs}, the network is'
        f' {ours or "another one"}; use backbone={theirs}'
      )
    arrays, names = _without_class_layer(self.arrays, self.names, leaves)
    initial = dict.fromkeys(allow, 'allowed by name')
    if not any(path.startswith('params/aspp/') for path in arrays):
      initial |= {'*/aspp/*': 'the file holds a backbone alone'}
      initial |= {'*/logits/*': 'the file holds a backbone alone'}
    elif 'params/logits/kernel' not in arrays:
      initial |= {'*/logits/*': 'the file has other classes'}
    try:
      return merge_variables(
        variables, arrays, initial=initial, names=_allowing(names, allow)
      )
    except UserError as error:
      raise UserError(f'{self.source}: {error}') from error


def _without_class_layer(
  arrays: dict[str, np.ndarray], names: NameMap, leaves: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], NameMap]:
  """Leaves the class layer out if it is of another number of classes."""
  bias = 'params/logits/bias'
  if bias not in arrays or bias not in leaves:
    return arrays, names
  theirs, ours = arrays[bias].shape[-1], leaves[bias].shape[-1]
  if theirs == ours:
    return arrays, names
  why = f'class layer for {theirs} classes, the network has {ours}'
  left_out = {
    name: why
    for name, path in names.targets.items()
    if path.startswith('params/logits/')
  }
  arrays = {
    path: array
    for path, array in arrays.items()
    if not path.startswith('params/logits/')
  }
  return arrays, dataclasses.replace(names, unused=names.unused | left_out)


def _allowing(names: NameMap, allow: Iterable[str]) -> NameMap:
  allowed = {
    name: 'allowed by name'
    for name in names.unknown
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)
  }
  return dataclasses.replace(
    names,
    unused=names.unused | allowed,
    unknown=tuple(name for name in names.unknown if name not in allowed),
  )


def load_pretrained(
  source: str,
  variables: Mapping[str, Any],
  *,
  preset: str = '',
  allow: Iterable[str] = (),
) -> tuple[dict[str, Any], MergeReport]:
  """Loads weights into the variables of a model.

  The model must be built with the preset of the source, which the variables
  alone do not show: 'keras', 'timm', 'slim', 'seed' or a checkpoint's own.

  Args:
    source: one of `files.SOURCES`; 'keras' downloads Keras's ImageNet weights.
    variables: of `deeplab_v3(...).init`.
    preset: the one that the model was built with, to have it checked.
    allow: patterns of names in the file that may fit nothing, and of paths of
      variables that may stay as initialised.

  Returns:
    The variables as float32 numpy arrays where they were loaded, and a report:
    what was loaded, what stayed as initialised and why, and what was not used.

  Raises:
    UserError: if the source cannot be read or does not fit.
  """
  backbone = backbone_of(flatten(variables))
  pretrained = open_pretrained(source, backbone=backbone)
  pretrained.preset_for(preset)
  return pretrained.merge_into(variables, allow)


def open_pretrained(source: str, *, backbone: str = 'resnet50') -> Pretrained:
  """Reads the weights of a source.

  Args:
    source: one of `files.SOURCES`.
    backbone: which one the source 'keras' stands for.

  Raises:
    UserError: if there is no such source, or it is damaged.
  """
  if source == 'keras':
    path = _published(backbone)
  elif source.startswith('hf://'):
    path = hub_file(source.removeprefix('hf://'))
  else:
    path = Path(source).expanduser()
  own = own_checkpoint(path)
  if own:
    return _open_own(source, *own)
  with unpacked(path) as file:
    kind = _KINDS[kind_of(file)]
    raw = kind.read(file)
  names = kind.map(raw)
  arrays = names.apply(raw)
  head = any(path.startswith('params/aspp/') for path in arrays)
  return Pretrained(
    source,
    names,
    arrays,
    kind.presets if not head else ('seed',),
    _settings(arrays),
  )


def _published(backbone: str) -> Path:
  if backbone not in PUBLISHED:
    raise UserError(
      f"'keras' has weights for {', '.join(PUBLISHED)}, not for"
      f' {backbone or "this network"}'
    )
  url, md5 = PUBLISHED[backbone]
  return download(
    [url],
    digest=f'md5:{md5}',
    advice='try again, or download it elsewhere and name the file instead',
  )


def _settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The arguments of `deeplab_v3` that show in the shapes."""
  settings = {}
  if backbone_of(arrays):
    settings['backbone'] = backbone_of(arrays)
  if 'params/backbone/stem/kernel' in arrays:
    channels = arrays['params/backbone/stem/kernel'].shape[-1]
    settings['width'] = channels / 64
  if 'params/aspp/project/conv/kernel' in arrays:
    channels = arrays['params/aspp/project/conv/kernel'].shape[-1]
    settings['aspp_features'] = channels
  return settings


def own_checkpoint(path: Path) -> tuple[Path, str] | None:
  """The workdir and the name of the step, if `path` is of this project."""
  if (path / 'checkpoints').is_dir():
    return path, 'best'
  if path.name == 'checkpoints' and path.is_dir():
    return path.parent, 'best'
  if path.parent.name == 'checkpoints' and path.is_dir():
    return path.parent.parent, path.name
  return None


def _open_own(source: str, workdir: Path, name: str) -> Pretrained:
  # Imported here: Orbax takes longer to import than all the rest.
  from deeplab_jax.weights.checkpoints import Checkpoints, preset_of

  with Checkpoints(workdir) as saved:
    step = saved.step_named(name)
    metadata = saved.metadata(step)
    arrays = flatten(saved.restore_variables(step))
  arrays = {path: np.asarray(array) for path, array in arrays.items()}
  model = metadata['model']
  settings = {key: model[key] for key in ('backbone', 'width', 'aspp_features')}
  for key in ('multi_grid', 'aspp_rates'):
    settings[key] = tuple(model[key])
  if model.get('bn_epsilon'):
    settings['bn_epsilon'] = model['bn_epsilon']
  return Pretrained(
    source,
    NameMap({path: path for path in arrays}),
    arrays,
    (preset_of(metadata),),
    settings,
    metadata['dataset'],
  )


class _Kind(NamedTuple):
  read: Callable[[Path], dict[str, np.ndarray]]
  map: Callable[[Iterable[str]], NameMap]
  presets: tuple[str, ...]


_KINDS = {
  'TensorFlow': _Kind(read_tf_slim, map_tf_slim, ('slim', 'seed')),
  'HDF5': _Kind(read_keras, map_keras, ('keras',)),
  'safetensors': _Kind(read_timm, map_timm, ('timm',)),
}
