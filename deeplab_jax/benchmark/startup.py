"""Time from the command of training to its first finished step."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from deeplab_jax.runtime.errors import UserError


def cold_and_warm(
  recipe: str | None, settings: Sequence[str]
) -> dict[str, float]:
  """Starts training twice, by a recipe, else as by default, with settings.

  Returns:
    `cold_seconds` in a new workdir, with data still to be prepared and nothing
    compiled; `warm_seconds` once more in the same workdir, and as `seconds`;
    `import_seconds` of what training imports.

  Raises:
    UserError: if it ends before its first step.
  """
  result = {'import_seconds': _import_seconds()}
  environment = dict(os.environ)
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  with tempfile.TemporaryDirectory() as folder:
    command = [
      *(sys.executable, '-m', 'deeplab_jax.main'),
      f'--workdir={folder}/workdir',
      f'--config.data.prepared_dir={folder}/prepared',
      '--config.train.log_every=1',
      *([f'--config={recipe}'] if recipe else []),
      *settings,
    ]
    for name in ('cold', 'warm'):
      result[f'{name}_seconds'] = first_step_seconds(command, environment)
  return {**result, 'seconds': result['warm_seconds']}


def _import_seconds() -> float:
  start = time.perf_counter()
  program = 'import deeplab_jax.train'
  subprocess.run([sys.executable, '-c', program], check=True)
  return time.perf_counter() - start


def first_step_seconds(
  command: Sequence[str], environment: dict[str, str]
) -> float:
  """Runs a command until a line on stderr begins with 'step ', and ends it.

  Raises:
    UserError: if it ends before.
  """
  start = time.perf_counter()
  lines = []
  with subprocess.Popen(
    command,
    env=environment,
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      for line in process.stderr:
        lines.append(line)
        if line.startswith('step '):
          return time.perf_counter() - start
    finally:
      with contextlib.suppress(OSError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
  said = ''.join(lines[-1:]).strip().removeprefix('error: ')
  raise UserError(f'training ended before its first step: {said}')
