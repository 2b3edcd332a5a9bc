"""Where a configuration comes from: a recipe, a workdir, the command line."""

import contextlib
import itertools
import json
import os
import re
import runpy
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from deeplab_jax.config import check_key, check_types, flat, get_config
from deeplab_jax.runtime import own
from deeplab_jax.runtime.console import named_options
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import near_file, read_bytes


def override(
  config: ConfigDict, argv: Sequence[str], known: Sequence[str] = ()
) -> list[str]:
  """Applies --config.section.key=value in place; returns the other arguments.

  The last value of a setting counts. One of the `known` flags of the program is
  proposed for a misspelled one. What is unknown or does not parse raises a
  `UserError`.
  """
  for argument in itertools.takewhile(lambda word: word != '--', argv):
    if match := re.match(r'--?(?:no)?config\.([^=]+)', argument):
      check_key(match[1], config)
  values = flags.FlagValues()
  with named_options([*known, *(f'config.{key}' for key in flat(config))]):
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=list(argv)
    )
    return values(argv)[1:]


# Settings that name places: of what is read, and of what is written.
_SOURCES = 'data.dir', 'data.prepared_dir', 'data.options.list', 'init_from'
_RESULTS = 'predict.output_dir', 'export.output_dir', 'publish.to'


def make_paths_absolute(config: ConfigDict) -> None:
  """Lets paths mean the same in any folder, in place."""
  for key in (*_SOURCES, *_RESULTS):
    value = config_path.get_value(key, config)
    published = key == 'init_from' and re.match(
      r'keras$|torchvision/', value or ''
    )
    if value and '://' not in value and not published:
      path = os.path.abspath(os.path.expanduser(value))
      config.update_from_flattened_dict({key: path})


# Of older workdirs; these settings are in `data.options` now, and `loss.name`
# is one of `loss.terms`.
_MOVED = 'data.list', 'data.holdout'


def from_json(path: Path) -> ConfigDict:
  """Reads the configuration of a workdir; raises `UserError` if it cannot.

  Where results go is never taken from it, and where sources are only if this
  user wrote it, as `own.remember` notes: a workdir may come from anyone.
  """
  config = get_config()
  try:
    saved = json.loads(read_bytes(path))
    known = own.wrote(saved)
    saved = flat(saved)
    if 'loss.name' in saved:
      saved['loss.terms'] = (saved.pop('loss.name'),)
    moved = {key: saved.pop(key) for key in _MOVED if key in saved}
    if moved.get('data.list'):  # else nothing was held out
      for key, value in moved.items():
        saved[key.replace('data.', 'data.options.')] = value
    places = _RESULTS if known else (*_RESULTS, *_SOURCES, 'data.allow_outside')
    unset = None, '', False, 'keras'
    if dropped := [key for key in places if saved.get(key) not in unset]:
      own.warn_once(
        f'{path}: not taken from a file that others may have written: config.'
        f'{", config.".join(dropped)}; give them as options if needed'
      )
    saved = {key: saved[key] for key in saved if key not in dropped}
    with config.ignore_type():
      config.update_from_flattened_dict(saved)
    check_types(config)
  except Exception as error:  # a damaged file may raise anything
    raise UserError(
      f'{path} cannot be used: {_one_line(error)}; pass --config, or remove it'
    ) from error
  return config


def first(recipe: str | None, workdir: Path | None) -> tuple[ConfigDict, bool]:
  """Reads a recipe, else the settings of a workdir, else the default.

  Also returns whether they choose a network: the default does not, nor does a
  recipe that leaves `config.model` alone.
  """
  saved, default = workdir and workdir / 'config.json', get_config()
  if recipe is None and saved and saved.exists():
    return from_json(saved), True
  config = default if recipe is None else from_recipe(recipe)
  return config, config.model.to_dict() != default.model.to_dict()


def take_network(config: ConfigDict, workdir: Path) -> bool:
  """Takes `config.model` from a run in a workdir, in place, if there is one."""
  before = last_used(workdir)
  network = {k: v for k, v in before.items() if k.startswith('model.')}
  config.update_from_flattened_dict(network)
  return bool(network)


def last_used(workdir: Path) -> dict[str, Any]:
  """What a workdir was last trained with, by key; empty if not known."""
  with contextlib.suppress(UserError, OSError):
    return flat(from_json(workdir / 'config.json'))
  return {}


def from_recipe(recipe: str | Path) -> ConfigDict:
  """Calls `get_config()` of a recipe: a name in `experiments`, or a file.

  If it fails, a `UserError` names the file and the line.
  """
  folders = (folder / 'experiments' for folder in Path(__file__).parents)
  folder = next(filter(Path.is_dir, folders))  # in the package, or in a clone
  known = {path.stem: path for path in sorted(folder.glob('[!_]*.py'))}
  path = known.get(str(recipe), Path(recipe).expanduser())
  if not path.is_file():
    raise UserError(
      f'--config={recipe}: no such file{near_file(path)}; known recipes:'
      f' {", ".join(known)}'
    )
  try:
    config = runpy.run_path(str(path), run_name=path.stem)['get_config']()
    if not isinstance(config, ConfigDict):
      raise TypeError(f'get_config() must return a ConfigDict, got {config!r}')
  except Exception as error:  # a recipe is a program and may raise anything
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == str(path)]
    place = f', line {lines[-1]}' if lines else ''
    raise UserError(f'--config={recipe}{place}: {_one_line(error)}') from error
  check_types(config)
  return config


def _one_line(error: Exception) -> str:
  kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
  text = f'{kind}{error}'
  return textwrap.shorten(text, 200, placeholder=' ...')
