"""The command: python -m deeplab_jax.main --workdir=DIR [--mode=...].

Trains by default; `--mode=prepare` shows the data first. `--config=FILE` names
a recipe, `--config.section.key=value` changes one setting, `--mode=predict`
takes files, folders or globs after the options.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import ml_collections
from absl import app, flags

from deeplab_jax import config as default_config
from deeplab_jax import options
from deeplab_jax.runtime import host
from deeplab_jax.runtime.errors import UserError

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: checkpoints, logs and results.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ('prepare', 'train', 'import', 'eval', 'predict'),
  'What to do.',
)
_DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of all errors.')
_RECIPE = flags.DEFINE_string(
  'config',
  None,
  'Recipe, a Python file with get_config(); without it, what the workdir was'
  ' trained with, else the default. --config.section.key=value changes one'
  ' setting.',
)


def main(argv: Sequence[str]) -> None:
  """Runs the mode that was asked for; `argv` holds settings, then inputs."""
  workdir = Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None
  config, inputs = options.override(
    _base_config(workdir), argv, ('workdir', 'mode', 'config', 'debug', 'help')
  )
  if workdir is None and _MODE.value != 'prepare':
    raise UserError('--workdir=DIR is missing: the folder of the run')
  default_config.validate(config)
  # What a workdir remembers stays as it was said there.
  default_config.make_paths_absolute(
    config, options.settings_in(argv) if _remembers(workdir) else None
  )
  if inputs and _MODE.value != 'predict':
    raise UserError(
      f'{inputs[0]}: not an option; only --mode=predict takes inputs'
    )
  # The drivers are imported late: options are checked at once, and loader
  # processes, which import this module too, stay light.
  if _MODE.value == 'prepare':
    _driver('prepare').prepare(config, workdir)
    return
  host.configure()
  if not _DEBUG.value:
    host.hide_alarms()
  host.cache_programs(workdir / 'compilation_cache')
  distributed = importlib.import_module('deeplab_jax.runtime.distributed')
  distributed.initialize()
  default_config.check_machine(config, _MODE.value, **host.limits())
  if _MODE.value in ('train', 'import'):
    _adopt_settings(config, workdir, argv)
  if _MODE.value == 'import':
    _driver('import_weights').import_weights(config, workdir)
  elif _MODE.value == 'train':
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      reason = 'not a folder' if workdir.exists() else error.strerror
      raise UserError(f'--workdir={workdir}: {reason}') from error
    _driver('train').train_and_evaluate(config, workdir)
  elif not (workdir / 'checkpoints').is_dir():
    raise UserError(
      f'no checkpoint in {workdir}; train there first, or give the --workdir'
      ' of a training run'
    )
  elif _MODE.value == 'eval':
    _driver('evaluate').evaluate(config, workdir)
  else:
    _driver('predict').predict(config, workdir, inputs)


def _adopt_settings(
  config: ml_collections.ConfigDict, workdir: Path, argv: Sequence[str]
) -> None:
  """Where nobody chose a network, takes that of the pretrained weights."""
  chosen = _RECIPE.value is not None or _remembers(workdir)
  if chosen or not (config.init_from or _MODE.value == 'import'):
    return
  said = options.settings_in(argv)
  _driver('import_weights').adopt_settings(config, said)


def _driver(name: str) -> ModuleType:
  return importlib.import_module(f'deeplab_jax.{name}')


def _remembers(workdir: Path | None) -> bool:
  """Whether the workdir's own settings are what a command starts from."""
  return (
    _RECIPE.value is None
    and workdir is not None
    and (workdir / 'config.json').exists()
  )


def _base_config(workdir: Path | None) -> ml_collections.ConfigDict:
  """The recipe given, else what the workdir was trained with, else default."""
  if _RECIPE.value is not None:
    config = default_config.from_recipe(_RECIPE.value)
  elif _remembers(workdir):
    config = default_config.from_json(workdir / 'config.json')
  else:
    config = default_config.get_config()
  return config


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the options, but leaves the settings, which need the workdir."""
  with (
    options.one_line_errors('--debug' in argv),
    options.named_options(),
  ):
    try:
      return flags.FLAGS(argv, known_only=True)
    except SystemExit:  # help was asked for, and absl counts that as an error
      sys.stdout.flush()
      sys.exit(0)


def _run(argv: Sequence[str]) -> None:
  options.log_to_stderr()
  with options.one_line_errors(_DEBUG.value):
    main(argv)


def entry() -> None:
  """Runs the command, as `python -m deeplab_jax.main` does."""
  # absl shows the text and the flags of the module that was started.
  sys.modules['__main__'].__doc__ = __doc__
  for flag in flags.FLAGS.get_key_flags_for_module(__name__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(_run, flags_parser=_parse_flags)


if __name__ == '__main__':
  entry()
