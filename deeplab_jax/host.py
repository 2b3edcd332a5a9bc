"""What a process sets before JAX starts, and the cache of its programs.

On a CPU, XLA takes the memory of a step from malloc, which gives it back to
the system at the end of the step: a third of the time then goes into mapping
it anew, page by page.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_XLA_FLAGS = (
  # XLA's barriers hold until maps are computed again in the backward pass; else
  # a later pass merges both computations and the maps stay in memory.
  '--xla_disable_hlo_passes=cse_barrier_expander',
  # A quarter less time to compile. The rest goes into matrix products, which
  # come compiled.
  '--xla_backend_optimization_level=1',
)


def prepare() -> None:
  """Settings for a process that computes on a CPU; none for other devices.

  Needs to run before JAX starts its devices.
  """
  if _has_accelerator():
    return
  # The last of two settings counts; those of disabled passes add up.
  given = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = ' '.join([*_XLA_FLAGS, given]).strip()
  _keep_freed_memory()


def cache_programs(directory: Path) -> None:
  """Keeps compiled programs there, unless the environment names a place."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    jax.config.update('jax_compilation_cache_dir', str(directory))


def _has_accelerator() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms:
    return platforms != 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return bool(plugins) or importlib.util.find_spec('libtpu') is not None


def _keep_freed_memory() -> None:
  """Lets glibc's malloc keep what is freed; does nothing in other libraries.

  What compiling leaves is given back at once, since a step cannot use it.
  """
  try:
    libc = ctypes.CDLL(None)
    set_option, trim = libc.mallopt, libc.malloc_trim
  except (AttributeError, OSError, TypeError):
    return
  # One heap for all threads, as the others cannot grow beyond 64 MB.
  set_option(_M_ARENA_MAX, 1)
  set_option(_M_MMAP_MAX, 0)
  set_option(_M_TRIM_THRESHOLD, -1)

  def trim_after_compiling(event: str, *_: Any, **__: Any) -> None:
    if event.endswith('backend_compile_duration'):
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim_after_compiling)
