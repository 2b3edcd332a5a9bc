"""Weights from any source: found, identified by their content, and merged."""

import contextlib
import dataclasses
import fnmatch
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.models.deeplab import PRESETS
from deeplab_jax.runtime import files as disk
from deeplab_jax.runtime.download import download
from deeplab_jax.runtime.errors import UserError, naming
from deeplab_jax.weights import hub, keras, mapping, torchvision
from deeplab_jax.weights.keras import map_keras, read_keras
from deeplab_jax.weights.mapping import MergeReport, NameMap, backbone_of
from deeplab_jax.weights.tf_slim import map_tf_slim, read_tf_slim
from deeplab_jax.weights.timm import map_timm, read_safetensors
from deeplab_jax.weights.torchvision import map_torchvision, read_torch

SOURCES = (
  "'keras', torchvision/NAME, hf://USER/NAME, a TF-slim checkpoint or its"
  ' .tar.gz, an .h5 of Keras, a .safetensors of timm, torchvision or VainF, a'
  ' .pth of the last two, or a workdir, a checkpoint or a published folder'
)
_CLASS_LAYER = '/logits/'
_STEM = 'params/backbone/stem/kernel'
_IMAGENET_STD = 57.7  # of values in 0..255, about the same for R, G and B


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """Weights of a source, by the names of this project."""

  source: str  # as it was named
  names: NameMap  # from its names to the paths of variables
  arrays: dict[str, np.ndarray]  # by path
  presets: tuple[str, ...]  # those that they fit, the first by default
  settings: dict[str, Any]  # arguments of `deeplab_v3` that they determine
  dataset: dict[str, Any] | None = None  # what the classes mean, if it is known
  use: dict[str, Any] | None = None  # output stride and dtype that it had

  @property
  def num_classes(self) -> int | None:
    """Channels of the class layer, None if there is none."""
    return _num_classes(self.arrays)

  def preset_for(self, asked: str) -> str:
    """Returns `asked` if it fits, the default for ''; else a `UserError`."""
    if asked and asked not in self.presets:
      raise UserError(
        f'{self.source} holds weights for the preset'
        f' {" or ".join(self.presets)}, which contradicts preset={asked}'
      )
    return asked or self.presets[0]

  def merge_into(
    self,
    variables: Mapping[str, Any],
    allow: Iterable[str] = (),
    scale: float = 1.0,
  ) -> tuple[dict[str, Any], MergeReport]:
    """Puts the weights in the place of a model's variables.

    The stem is fitted to the images by `mapping.adapt_stem`. See
    `load_pretrained` for the rest and what is returned and raised.
    """
    allow, leaves = tuple(allow), mapping.flatten(variables)
    ours, theirs = backbone_of(leaves), backbone_of(self.arrays)
    if theirs and ours != theirs:
      raise UserError(
        f'{self.source} looks like {theirs}, the network is'
        f' {ours or "another one"}; use backbone={theirs}'
      )
    arrays, unused, adapted = self.arrays, dict(self.names.unused), ''
    if _STEM in leaves and np.ndim(arrays.get(_STEM, ())) == 4:
      channels = leaves[_STEM].shape[2]
      stem, adapted = mapping.adapt_stem(arrays[_STEM], channels, scale)
      arrays = {**arrays, _STEM: stem}
    initial = dict.fromkeys(allow, 'allowed by name')
    if not any('/auxiliary/' in path for path in arrays):
      initial['*/auxiliary/*'] = 'the file has no auxiliary head'
    here, there = _num_classes(leaves), self.num_classes
    if all('/backbone/' in path for path in arrays):
      why = 'the file holds a backbone alone'
      initial |= {'*/aspp/*': why, '*/decoder/*': why, '*/logits/*': why}
    elif here != there:
      initial['*/logits/*'] = 'the file has other classes'
      arrays = {p: x for p, x in arrays.items() if _CLASS_LAYER not in p}
      why = f'class layer for {there} classes, the network has {here}'
      targets = self.names.targets
      unused |= {name: why for name in targets if _CLASS_LAYER in targets[name]}
    extra = [p for p in arrays if '/auxiliary/' in p and p not in leaves]
    arrays = {p: x for p, x in arrays.items() if p not in extra}
    unused |= dict.fromkeys(extra, 'the network has no auxiliary head')
    for pattern in allow:
      found = fnmatch.filter(self.names.unknown, pattern)
      unused |= dict.fromkeys(found, 'allowed by name')
    unknown = [name for name in self.names.unknown if name not in unused]
    try:
      merged, report = mapping.merge_variables(
        variables, arrays, initial=initial, unused=unused, unknown=unknown
      )
      return merged, dataclasses.replace(report, adapted=adapted)
    except UserError as error:
      raise UserError(f'{self.source}: {error}') from error


def input_std(preset: str, *, measured: bool) -> float:
  """The standard deviation of what a stem sees, about.

  It is 1 if images are normalized by their measured mean and std; else that of
  ImageNet under the preset.
  """
  return 1.0 if measured else _IMAGENET_STD / PRESETS[preset]['std'][0]


def _num_classes(leaves: Mapping[str, Any]) -> int | None:
  for leaf in ('bias', 'kernel'):
    if (x := leaves.get(f'params{_CLASS_LAYER}{leaf}')) is not None:
      return x.shape[-1] if x.ndim else 1
  return None


def load_pretrained(
  source: str,
  variables: Mapping[str, Any],
  *,
  preset: str = '',
  allow: Iterable[str] = (),
) -> tuple[dict[str, Any], MergeReport]:
  """Loads weights into the variables of a model, from `deeplab_v3(...).init`.

  The model must be built with the preset of the source, which the variables
  alone do not show: one of those of `Pretrained`, as 'keras' or 'torchvision'.
  Given as `preset`, it is checked.

  Args:
    source: one of `SOURCES`; 'keras' downloads Keras's ImageNet weights, and
      'torchvision/NAME' what torchvision publishes under a name.
    variables: `params` and `batch_stats`.
    preset: the preset that the model was built with.
    allow: patterns of names in the file that may fit nothing, and of paths of
      variables that may stay as initialized.

  Returns the variables as float32 numpy arrays where they were loaded, and a
  report. Raises `UserError` if the source cannot be read or does not fit.
  """
  backbone = backbone_of(mapping.flatten(variables))
  pretrained = open_pretrained(source, backbone=backbone)
  pretrained.preset_for(preset)
  return pretrained.merge_into(variables, allow)


def open_pretrained(source: str, *, backbone: str = 'resnet50') -> Pretrained:
  """Reads the weights of a source, one of `SOURCES`.

  'keras' means the Keras weights of `backbone`. Raises `UserError` if there is
  no such source, or it is damaged.
  """
  if source == 'keras':
    path = _published(keras.PUBLISHED, backbone, "'keras'", 'md5')
  elif source.startswith('torchvision/'):
    name = source.removeprefix('torchvision/')
    path = _published(torchvision.PUBLISHED, name, 'torchvision', 'sha256')
  elif source.startswith('hf://'):
    path = hub.fetch(source)
  else:
    path = disk.as_path(source)
  own = own_checkpoint(path)
  if disk.is_remote(path) and not own:
    raise UserError(f'init_from: {source} is no workdir; copy it to this disk')
  if own or hub.is_published(path):
    return _open_own(source, path, own)
  with unpacked(path) as file:
    read, map_names = _KINDS[kind_of(file)]
    raw = read(file)
  names = map_names(raw)
  with naming(source):
    arrays = names.apply(raw)
  settings = {**_settings(arrays), **names.settings}
  return Pretrained(source, names, arrays, names.presets, settings)


def _map_safetensors(names: Iterable[str]) -> NameMap:
  names = list(names)
  of_timm = any(re.match(r'(stem|stages)\.', name) for name in names)
  return (map_timm if of_timm else map_torchvision)(names)


# How to read each kind of file, and where its arrays go.
_KINDS = {
  'TensorFlow': (read_tf_slim, map_tf_slim),
  'HDF5': (read_keras, map_keras),
  'safetensors': (read_safetensors, _map_safetensors),
  'PyTorch': (read_torch, map_torchvision),
}


def _published(
  files: Mapping[str, tuple[str, str]], name: str, whose: str, kind: str
) -> Path:
  if name not in files:
    raise UserError(
      f'{whose} has weights for {", ".join(files)}, not for'
      f' {name or "this network"}'
    )
  url, digest = files[name]
  return download(
    [url],
    digest=f'{kind}:{digest}',
    advice='try again, or download it elsewhere and name the file instead',
  )


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
  """Yields the file of the arrays: from a tar file, or `path` itself.

  Any file of a TensorFlow checkpoint of version 2 stands for the checkpoint.
  Raises `UserError` unless an archive is safe and holds one checkpoint.
  """
  part = re.fullmatch(r'(.+)\.(index|meta|data-\d+-of-\d+)', path.name)
  if part and path.with_name(f'{part[1]}.index').is_file():
    path = path.with_name(part[1])
  head = _ends(path)[0] if path.is_file() else b''
  if not (head.startswith(b'\x1f\x8b') or head[257:262] == b'ustar'):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    with disk.reading_archive(path), tarfile.open(path) as tar:
      regular = filter(tarfile.TarInfo.isfile, tar)
      try:
        tar.extractall(folder, regular, filter='data')
      except tarfile.FilterError as error:
        raise UserError(f'{path} is refused: {error}') from error
    files = [x for x in sorted(Path(folder).rglob('*')) if x.is_file()]
    found = [x.with_suffix('') for x in files if x.suffix == '.index']
    found = found or [x for x in files if x.suffix == '.ckpt']
    if len(found) != 1:
      raise UserError(
        f'{path} should hold one checkpoint (.ckpt, or .index and .data), found'
        f' {", ".join(x.name for x in found) or "none"}'
      )
    yield found[0]


def _ends(path: Path) -> tuple[bytes, bytes]:
  """Returns the first 512 bytes of a file, and the last 8."""
  try:
    with path.open('rb') as file:
      head = file.read(512)
      file.seek(max(0, path.stat().st_size - 8))
      return head, file.read()
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error


# Last bytes of a TensorFlow checkpoint of version 1, and of an index.
_TABLE = bytes.fromhex('57fb808b247547db')

# First bytes of what `torch.save` writes, now and before 2020; the second is
# its magic number as a pickle.
_TORCH = b'PK', b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'

# Why a file is refused, by its first bytes.
_REFUSED = {
  b'': 'is empty',
  b'PK': 'is a zip file of no known kind; of new Keras, save it as .h5',
  b'\x80': 'is a pickle, which can run anything when it is opened, and is'
  ' refused unseen. Save it as safetensors',
  b'\x93NUMPY': 'is a single array',
  b'<': 'is a web page, not a download',
  b'version https://git-lfs': 'is a git-lfs pointer; fetch the file itself',
}


def kind_of(path: Path) -> str:
  """Returns a key of `_KINDS`, else raises `UserError`."""
  if path.with_name(f'{path.name}.index').is_file():
    return 'TensorFlow'
  if path.is_dir():
    raise UserError(f'{path} is a folder without checkpoints of this project')
  if not path.exists():
    raise UserError(
      f'init_from: no file {path}{disk.near_file(path)}; it may be {SOURCES}'
    )
  head, end = _ends(path)
  if head.startswith(b'\x89HDF\r\n\x1a\n'):
    return 'HDF5'
  if head[8:9] == b'{':
    return 'safetensors'
  if end == _TABLE:
    return 'TensorFlow'
  if head.startswith(_TORCH) and (head[:2] != b'PK' or b'data.pkl' in head):
    return 'PyTorch'
  for start, reason in _REFUSED.items():
    if head.startswith(start) and (start or not head):
      raise UserError(f'{path} {reason}')
  raise UserError(
    f'{path} is truncated or of no known kind; it may be {SOURCES}'
  )


def _settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the arguments of `deeplab_v3` that show in the shapes."""
  settings: dict[str, Any] = {}
  if backbone := backbone_of(arrays):
    settings['backbone'] = backbone
  if stem := np.shape(arrays.get(_STEM, 0)):
    settings['width'] = stem[-1] / 64
  if aspp := np.shape(arrays.get('params/aspp/project/conv/kernel', 0)):
    settings['aspp_features'] = aspp[-1]
  return settings


def own_checkpoint(path: Path) -> tuple[Path, str] | None:
  """Returns (workdir, name of the step) for a workdir, or a folder in it."""
  if (path / 'checkpoints').is_dir():
    return path, 'best'
  if hub.is_published(path):
    return None
  if path.name == 'checkpoints' and path.is_dir():
    return path.parent, 'best'
  if path.parent.name == 'checkpoints' and path.is_dir():
    return path.parent.parent, path.name
  return None


def _open_own(source: str, path: Path, own: Any) -> Pretrained:
  # Imported here: Orbax takes longer to import than all the rest.
  from deeplab_jax.weights import networks

  metadata, arrays = networks.read(*own) if own else hub.read(path)
  settings = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in metadata['model'].items()
    if key in networks.SHAPING or (key == 'bn_epsilon' and value)
  }
  keys = 'output_stride', 'dtype'  # old checkpoints may lack one
  use = {k: v for k, v in metadata['model'].items() if k in keys}
  names = NameMap({path: path for path in arrays})
  presets, dataset = (networks.preset_of(metadata),), metadata['dataset']
  return Pretrained(source, names, arrays, presets, settings, dataset, use)
