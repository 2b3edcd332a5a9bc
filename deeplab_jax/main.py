"""The command: python -m deeplab_jax.main --workdir=DIR [--mode=...].

It trains by default; `--mode=prepare` shows the data first. `--config=RECIPE`
names a recipe, `--config.section.key=value` changes one setting, and
`--mode=predict` takes files, folders or globs after the options.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from deeplab_jax import build, evaluate, import_weights, predict, prepare, train
from deeplab_jax import config as settings
from deeplab_jax.runtime import console, distributed, host
from deeplab_jax.runtime.errors import UserError

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: checkpoints, logs and results.'
)
_MODES = 'prepare', 'train', 'import', 'eval', 'predict'
_MODE = flags.DEFINE_enum('mode', 'train', _MODES, 'What to do.')
_DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of all errors.')
_RECIPE = flags.DEFINE_string(
  'config',
  None,
  'Recipe: a name in experiments, or a Python file with get_config(). Without'
  ' it, what the workdir was trained with, else the default.'
  ' --config.section.key=value changes one setting.',
)


def main(argv: Sequence[str]) -> None:
  """Runs the mode that was asked for; `argv` holds settings, then inputs."""
  mode, chosen = _MODE.value, _chosen_config()
  config = chosen or settings.get_config()
  inputs = _apply(argv, config)
  if _WORKDIR.value is None and mode != 'prepare':
    raise UserError('--workdir=DIR is missing: the folder of the run')
  if inputs and mode != 'predict':
    raise UserError(
      f'{inputs[0]}: not an option; only --mode=predict takes inputs'
    )
  if mode == 'prepare':
    prepare.prepare(config, _workdir())
    return
  workdir = _workdir()
  host.prepare()
  if not _DEBUG.value:
    host.hide_alarms()
  host.cache_programs(workdir / 'compilation_cache')
  distributed.initialize()
  if mode == 'import':
    config.init_from = config.init_from or 'keras'
  if config.init_from and mode in ('train', 'import') and not chosen:
    # What the weights fix replaces the default; the command line comes last.
    config = import_weights.config_of(config.init_from, config.model.backbone)
    _apply(argv, config)
  build.check_machine(config, mode, **host.limits())
  if mode == 'train':
    workdir.mkdir(parents=True, exist_ok=True)
    train.train_and_evaluate(config, workdir)
  elif mode == 'import':
    import_weights.import_weights(config, workdir)
  elif not (workdir / 'checkpoints').is_dir():
    raise UserError(
      f'no checkpoint in {workdir}; train there first, or give the --workdir'
      ' of a training run'
    )
  elif mode == 'eval':
    evaluate.evaluate(config, workdir)
  else:
    predict.predict(config, workdir, inputs)


def _workdir() -> Path | None:
  return Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None


def _chosen_config() -> ConfigDict | None:
  """The recipe, else what the workdir was trained with, else None."""
  if _RECIPE.value is not None:
    return settings.from_recipe(_RECIPE.value)
  path = _workdir() / 'config.json' if _WORKDIR.value else None
  return settings.from_json(path) if path and path.exists() else None


def _apply(argv: Sequence[str], config: ConfigDict) -> list[str]:
  """Changes and checks the configuration in place; returns the inputs."""
  known = 'workdir', 'mode', 'config', 'debug', 'help'
  inputs = settings.override(config, argv, known)
  settings.validate(config)
  settings.make_paths_absolute(config)
  build.check(config)
  return inputs


if __name__ == '__main__':
  console.run(main, _DEBUG)
