"""The command: python -m deeplab_jax.main --workdir=DIR [--mode=...].

It trains by default. `--config=RECIPE` names a recipe, `--config.section.key=`
changes a setting. Images to predict, or two workdirs to compare, come last.
"""

from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from deeplab_jax import build, configure, import_weights, publish
from deeplab_jax import config as settings
from deeplab_jax.compare import compare
from deeplab_jax.evaluate import evaluate
from deeplab_jax.export import export
from deeplab_jax.predict_files import predict
from deeplab_jax.prepare import prepare
from deeplab_jax.report import report
from deeplab_jax.runtime import console, host
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import as_path
from deeplab_jax.train import train_and_evaluate

_RUN: dict[str, Callable[..., Any]] = {
  'prepare': prepare,
  'train': train_and_evaluate,
  'import': import_weights.import_weights,
  'eval': evaluate,
  'predict': predict,
  'report': lambda _, workdir: report(workdir),
  'compare': lambda _, __, inputs: compare(inputs),
  'export': export,
  'publish': publish.publish,
}
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_MODE = flags.DEFINE_enum('mode', 'train', list(_RUN), 'What to do.')
_DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of all errors.')
_JOIN = flags.DEFINE_enum('distributed', 'auto', host.MODES, 'Join others.')
_RECIPE = flags.DEFINE_string(
  'config', None, 'Recipe: its name or file; else the settings of the workdir.'
)


def main(argv: list[str]) -> None:
  """Runs the mode that was asked for; `argv` holds settings, then inputs."""
  mode = _MODE.value
  workdir = as_path(_WORKDIR.value) if _WORKDIR.value else None
  config, has_network = configure.first(_RECIPE.value, workdir)
  inputs = _apply(argv, config)
  given = [inputs] if mode in ('predict', 'compare') else []
  if inputs and not given:
    raise UserError(f'{inputs[0]}: not an option; --mode={mode} has no inputs')
  if mode in ('prepare', 'compare'):
    _RUN[mode](config, workdir, *given)
    return
  if workdir is None:
    raise UserError('--workdir=DIR is missing: the folder of the run')
  host.start(debug=_DEBUG.value, join=_JOIN.value)
  starts = mode == 'import' or (mode == 'train' and config.init_from)
  if starts and not has_network:
    # That of a run to continue, else of the weights; the options come last.
    if not configure.take_network(config, workdir):
      import_weights.config_of(config.init_from, config)
    _apply(argv, config)
  _RUN[mode](config, workdir, *given)


def _apply(argv: list[str], config: ConfigDict) -> list[str]:
  """Changes and checks the configuration in place; returns the inputs."""
  known = 'workdir', 'mode', 'config', 'debug', 'distributed', 'help'
  inputs = configure.override(config, argv, known)
  settings.validate(config)
  configure.make_paths_absolute(config)
  build.check(config)
  return inputs


def entry() -> None:
  """Runs the command, as `python -m deeplab_jax.main` does."""
  console.run(main, _DEBUG)


if __name__ == '__main__':
  entry()
