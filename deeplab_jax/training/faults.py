"""Ends a loop between two steps when the process is asked to stop."""

import logging
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class StopSignal:
  """Notes SIGTERM and SIGINT instead of dying from them; a second one kills.

  Of several processes one may be told first. JAX then notes the SIGTERM, and
  all of them stop at the same step; a SIGINT ends each at once.

  Outside the main thread, where Python allows no handlers, signals stay as they
  are: they are the business of the program that started the thread.

  ```
  with StopSignal() as stop:
    for step in ...:
      if stop.requested(step):
        save()
        raise SystemExit(stop.exit_status(step))
  ```
  """

  def __init__(self) -> None:
    self.number = 0
    self._handlers: dict[int, object] = {}

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; every process asks at every step."""
    several = jax.process_count() > 1
    if several and multihost_utils.reached_preemption_sync_point(step):
      self.number = signal.SIGTERM
    return self.number != 0

  def exit_status(self, step: int) -> int:
    """The shell's status for the signal that came; says where the run is."""
    log.info('stopped at step %d; the same command goes on from there', step)
    return 128 + self.number

  def __enter__(self) -> 'StopSignal':
    in_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and in_main_thread:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._handlers[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.number = number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    self._handlers.clear()
