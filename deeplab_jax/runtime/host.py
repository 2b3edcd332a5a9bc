"""What a process sets before JAX starts, and what its machine offers."""

import collections
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
import jaxlib.utils

from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.own import own_folder

_XLA_FLAGS = (
  # Keeps XLA's barriers until after the backward pass computes maps again. A
  # later pass would otherwise merge both computations and keep the maps.
  '--xla_disable_hlo_passes=cse_barrier_expander',
  # Compiles a quarter faster. Most of the run time goes into matrix products,
  # which are compiled already.
  '--xla_backend_optimization_level=1',
)
MODES = 'auto', 'on', 'off'  # of `distributed.initialize`
_LOG_FATAL = 3  # the highest of absl's log levels
_PACKAGES = 'deeplab_jax', 'jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy'


def start(*, debug: bool = False, join: str = 'auto') -> None:
  """Does all that a command on a workdir does before JAX starts."""
  configure()
  if not debug:
    hide_alarms()
  cache_programs()
  distributed.initialize(join)


def configure() -> None:
  """Sets XLA's options for a CPU; call it before JAX starts its devices.

  With an accelerator it changes nothing. Options in XLA_FLAGS win.
  """
  if platforms := os.environ.get('JAX_PLATFORMS'):
    cpu = platforms == 'cpu'
  else:
    plugins = importlib.metadata.entry_points(group='jax_plugins')
    cpu = not plugins and importlib.util.find_spec('libtpu') is None
  if cpu:
    # XLA takes the last value of an option; disabled passes add up.
    given = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = ' '.join([*_XLA_FLAGS, given]).strip()


def cache_programs() -> None:
  """Keeps compiled programs for this user, unless the environment says where.

  They are native code. So they lie in no folder that others may have made.
  """
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    folder = own_folder('cache', 'programs')
    jax.config.update('jax_compilation_cache_dir', folder and str(folder))


def hide_alarms() -> None:
  """Hides XLA's alarms, for example that a program compiles slowly.

  XLA logs them as errors, but real errors are raised. TF_CPP_MIN_LOG_LEVEL
  wins, except for the value 1, which JAX itself sets as the default.
  """
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
    # `jax_logging_level` would hide Python's warnings too, and the variable has
    # no effect after the import of JAX.
    jaxlib.utils.absl_set_min_log_level(_LOG_FATAL)


def versions(*packages: str) -> dict[str, str]:
  """Returns the versions of those packages that are installed."""
  found = {}
  for name in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def describe() -> dict[str, Any]:
  """Returns what speed and results depend on, as JSON values.

  That is the machine with its devices, and the versions of Python and packages.
  """
  cpu = platform.machine()
  with contextlib.suppress(OSError):  # not Linux
    info = Path('/proc/cpuinfo').read_text()
    if found := re.search(r'model name\s*: (.+)', info):
      cpu = found[1]
  kinds = collections.Counter(d.device_kind for d in jax.devices())
  return {
    'system': f'{platform.system()} {platform.release()}',
    'cpu': cpu,
    'cores': os.cpu_count(),
    'devices': ', '.join(f'{n} × {kind}' for kind, n in kinds.items()),
    'hosts': jax.process_count(),
    'versions': {'Python': platform.python_version(), **versions(*_PACKAGES)},
  }
