"""Time and memory of a call in this process, and of a start of training."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deeplab_jax.runtime.errors import UserError


def timed(call: Callable[[], Any], repeat: int | None) -> dict[str, Any]:
  """Times one call to warm up, and `seconds` of the best of `repeat` others.

  By default these are three, and more until three seconds have passed: the
  first dozen short calls vary most, while memory is allocated. Compilations
  count over all calls. Memory is in bytes, at the peak of the process so far.
  """

  def once() -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start

  with compilations() as compiled:
    first = once()
    end = time.perf_counter() + (0 if repeat else 3)
    seconds = [once()]
    while len(seconds) < (repeat or 3) or time.perf_counter() < end:
      seconds.append(once())
  unit = 1 if sys.platform == 'darwin' else 1024
  result = {
    'seconds': min(seconds),
    'calls': len(seconds),
    'first_seconds': first,
    'compilations': len(compiled),
    'compile_seconds': sum(compiled),
    'peak_memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
  }
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    result['peak_device_memory'] = stats['peak_bytes_in_use']
  return result


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """Collects the seconds of each compilation within its body."""
  seconds: list[float] = []

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if 'backend_compile' in event:
      seconds.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def matmul_rate(dtype: str) -> float:
  """Operations a second of a large matrix product on one device."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.dot)
  return 2 * size**3 / timed(lambda: product(a, b), 10)['seconds']


def cold_and_warm(options: Sequence[str]) -> dict[str, float]:
  """Times two starts of training, and the import of what it needs.

  The cold start prepares the data and compiles; the warm one, whose time is
  `seconds`, finds both.
  """
  start, program = time.perf_counter(), 'import deeplab_jax.train'
  subprocess.run([sys.executable, '-c', program], check=True)
  result = {'import_seconds': time.perf_counter() - start}
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'deeplab_jax.main']
    command += [f'--workdir={folder}/workdir', '--config.train.log_every=1']
    command += [f'--config.data.prepared_dir={folder}/prepared', *options]
    programs = f'{folder}/programs'
    result['cold_seconds'] = first_step_seconds(command, programs)
    result['warm_seconds'] = first_step_seconds(command, programs)
  return result | {'seconds': result['warm_seconds']}


def first_step_seconds(command: Sequence[str], programs: str = '') -> float:
  """Runs a command until a line of its stderr begins with 'step '; kills it.

  Compiled programs are kept in the folder `programs`, if given. Raises
  `UserError` if the command ends before.
  """
  start, line = time.perf_counter(), ''
  with subprocess.Popen(
    command,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': programs},
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      for line in process.stderr or ():
        if line.startswith('step '):
          return time.perf_counter() - start
    finally:
      with contextlib.suppress(OSError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
  reason = line.strip().removeprefix('error: ')
  raise UserError(f'training ended before its first step: {reason}')
