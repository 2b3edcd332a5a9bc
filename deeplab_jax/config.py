"""The embedded default configuration, and checks of any other.

The default trains a small network on generated scenes within minutes on a
laptop, so that every part can be seen at work without a data set. The recipes
in `experiments/` change what they need.
"""

import copy
import difflib
import functools
import json
import math
import os
import re
import runpy
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import near_file

MEDIAN_FREQUENCY = 'median_frequency'


def get_config() -> ml_collections.ConfigDict:
  """Returns the default configuration, locked against new keys."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Weights to start from, see `weights.files.SOURCES`; '' for random ones.
  config.init_from = ''
  # Patterns of arrays that may fit nothing or stay as they are, by commas.
  config.init_allow = ''
  config.list = False  # --mode=import prints where arrays go, and ends

  # The arguments of `deeplab_v3`; the data set gives the number of classes.
  config.model = ml_collections.ConfigDict()
  # A key of `PRESETS`; '' for that of init_from, of the checkpoint, or 'paper'.
  config.model.preset = ''
  config.model.backbone = 'resnet18'
  config.model.width = 0.25
  config.model.output_stride = 8
  config.model.multi_grid = (1, 2, 4)
  config.model.aspp_rates = (6, 12, 18)
  config.model.aspp_features = 64
  config.model.bn_decay = 0.97
  config.model.bn_epsilon = 0.0  # 0 for that of the preset
  config.model.dtype = 'float32'
  # 'none', 'elementwise' or 'block' is computed again in the backward pass, to
  # save memory; '' for what suits the device.
  config.model.rematerialization = ''

  config.data = ml_collections.ConfigDict()
  config.data.name = 'shapes'  # or another key of `data.load.LOADERS`
  config.data.dir = ''  # the source on this disk, for data sets that have one
  config.data.prepared_dir = ''  # prepared records; '' for the TFDS default
  config.data.train_split = 'train'
  config.data.eval_split = 'val'  # '' to train without evaluation
  # Of 'voc2012_segmentation/list': a text file of the ids to train on, and the
  # share of them that is held out as the split 'holdout'.
  config.data.list = ''
  config.data.holdout = 0.1
  # Label value of void in the files; where it is a line of classes.txt, that
  # line names no class.
  config.data.ignore_label = 255
  # Of 'folder', what values in the label files stand for: pairs by commas, as
  # '255:1' or '0:void,1:0'; others stay.
  config.data.label_map = ''
  config.data.on_bad_image = 'stop'  # or 'skip'
  config.data.scale = (0.5, 2.0)
  config.data.crop_size = (129, 129)  # height, width
  config.data.flip = 0.5  # probability
  # Strength of brightness, contrast, saturation and hue.
  config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)
  config.data.threads = 0  # that load; 0 for one a core, at most 16
  config.data.workers = 0  # loader processes beside the threads

  config.train = ml_collections.ConfigDict()
  config.train.steps = 300
  config.train.batch_size = 8  # over all devices
  config.train.log_every = 20
  config.train.eval_every = 150  # evaluates and saves
  config.train.sync_bn = True  # batch statistics over all devices
  config.train.freeze_bn = False  # keep the batch statistics as loaded

  config.loss = ml_collections.ConfigDict()
  # Numbers by commas, one a class, or 'median_frequency'; '' for equal ones.
  config.loss.class_weights = ''
  config.loss.hardest = 1.0  # share of each image's pixels, the hardest
  config.loss.label_smoothing = 0.0

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = 'sgd'  # or 'adam'
  config.optimizer.learning_rate = 0.1
  config.optimizer.power = 0.9
  config.optimizer.warmup_steps = 0
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.head_multiplier = 1.0
  config.optimizer.clip_norm = 0.0  # 0 for no clipping

  config.eval = ml_collections.ConfigDict()
  config.eval.step = 'best'  # 'best', 'latest' or a number
  config.eval.batch_size = 8  # over all devices
  config.eval.panels = 8  # images in the picture of each evaluation
  # 'whole', 'center_crop' or 'sliding_window', see README
  config.eval.protocol = 'whole'
  config.eval.buckets = 4  # sizes to pad to, each compiled once
  config.eval.crop_size = (513, 513)  # height, width of crop or window
  config.eval.overlap = 1 / 3  # share of a window that the next one covers
  config.eval.scales = (1.0,)  # probabilities are averaged over them
  config.eval.flip = False  # and over the mirrored image
  config.eval.worst_and_best = 4  # images in each of these two pictures
  config.eval.save_predictions = False  # writes an archive beside the measures

  config.predict = ml_collections.ConfigDict()
  config.predict.output_dir = ''  # '' for WORKDIR/predictions
  return config.lock()


_FLOAT32_MAX = 3.4028234663852886e38
_INT32_MAX = 2**31 - 1

_Rule = tuple[str, Callable[[Any], bool]]

_ABOVE_0: _Rule = 'above 0', lambda x: x > 0
_FROM_0: _Rule = 'at least 0', lambda x: x >= 0
_FROM_1: _Rule = 'at least 1', lambda x: x >= 1
_FRACTION: _Rule = 'in [0, 1)', lambda x: 0 <= x < 1
_RATES: _Rule = (
  'a tuple of numbers from 1',
  lambda x: len(x) > 0 and min(x) >= 1,
)


def _one_of(*values: Any) -> _Rule:
  return ' or '.join(map(str, values)), lambda x: x in values


def _are_weights(text: str) -> bool:
  if text in ('', MEDIAN_FREQUENCY):
    return True
  try:
    weights = parse_numbers(text)
  except ValueError:
    return False
  return all(0 <= x <= _FLOAT32_MAX for x in weights) and any(weights)


# What the value of a key must be, in words and as a test.
_RULES: dict[str, _Rule] = {
  'seed': ('in 0..2^32 - 1', lambda x: 0 <= x < 2**32),
  'model.width': (
    'above 1/128, which leaves at least one of 64 channels',
    lambda x: x > 0 and round(64 * x) >= 1,
  ),
  'model.output_stride': _one_of(8, 16, 32),
  'model.multi_grid': _RATES,
  'model.aspp_rates': _RATES,
  'model.aspp_features': _ABOVE_0,
  'model.bn_decay': _FRACTION,
  'model.bn_epsilon': _FROM_0,
  'model.dtype': _one_of('float32', 'bfloat16'),
  'model.rematerialization': _one_of('none', 'elementwise', 'block', ''),
  'data.train_split': ('the name of a split', bool),
  'data.holdout': _FRACTION,
  'data.ignore_label': ('in 0..255', lambda x: 0 <= x <= 255),
  'data.on_bad_image': _one_of('stop', 'skip'),
  'data.scale': (
    '(smallest, largest), above 0 and at most 2^31 - 1',
    lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= _INT32_MAX,
  ),
  'data.crop_size': (
    '(height, width), from 1',
    lambda x: len(x) == 2 and min(x) >= 1,
  ),
  'data.flip': ('a probability', lambda x: 0 <= x <= 1),
  'data.color_jitter': (
    'four strengths from 0, the last (hue) up to 0.5',
    lambda x: len(x) == 4 and min(x) >= 0 and x[3] <= 0.5,
  ),
  'data.threads': _FROM_0,
  'data.workers': _FROM_0,
  'train.steps': (
    'in 1..2^31 - 1, which an int32 counts',
    lambda x: 1 <= x <= _INT32_MAX,
  ),
  'train.batch_size': _FROM_1,
  'train.log_every': _FROM_1,
  'train.eval_every': _FROM_1,
  'loss.class_weights': (
    f"numbers from 0 by commas, one a class, '{MEDIAN_FREQUENCY}' or ''",
    _are_weights,
  ),
  'loss.hardest': ('in (0, 1]', lambda x: 0 < x <= 1),
  'loss.label_smoothing': _FRACTION,
  'optimizer.name': _one_of('sgd', 'adam'),
  'optimizer.learning_rate': _ABOVE_0,
  'optimizer.power': _FROM_0,
  'optimizer.warmup_steps': _FROM_0,
  'optimizer.momentum': _FRACTION,
  'optimizer.weight_decay': _FROM_0,
  'optimizer.head_multiplier': _FROM_0,
  'optimizer.clip_norm': _FROM_0,
  'eval.step': (
    'best, latest or a number',
    lambda x: x in ('best', 'latest') or x.isdecimal(),
  ),
  'eval.batch_size': _FROM_1,
  'eval.panels': _FROM_0,
  'eval.protocol': _one_of('whole', 'center_crop', 'sliding_window'),
  'eval.buckets': _FROM_1,
  'eval.crop_size': (
    '(height, width), from 1',
    lambda x: len(x) == 2 and min(x) >= 1,
  ),
  'eval.overlap': _FRACTION,
  'eval.scales': (
    'a tuple of numbers above 0, at most 4',
    lambda x: len(x) > 0 and min(x) > 0 and max(x) <= 4,
  ),
  'eval.worst_and_best': _FROM_0,
}


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks structure, types and ranges.

  Raises:
    UserError: naming the key and its value.
  """
  _check_structure(config, get_config(), 'config')
  for key, (what, holds) in _RULES.items():
    value = value_of(config, key)
    if not holds(value):
      raise UserError(f'config.{key} must be {what}, got {value!r}')
  if config.data.dir and config.data.name == 'shapes':
    raise UserError(
      f'config.data.dir={config.data.dir} is not used by generated data,'
      ' config.data.name=shapes; set config.data.name=folder'
    )
  crop_size, stride = config.data.crop_size, config.model.output_stride
  if min(crop_size) < stride:
    raise UserError(
      f'config.data.crop_size={crop_size} must be at least one cell of the'
      f' feature map: config.model.output_stride={stride} pixels'
    )


def check_machine(
  config: ml_collections.ConfigDict,
  mode: str,
  *,
  memory: int | None = None,
  threads: int | None = None,
  hosts: int = 1,
) -> None:
  """Refuses what cannot fit into this machine, before anything is started.

  Every estimate is a lower bound: what is not refused may still be too much.

  Args:
    config: valid by itself.
    mode: of the command, whose settings alone are looked at.
    memory: bytes of the machine and its accelerators; None where unknown.
    threads: the most that a process may have; None where unknown.
    hosts: machines that share each batch.

  Raises:
    UserError: naming settings, what they take and what there is.
  """
  loads = mode in ('train', 'eval')
  if loads and threads is not None and config.data.threads > threads:
    raise UserError(
      f'config.data.threads={config.data.threads}: a process has at most'
      f' {threads} threads on this machine'
    )
  for what, keys, estimate in _least_memory(config, mode, hosts):
    if memory is not None and estimate > memory:
      raise UserError(
        f'{_shown(config, keys)}: {what} take at least {_gigabytes(estimate)},'
        f' and this machine has {_gigabytes(memory)} of memory'
      )


# What a thread and a process that load images have of their own, in bytes:
# the stack's first pages here and in the kernel; Python and its libraries.
_THREAD = 2**15
_PROCESS = 2**26


def _least_memory(
  config: ml_collections.ConfigDict, mode: str, hosts: int
) -> Iterator[tuple[str, tuple[str, ...], int]]:
  """Yields what takes memory, by which settings, and the least bytes."""
  model, data = config.model, config.data
  number = 2 if model.dtype == 'bfloat16' else 4
  base, rates = round(64 * model.width), len(model.aspp_rates)

  # The two 3x3 kernels at least of the last block, whatever the backbone, and
  # those of the ASPP, its branches and what joins them. Training also holds a
  # gradient and a momentum of each parameter.
  last, features = 8 * base, model.aspp_features
  count = 2 * 9 * last**2
  count += rates * 9 * last * features + (rates + 2) * features**2
  yield (
    'the parameters',
    ('model.width', 'model.aspp_features'),
    4 * count * (3 if mode == 'train' else 1),
  )
  # A convolution reaches `rate` cells to each side. Where no map of that size
  # fits, at one number a cell, eight of its nine taps would only see zeros. A
  # rate is halved at most, at output stride 32.
  widest = max(max(model.aspp_rates) // 2, max(model.multi_grid))
  yield (
    'maps as large as an atrous convolution reaches',
    ('model.aspp_rates', 'model.multi_grid'),
    number * (1 + 2 * widest) ** 2,
  )
  processes, threads = max(data.workers, 1), max(data.threads, 1)
  if mode == 'train':
    yield (
      'the threads and processes that load images',
      ('data.threads', 'data.workers'),
      processes * threads * _THREAD + data.workers * _PROCESS,
    )
    pixels = -(-config.train.batch_size // hosts) * math.prod(data.crop_size)
    # Image and label in bytes, a batch in each thread and one in the step.
    yield (
      'the loaded batches',
      ('train.batch_size', 'data.crop_size', 'data.threads', 'data.workers'),
      4 * pixels * (processes * threads + 1),
    )
    # The image in numbers, and the stem's map, of half its height and width.
    yield (
      'the first maps of the network',
      ('train.batch_size', 'data.crop_size', 'model.width'),
      number * pixels * (3 * 4 + base) // 4,
    )
  if mode == 'eval' or (mode == 'train' and data.eval_split):
    rows = -(-config.eval.batch_size // hosts)
    # As above where images are cut. Whole, they have a pixel at least, and
    # that a cell of the ASPP's branches.
    cut = config.eval.protocol != 'whole'
    pixels = rows * (math.prod(config.eval.crop_size) if cut else 1)
    yield (
      'the batches of evaluation',
      ('eval.batch_size', *(['eval.crop_size'] if cut else [])),
      pixels * (4 + 3 * number) + rows * (rates + 2) * features * number,
    )


def _shown(config: ml_collections.ConfigDict, keys: Sequence[str]) -> str:
  """Those settings that are not the default, or all if they are."""
  default = get_config()
  changed = [k for k in keys if value_of(config, k) != value_of(default, k)]
  return ', '.join(
    f'config.{key}={value_of(config, key)}' for key in changed or keys
  )


def _gigabytes(count: int) -> str:
  value = min(count, 10**300) / 1e9  # larger ones are no float
  return f'{value:,.1f} GB' if value < 1e9 else f'{value:.0e} GB'


# What names a file or folder, and values of each that do not.
_PATHS = {
  'data.dir': r'',
  'data.list': r'',
  'data.prepared_dir': r'|\w+://.*',
  'init_from': r'|keras|\w+://.*',
  'predict.output_dir': r'',
}


def make_paths_absolute(
  config: ml_collections.ConfigDict, keys: Collection[str] | None = None
) -> None:
  """Lets paths mean the same in any folder, in place.

  Args:
    config: changed in place.
    keys: of the settings to change; None for all that name files or folders.
  """
  for key, no_path in _PATHS.items():
    value = value_of(config, key)
    wanted = keys is None or key in keys
    if wanted and not re.fullmatch(no_path, value):
      path = os.path.abspath(os.path.expanduser(value))
      config.update_from_flattened_dict({key: path})


def parse_numbers(text: str) -> list[float]:
  """Reads numbers by commas; raises `ValueError` for anything else."""
  return [float(number) for number in text.split(',')]


def with_preset(
  config: ml_collections.ConfigDict, preset: str
) -> ml_collections.ConfigDict:
  """A copy in which `preset` stands where `model.preset` is empty."""
  config = copy.deepcopy(config)
  config.model.preset = config.model.preset or preset
  return config


def value_of(config: ml_collections.ConfigDict, key: str) -> Any:
  """The value of a key that there is, as 'train.steps'."""
  return functools.reduce(
    lambda section, name: section[name], key.split('.'), config
  )


def all_keys() -> list[str]:
  """The keys of all settings, as 'train.steps'."""
  return list(flatten_dict(get_config().to_dict(), sep='.'))


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """The one of `names` that is most like a misspelt one; '' if none is."""
  return next(iter(difflib.get_close_matches(name, names, 1)), '')


def check_key(key: str) -> None:
  """Raises `UserError` unless there is a setting `key`, as 'train.steps'."""
  section, path = get_config(), 'config'
  for name in key.split('.'):
    if not isinstance(section, ml_collections.ConfigDict):
      raise UserError(f'unknown key config.{key}; {path} is no section')
    _check_name(section, name, path, key)
    section, path = section[name], f'{path}.{name}'


def _check_name(
  section: ml_collections.ConfigDict, name: str, path: str, key: str
) -> None:
  """Raises unless the section at `path` has `name`, as it has to for `key`."""
  if name not in section:
    near = did_you_mean(key, all_keys())
    hint = f'did you mean config.{near}? ' if near else ''
    raise UserError(
      f'unknown key {path}.{name}; {hint}{path} has {", ".join(section)}'
    )


def _check_structure(value: Any, default: Any, key: str) -> None:
  """Raises unless `value` has the keys and types of `default`."""
  if isinstance(default, ml_collections.ConfigDict):
    if not isinstance(value, ml_collections.ConfigDict):
      raise UserError(f'{key} is a section and cannot be set to {value!r}')
    for name in value:
      inner = f'{key}.{name}'.removeprefix('config.')
      _check_name(default, name, key, inner)
    for name in default:
      if name not in value:
        raise UserError(f'{key}.{name} is missing: the section was replaced')
      _check_structure(value[name], default[name], f'{key}.{name}')
  elif isinstance(default, tuple):
    if not isinstance(value, tuple):
      raise UserError(f'{key} must be a tuple, got {value!r}')
    for element in value:
      _check_number(element, default[0], key, value)
  else:
    _check_number(value, default, key, value)


def _check_number(value: Any, default: Any, key: str, shown: Any) -> None:
  kind = type(default)
  fits = type(value) is kind or (kind is float and type(value) is int)
  if not fits:
    raise UserError(f'{key} must be of type {kind.__name__}, got {shown!r}')
  # Also false for NaN; and the network computes in no wider type.
  if kind is float and not abs(value) <= _FLOAT32_MAX:
    raise UserError(f'{key} must be finite in float32, got {shown!r}')


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The configuration as plain JSON values."""
  return json.loads(config.to_json())


def from_json(path: Path) -> ml_collections.ConfigDict:
  """Reads the configuration that a run wrote into its workdir.

  Raises:
    UserError: if the file is damaged or holds unknown keys.
  """
  config = get_config()
  try:
    saved = json.loads(path.read_text())
    for name, value in saved.items():
      if isinstance(value, dict):
        for key, entry in value.items():
          config[name][key] = tuple(entry) if type(entry) is list else entry
      else:
        config[name] = value
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} is not a configuration of this version: {_one_line(error)};'
      ' remove it, or pass --config'
    ) from error
  return config


def from_recipe(path: str | Path) -> ml_collections.ConfigDict:
  """Returns what the function `get_config()` of a Python file returns.

  Raises:
    UserError: naming the file, and the line where it fails.
  """
  file = str(Path(path).expanduser())
  if not Path(file).is_file():
    raise UserError(f'--config={path}: no such file{near_file(Path(file))}')
  try:
    config = runpy.run_path(file)['get_config']()
  except Exception as error:  # a recipe is a program and may raise anything
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == file]
    place = f', line {lines[-1]}' if lines else ''
    raise UserError(f'--config={path}{place}: {_one_line(error)}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'--config={path}: get_config() must return a ConfigDict, got {config!r}'
    )
  _check_structure(config, get_config(), 'config')
  return config


def _one_line(error: Exception) -> str:
  text = f'{type(error).__name__}: {error}'
  return textwrap.shorten(text, 200, placeholder=' ...')
