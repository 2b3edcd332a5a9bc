"""From the names in a file to the variables of this project, strictly.

Variables go by their path, `params/backbone/block1/unit1/conv1/kernel`. Every
array in a file finds its place or is known to have none, and every variable
gets its array or is allowed to stay as initialized. Anything else is an error.
"""

import collections
import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from deeplab_jax.models.resnet import BACKBONES
from deeplab_jax.runtime.errors import UserError

_JOINED = 'params/aspp/project/conv/kernel'
_SHOWN = 6  # names shown in an error or a report; more are counted

# Where an array of a module belongs, by the last part of its name in a file.
_LEAVES = {
  'weights': 'params/{}/kernel',
  'kernel': 'params/{}/kernel',
  'biases': 'params/{}/bias',
  'bias': 'params/{}/bias',
  'gamma': 'params/{}/scale',
  'beta': 'params/{}/bias',
  'moving_mean': 'batch_stats/{}/mean',
  'moving_variance': 'batch_stats/{}/var',
  'running_mean': 'batch_stats/{}/mean',
  'running_var': 'batch_stats/{}/var',
}

# The leaves of a tree of dicts by path.
flatten = functools.partial(traverse_util.flatten_dict, sep='/')


@dataclasses.dataclass(frozen=True)
class NameMap:
  """Where the arrays of a file go, by their names in it."""

  targets: dict[str, str]  # the path of the variable
  unused: dict[str, str] = dataclasses.field(default_factory=dict)  # and why
  unknown: tuple[str, ...] = ()  # names that fit nothing
  presets: tuple[str, ...] = ()  # those that they fit, the first by default
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  kernels: str = 'HWIO'  # axes of the file's convolution kernels, or 'OIHW'
  pooling_last: bool = False  # whether its ASPP joins image pooling last

  @classmethod
  def build(
    cls,
    names: Iterable[str],
    target: Callable[[str], tuple[str, str]],
    unused: Mapping[str, str],
    presets: tuple[str, ...],
    settings: Mapping[str, Any] | None = None,
    **of_file: Any,
  ) -> 'NameMap':
    """Sorts the names of a file, which fix `presets` and `settings`.

    `target` divides a name into the module of this project, '' for none, and
    the last part, a key of `_LEAVES`. `unused` gives reasons by a regular
    expression that the name must match in full.
    """
    targets, idle, unknown = {}, {}, []
    for name in sorted(names):
      module, leaf = target(name)
      reasons = [w for form, w in unused.items() if re.fullmatch(form, name)]
      if reasons:
        idle[name] = reasons[0]
      elif module and leaf in _LEAVES:
        targets[name] = _LEAVES[leaf].format(module)
      else:
        unknown.append(name)
    fixed = tuple(unknown), presets, settings or {}
    return cls(targets, idle, *fixed, **of_file)

  def apply(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays by path, kernels as HWIO; two for one are refused."""
    placed = {}
    for name, path in self.targets.items():
      if path in placed:
        raise ValueError(f'{name} and another array both go to {path}')
      array = np.asarray(arrays[name])
      if self.kernels == 'OIHW' and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        if self.pooling_last and path == _JOINED:
          array = np.roll(array, array.shape[3], axis=2)
      placed[path] = array
    return placed

  def __str__(self) -> str:
    """A line for each name: where it goes, or why it goes nowhere."""
    lines = [f'{name} -> {path}' for name, path in self.targets.items()]
    lines += [f'{name} -- not used: {why}' for name, why in self.unused.items()]
    lines += [f'{name} -- fits nothing' for name in self.unknown]
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """What a merge did; as text, in lines for a person."""

  loaded: tuple[str, ...]  # paths of the variables that were read
  initial: dict[str, str]  # why a variable stayed as initialized, by path
  unused: dict[str, str]  # why an array was not used, by name in the file
  adapted: str = ''  # what was changed in the stem

  def __str__(self) -> str:
    lines = [f'loaded: {_arrays(self.loaded)}']
    for title, reasons, show in (
      ('kept at the initial value', self.initial, _modules),
      ('not used', self.unused, _shorten),
    ):
      groups = collections.defaultdict(list)
      for name, reason in reasons.items():
        groups[reason].append(name)
      lines += [
        f'{title}: {_arrays(names)} ({reason}): {show(names)}'
        for reason, names in groups.items()
      ] or [f'{title}: nothing']
    lines += [f'adapted: {self.adapted}'] * bool(self.adapted)
    return '\n'.join(lines)


def _modules(paths: list[str]) -> str:
  return ', '.join(sorted({'/'.join(path.split('/')[1:3]) for path in paths}))


def _shorten(names: list[str]) -> str:
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + more


def _arrays(names: Sized) -> str:
  return f'{len(names)} array{"" if len(names) == 1 else "s"}'


def merge_variables(
  variables: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
  *,
  initial: Mapping[str, str],
  unused: dict[str, str] | None = None,
  unknown: Sequence[str] = (),
) -> tuple[dict[str, Any], MergeReport]:
  """Puts arrays in the places of the variables; each must be covered once.

  The `arrays` go by path, as from `NameMap.apply`. `initial` says why a
  variable may stay as it is, by pattern of its path (`params/aspp/*`); the
  first that fits counts. `unused` and `unknown` are those of `NameMap`: the
  first are reported.

  Returns a new tree of float32 numpy arrays, and the report. Raises `UserError`
  listing `unknown` names, variables that nothing covers, and arrays of another
  shape or type, not finite, or variances below zero.
  """
  leaves, kept, missing = flatten(variables), {}, []
  for path in (path for path in leaves if path not in arrays):
    reasons = [initial[p] for p in initial if fnmatch.fnmatchcase(path, p)]
    if reasons:
      kept[path] = reasons[0]
    else:
      missing.append(path)
  unplaced = [*unknown, *(path for path in arrays if path not in leaves)]
  _refuse('without a place in the network', unplaced)
  _refuse('missing in the file', missing)
  misshapen = [
    f'{path} is {array.shape} in the file and {leaves[path].shape} here'
    for path, array in arrays.items()
    if array.shape != leaves[path].shape
  ]
  _refuse('of another shape', misshapen)
  values = {path: _float32(path, array) for path, array in arrays.items()}
  infinite = [path for path, x in values.items() if not np.isfinite(x).all()]
  _refuse('not finite', infinite)
  variances = {p: x for p, x in values.items() if p.endswith('/var')}
  _refuse('below zero', [p for p, x in variances.items() if (x < 0).any()])
  merged = traverse_util.unflatten_dict({**leaves, **values}, sep='/')
  return merged, MergeReport(tuple(values), kept, unused or {})


def adapt_stem(
  kernel: np.ndarray, channels: int, scale: float
) -> tuple[np.ndarray, str]:
  """Fits kernels [k, k, 3, F] of RGB to images of other channels.

  For one channel they are summed, as if gray were seen as RGB. For others they
  are repeated in turn, times 3 / channels, so that the outputs keep their size:
  `adapt_input_conv` of timm (Wightman, "PyTorch Image Models", 2019). All are
  multiplied by `scale`. Returns the kernels, and what was done; '' for nothing.
  """
  have = kernel.shape[2]
  if (have, scale) == (channels, 1.0):
    return kernel, ''
  kernel = np.asarray(kernel, np.float32)
  if have == 3 and channels == 1:
    kernel = kernel.sum(2, keepdims=True)
  elif have == 3:
    kernel = kernel[:, :, np.arange(channels) % 3] * (3 / channels)
  done = f'the stem, from {have} to {channels} channels, times {scale:.4g}'
  return kernel * np.float32(scale), done


def _refuse(what: str, culprits: list[str]) -> None:
  if culprits:
    raise UserError(f'{_arrays(culprits)} {what}: {_shorten(culprits)}')


def _float32(path: str, array: np.ndarray) -> np.ndarray:
  if not jax.dtypes.issubdtype(array.dtype, np.floating):  # knows bfloat16
    raise UserError(f'{path} holds {array.dtype}, not floating-point numbers')
  with np.errstate(over='ignore'):  # becomes infinite, which is refused
    return np.ascontiguousarray(array, np.float32)


def backbone_of(paths: Iterable[str]) -> str:
  """Returns the backbone that has variables of these paths, '' if unknown."""
  paths = [p for p in paths if p.startswith('params/backbone/block')]
  units = {tuple(path.split('/')[2:4]) for path in paths}
  layers = 3 if any(path.endswith('/conv3/kernel') for path in paths) else 2
  # A ResNet is named after its layers: those of the units, stem and classifier.
  name = f'resnet{layers * len(units) + 2}'
  name += '' if any('/preact/' in path for path in paths) else '_v1'
  return name if name in BACKBONES else ''
