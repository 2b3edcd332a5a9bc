"""What a process sets before JAX starts, and the cache of its programs.

On a CPU, XLA takes the memory of a step from malloc, which gives it back to
the system at the end of the step. Mapping it anew page by page would take up to
a third of the time.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import jax

_XLA_FLAGS = (
  # XLA's barriers hold until maps are computed again in the backward pass; else
  # a later pass merges both computations and the maps stay in memory.
  '--xla_disable_hlo_passes=cse_barrier_expander',
  # A quarter less time to compile. The rest goes into matrix products, which
  # come compiled.
  '--xla_backend_optimization_level=1',
)

# From glibc 2.35 on; others ignore it.
_TUNABLE = 'glibc.malloc.hugetlb'
_HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def restart_on_huge_pages(module: str) -> None:
  """Starts `python -m module` anew if malloc is to ask for huge pages.

  2 MB are then mapped at a time. The C library reads its settings before Python
  runs, hence the restart, once and at the very beginning. Nothing happens where
  the system gives such pages unasked or not at all, for accelerators, and in
  programs that were started in another way.
  """
  given = os.environ.get('GLIBC_TUNABLES', '')
  started = sys.orig_argv[1:3] == ['-m', module]
  if not started or _TUNABLE in given or _has_accelerator():
    return
  try:
    on_request = '[madvise]' in _HUGE_PAGES.read_text()
  except OSError:
    return
  if on_request:
    own = f'{_TUNABLE}=1'
    os.environ['GLIBC_TUNABLES'] = ':'.join([given, own] if given else [own])
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare() -> None:
  """Settings for a process that computes on a CPU; none for other devices.

  Needs to run before JAX starts its devices.
  """
  if _has_accelerator():
    return
  # The last of two settings counts; those of disabled passes add up.
  given = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = ' '.join([*_XLA_FLAGS, given]).strip()
  _give_back_after_compiling()


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


def _give_back_after_compiling() -> None:
  """Returns to the system what compiling took, which malloc keeps else."""
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):  # not glibc
    return

  def listen(event: str, *_: Any, **__: Any) -> None:
    if event.endswith('backend_compile_duration'):
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listen)
