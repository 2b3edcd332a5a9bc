"""From the names of a file to the variables of this project, strictly.

Variables go by their path, `params/backbone/block1/unit1/conv1/kernel`. Every
array of a file finds its place or is known not to have one, and every variable
gets its array or is allowed to stay as initialised: the rest is an error.
"""

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import jax
import numpy as np

from deeplab_jax.runtime.errors import UserError

# Names shown in full in an error or a report.
_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class NameMap:
  """Where the arrays of a file go.

  Attributes:
    targets: the path of the variable, by name in the file.
    unused: why it has no place here, by name in the file.
    unknown: names that fit nothing.
    kernels: axes of the file's convolution kernels, 'HWIO' or 'OIHW'.
  """

  targets: dict[str, str]
  unused: dict[str, str] = dataclasses.field(default_factory=dict)
  unknown: tuple[str, ...] = ()
  kernels: str = 'HWIO'

  @classmethod
  def build(
    cls,
    names: Iterable[str],
    target: Callable[[str], str | None],
    unused: Mapping[str, str],
    kernels: str = 'HWIO',
  ) -> 'NameMap':
    """Sorts the names of a file.

    Args:
      names: of its arrays.
      target: gives the path for a name, None if there is none.
      unused: reasons by regular expression that the name must match in full.
      kernels: see the attribute.
    """
    targets, idle, unknown = {}, {}, []
    for name in sorted(names):
      reasons = [
        why for form, why in unused.items() if re.fullmatch(form, name)
      ]
      path = target(name)
      if reasons:
        idle[name] = reasons[0]
      elif path is None:
        unknown.append(name)
      else:
        targets[name] = path
    return cls(targets, idle, tuple(unknown), kernels)

  def apply(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that have a place, by path, with kernels as HWIO.

    Raises:
      UserError: where two names go to one path.
    """
    placed = {}
    for name, path in self.targets.items():
      if path in placed:
        raise UserError(f'{name} and another array both go to {path}')
      array = np.asarray(arrays[name])
      if self.kernels == 'OIHW' and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
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
  """What a merge did.

  Attributes:
    loaded: paths of the variables that were read.
    initial: why it stayed as initialised, by path.
    unused: why it was not used, by name in the file.
  """

  loaded: tuple[str, ...]
  initial: dict[str, str]
  unused: dict[str, str]

  def __str__(self) -> str:
    lines = [f'loaded: {_arrays(self.loaded)}']
    for title, reasons, depth in (
      ('kept at the initial value', self.initial, 3),
      ('not used', self.unused, None),
    ):
      if not reasons:
        lines.append(f'{title}: nothing')
      for reason, names in _by_reason(reasons).items():
        shown = _shorten(names) if depth is None else _modules(names, depth)
        lines.append(f'{title}: {_arrays(names)} ({reason}): {shown}')
    return '\n'.join(lines)


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
  groups = collections.defaultdict(list)
  for name, reason in reasons.items():
    groups[reason].append(name)
  return groups


def _modules(paths: Iterable[str], depth: int) -> str:
  """The modules that hold the paths, without their collections."""
  return ', '.join(
    sorted({'/'.join(path.split('/')[1:depth]) for path in paths})
  )


def _shorten(names: Iterable[str]) -> str:
  names = list(names)
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + more


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of a tree of dicts by path, `params/backbone/stem/kernel`."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {'/'.join(key.key for key in path): leaf for path, leaf in leaves}


def merge_variables(
  variables: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
  *,
  initial: Mapping[str, str],
  names: NameMap,
) -> tuple[dict[str, Any], MergeReport]:
  """Puts arrays in the places of the variables, each of which is covered once.

  Args:
    variables: tree of a model, `params` and `batch_stats`.
    arrays: by path, as from `NameMap.apply`.
    initial: why a variable may stay as it is, by pattern of its path
      (`params/aspp/*`); the first that fits counts.
    names: the map that gave the arrays, for the report.

  Returns:
    A new tree of float32 numpy arrays, and the report.

  Raises:
    UserError: listing names in the file that fit nothing, variables that
      nothing covers, and arrays of another shape or type, or not finite.
  """
  leaves = flatten(variables)
  kept = {}
  for path in leaves:
    for pattern, reason in initial.items():
      if path not in arrays and fnmatch.fnmatchcase(path, pattern):
        kept.setdefault(path, reason)
  _check(
    'without a place in the network',
    [*names.unknown, *(path for path in arrays if path not in leaves)],
  )
  _check(
    'missing in the file',
    [path for path in leaves if path not in arrays and path not in kept],
  )
  _check(
    'of another shape',
    [
      f'{path} is {array.shape} in the file and {leaves[path].shape} here'
      for path, array in arrays.items()
      if array.shape != leaves[path].shape
    ],
  )
  values = {path: _float32(path, array) for path, array in arrays.items()}
  _check(
    'not finite',
    [path for path, array in values.items() if not np.isfinite(array).all()],
  )
  merged = jax.tree_util.tree_map_with_path(
    lambda path, leaf: values.get('/'.join(key.key for key in path), leaf),
    dict(variables),
  )
  return merged, MergeReport(tuple(values), kept, names.unused)


def _check(what: str, culprits: list[str]) -> None:
  if culprits:
    raise UserError(f'{_arrays(culprits)} {what}: {_shorten(culprits)}')


def _arrays(names: Sized) -> str:
  return f'{len(names)} array{"" if len(names) == 1 else "s"}'


def _float32(path: str, array: np.ndarray) -> np.ndarray:
  if not jax.dtypes.issubdtype(array.dtype, np.floating):
    raise UserError(f'{path} holds {array.dtype}, not floating-point numbers')
  with np.errstate(over='ignore'):  # becomes infinite, which is refused
    return np.ascontiguousarray(array, np.float32)


# Units in the four blocks, and whether they are bottlenecks, as in
# `models.resnet.BACKBONES`.
_BACKBONES = {
  ((2, 2, 2, 2), False): 'resnet18',
  ((3, 4, 6, 3), False): 'resnet34',
  ((3, 4, 6, 3), True): 'resnet50',
  ((3, 4, 23, 3), True): 'resnet101',
  ((3, 8, 36, 3), True): 'resnet152',
  ((3, 24, 36, 3), True): 'resnet200',
}


def backbone_of(paths: Iterable[str]) -> str:
  """Which backbone variables of these paths are, '' if it is none of them."""
  units = collections.defaultdict(set)
  bottleneck = False
  for path in paths:
    found = re.match(r'params/backbone/block(\d)/unit(\d+)/(.*)', path)
    if found:
      units[int(found[1])].add(int(found[2]))
      bottleneck = bottleneck or found[3] == 'conv3/kernel'
  counts = tuple(len(units[block]) for block in (1, 2, 3, 4))
  return _BACKBONES.get((counts, bottleneck), '')
