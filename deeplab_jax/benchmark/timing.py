"""Time, compilations and memory of a call in this process."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_CALLS, _SECONDS = 3, 3.0  # timed, at least


def timed(call: Callable[[], Any], repeat: int | None) -> dict[str, Any]:
  """One call to warm up, then the best of `repeat` others.

  By default of three and as many more as begin within three seconds: of short
  calls the first dozen vary most, while memory is found for them.

  Returns:
    `first_seconds`, `seconds` of the best other and their number, `calls`;
    `compilations` and `compile_seconds` of all; `peak_memory` of the process
    so far and, where the device tells, its `peak_device_memory`, in bytes.
  """
  with compilations() as compiled:
    start = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - start
    best, calls, begin = float('inf'), 0, time.perf_counter()
    while calls < (repeat or _CALLS) or (
      not repeat and time.perf_counter() - begin < _SECONDS
    ):
      start = time.perf_counter()
      jax.block_until_ready(call())
      best = min(best, time.perf_counter() - start)
      calls += 1
  return {
    'seconds': best,
    'calls': calls,
    'first_seconds': first,
    'compilations': len(compiled),
    'compile_seconds': sum(compiled),
    **_memory(),
  }


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """The seconds of each compilation within."""
  seconds = []

  def listen(event: str, duration: float, **_: Any) -> None:
    if 'backend_compile' in event:
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _memory() -> dict[str, int]:
  """The most that this process has used so far, in bytes."""
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  result = {'peak_memory': peak}
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    result['peak_device_memory'] = stats['peak_bytes_in_use']
  return result


def matmul_rate(dtype: str) -> float:
  """Operations a second of a large matrix product on one device."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.dot)
  return 2 * size**3 / timed(lambda: product(a, b), 10)['seconds']
