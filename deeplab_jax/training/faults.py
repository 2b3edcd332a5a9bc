"""What may end or spoil a run: signals, infinite losses, empty batches."""

import collections
import math
import signal
import statistics
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from deeplab_jax.runtime import watchdog
from deeplab_jax.runtime.errors import UserError


class StopSignal:
  """Notes one SIGTERM or SIGINT in a `with` block; a second one acts as usual.

  Of several processes, one may be told first. JAX then notes the SIGTERM, and
  all of them stop at the same step; a SIGINT ends each at once. Outside the
  main thread, where Python allows no handlers, signals are left alone.
  `number` is the signal that came, or 0.
  """

  def __init__(self) -> None:
    self.number = 0
    self._calls = 0
    self._handlers: dict[int, Any] = {}

  def requested(self) -> bool:
    """Whether to stop now; all processes ask equally often."""
    self._calls += 1
    several = jax.process_count() > 1
    if several and multihost_utils.reached_preemption_sync_point(self._calls):
      self.number = signal.SIGTERM
    return self.number != 0

  def __enter__(self) -> Self:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and in_main_thread:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._handlers[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    self._handlers.clear()

  def _note(self, number: int, _: object) -> None:
    self.number = number
    self.__exit__()


class Diverged(UserError):
  """The loss or the gradient of `step` is not finite, or has exploded."""

  def __init__(self, what: str, step: int, hint: str) -> None:
    super().__init__(
      f'{what} at step {step}; lower config.optimizer.learning_rate or set'
      f' config.optimizer.clip_norm{hint}'
    )
    self.what, self.step = what, step


class CheckedMetrics(AbstractContextManager):
  """The metrics of steps, which are checked when they are fetched.

  It warns of the first batch without a valid pixel, and at the end of the
  `with` block of their number. With `limit`, a loss above as many times the
  median of the last 100 losses has exploded. `kept` tells the step of the
  checkpoint to go back to, if there is one.
  """

  def __init__(
    self,
    warn: Callable[[str], None],
    kept: Callable[[], int | None],
    limit: float = math.inf,
  ) -> None:
    self._warn, self._kept, self._limit = warn, kept, limit
    self._losses: collections.deque[float] = collections.deque(maxlen=100)
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []
    self._empty_batches = 0

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Keeps what a pmapped step returned, without waiting for it."""
    watchdog.progress(step)
    self._pending.append((step, metrics))

  @watchdog.phase('device')
  def fetch(self) -> dict[str, float]:
    """Waits for the steps added since the last call; returns the last metrics.

    Raises `Diverged` at the first loss or gradient that is not finite.
    """
    values: dict[str, float] = {}
    for step, metrics in self._pending:
      values = {k: float(v[0]) for k, v in jax.device_get(metrics).items()}
      for name, value in values.items():
        if not math.isfinite(value):
          raise self._diverged(f'{name} is {value}', step)
      full = len(self._losses) == self._losses.maxlen
      usual = max(statistics.median(self._losses), 1) if full else math.inf
      if values['loss'] > self._limit * usual:
        raise self._diverged(f'loss rose to {values["loss"]:.4g}', step)
      self._losses.append(values['loss'])
      if not values['valid_pixels']:
        self._empty_batches += 1
        if self._empty_batches == 1:
          self._warn(
            f'warning: the batch of step {step} has no valid pixel and teaches'
            ' nothing: it shows only void, or classes whose weight in'
            ' config.loss.class_weights is 0; more are counted until the end'
          )
    self._pending.clear()
    return values

  def _diverged(self, what: str, step: int) -> Diverged:
    back = math.isfinite(self._limit)
    hint = '' if back else ', or config.train.on_nan=rollback'
    if (kept := self._kept()) is not None:
      hint += f'. The checkpoint of step {kept} is kept'
    return Diverged(what, step, hint)

  def __exit__(self, *_: object) -> None:
    if self._empty_batches > 1:
      self._warn(f'warning: {self._empty_batches} batches had no valid pixel')
