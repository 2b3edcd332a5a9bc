"""What a process sets before JAX starts, and the cache of its programs.

On a CPU, XLA takes the memory of a step from malloc, which gives it back to
the system at the end of the step. Mapping it anew page by page takes a tenth of
the time (experiments/PERFORMANCE.md).
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib.utils

_XLA_FLAGS = (
  # XLA's barriers hold until maps are computed again in the backward pass; else
  # a later pass merges both computations and the maps stay in memory.
  '--xla_disable_hlo_passes=cse_barrier_expander',
  # A quarter less time to compile. The rest goes into matrix products, which
  # come compiled.
  '--xla_backend_optimization_level=1',
)

_GLIBC = (2, 35)  # the first that knows this setting
_HUGE_PAGES_SETTING = 'glibc.malloc.hugetlb'
_HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')
_MAPPINGS = Path('/proc/sys/vm/max_map_count')
_THREADS = Path('/proc/sys/kernel/threads-max')
_LOG_FATAL = 3  # of absl's levels
# Marks a restarted process and keeps the GLIBC_TUNABLES that it was given.
_RESTARTED = 'DEEPLAB_JAX_RESTARTED'


def restart_on_huge_pages(module: str) -> None:
  """Starts `python -m module` anew if malloc is to ask for huge pages.

  2 MB are then mapped at a time. The C library reads its settings before Python
  runs, hence the restart, once; the program that comes back sees the
  environment it was given. Nothing happens where the system gives such pages
  unasked or not at all, for accelerators, in programs that were started in
  another way, and where GLIBC_TUNABLES has this setting already.

  Needs to run before anything is opened or started.
  """
  if _RESTARTED in os.environ:
    _set_tunables(os.environ.pop(_RESTARTED))
    return
  given = os.environ.get('GLIBC_TUNABLES', '')
  if (
    _HUGE_PAGES_SETTING in given
    or not sys.executable
    or not _is_program(module)
    or _has_accelerator()
    or not _gives_huge_pages_on_request()
  ):
    return
  own = f'{_HUGE_PAGES_SETTING}=1'
  os.environ[_RESTARTED] = given
  _set_tunables(f'{given}:{own}' if given else own)
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  except OSError:  # goes on with pages of the usual size
    _set_tunables(os.environ.pop(_RESTARTED))


def _set_tunables(value: str) -> None:
  if value:
    os.environ['GLIBC_TUNABLES'] = value
  else:
    os.environ.pop('GLIBC_TUNABLES', None)


def _is_program(module: str) -> bool:
  """Whether the interpreter was told `-m module`, and no debugger was."""
  arguments = iter(sys.orig_argv[1:])
  for argument in arguments:
    if argument == '-m':
      return next(arguments, None) == module
    if argument in ('-X', '-W'):
      next(arguments, None)
    elif not argument.startswith('-'):
      return False
  return False


def _gives_huge_pages_on_request() -> bool:
  try:
    name, version = os.confstr('CS_GNU_LIBC_VERSION').split()
    known = tuple(map(int, version.split('.')))[:2] >= _GLIBC
    return name == 'glibc' and known and '[madvise]' in _HUGE_PAGES.read_text()
  except (AttributeError, OSError, ValueError):  # not glibc, or not Linux
    return False


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


def hide_alarms() -> None:
  """Keeps XLA's alarms to itself, as that a program compiles slowly.

  It logs them as errors, which they are not: what fails is raised. Nothing
  happens where TF_CPP_MIN_LOG_LEVEL says what to show, but for '1', which JAX
  sets itself where nobody did. It reads the variable when it is imported; this
  is later.
  """
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
    # As `jax_logging_level` does, but that hides Python's warnings as well.
    jaxlib.utils.absl_set_min_log_level(_LOG_FATAL)


def limits() -> dict[str, int | None]:
  """What `config.check_machine` holds settings against.

  Returns:
    `memory`, bytes of this machine and its accelerators, `threads`, the most
    of a process, both None where the system does not tell, and `hosts`. JAX
    starts its devices.
  """
  try:
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    for device in jax.local_devices():
      if device.platform != 'cpu':
        memory += device.memory_stats()['bytes_limit']
  except (AttributeError, ValueError, OSError, TypeError, KeyError):
    memory = None
  try:
    # A thread's stack is a mapping, and its guard another.
    threads = min(int(_MAPPINGS.read_text()) // 2, int(_THREADS.read_text()))
  except (OSError, ValueError):  # not Linux
    threads = None
  return {'memory': memory, 'threads': threads, 'hosts': jax.process_count()}


def _has_accelerator() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms:
    return platforms != 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return bool(plugins) or importlib.util.find_spec('libtpu') is not None


@functools.cache  # once in a process
def _give_back_after_compiling() -> None:
  """Returns to the system what compiling took, which malloc would keep."""
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):  # not glibc
    return

  def listen(event: str, *_: Any, **__: Any) -> None:
    if event.endswith('backend_compile_duration'):
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listen)
