"""What may end or spoil a run: signals, infinite losses, empty batches."""

import math
import signal
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
    self._handlers: dict[int, Any] = {}

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; every process asks at every step."""
    several = jax.process_count() > 1
    if several and multihost_utils.reached_preemption_sync_point(step):
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


class CheckedMetrics(AbstractContextManager):
  """The metrics of steps, which are checked when they are fetched.

  It warns of the first batch without a valid pixel, and at the end of the
  `with` block of their number.
  """

  def __init__(self, warn: Callable[[str], None]) -> None:
    self._warn = warn
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []
    self._empty_batches = 0

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Keeps what a pmapped step returned, without waiting for it."""
    watchdog.progress(step)
    self._pending.append((step, metrics))

  @watchdog.phase('device')
  def fetch(self, kept: int | None) -> dict[str, float]:
    """Waits for the steps added since the last call; returns the last metrics.

    Raises `UserError`, which names the checkpoint of step `kept`, at the first
    loss or gradient that is not finite.
    """
    also = '' if kept is None else f'. The checkpoint of step {kept} is kept'
    values = {}
    for step, metrics in self._pending:
      values = {k: float(v[0]) for k, v in jax.device_get(metrics).items()}
      for name, value in values.items():
        if not math.isfinite(value):
          raise UserError(
            f'{name} is {value} at step {step}; lower config.optimizer.'
            f'learning_rate or set config.optimizer.clip_norm{also}'
          )
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

  def __exit__(self, *_: object) -> None:
    if self._empty_batches > 1:
      self._warn(f'warning: {self._empty_batches} batches had no valid pixel')
