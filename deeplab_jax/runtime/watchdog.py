"""Says who is gone and what takes too long; ends a run that cannot go on.

The main thread marks what it does. A thread tells it to the other processes by
JAX's coordination service, which process 0 runs. Another thread judges; it asks
nothing of the service, which may not answer.
"""

import contextlib
import ctypes
import faulthandler
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed
from jax._src.lib import _jax

RETRY = 75  # EX_TEMPFAIL: the exit status if the same command should go on
_EVERY = 2.0  # seconds between two beats
_GONE = 30.0  # seconds without a beat until a process counts as gone
_LONG, _FAR = 60.0, 10  # seconds, and times the mean, that are too long
_WAITING = ('step', 'device', 'evaluation')  # where it may wait for others
_KEYS = 'deeplab_jax'  # in the service


class _Watch:
  """What the threads of this process share."""

  def __init__(self) -> None:
    self.client: Any = None  # of the service, if there are several processes
    self.index, self.count, self.host = 0, 1, socket.gethostname()
    self.phase, self.step, self.since = 'start', 0, time.monotonic()
    self.usual: dict[str, tuple[int, float]] = {}  # number, sum of seconds
    self.warned = self.active = False
    self.limit: float | None = None  # seconds
    self.folder: Path | None = None  # of checkpoints
    self.beats: dict[int, list[Any]] = {}  # host, phase, step, number
    self.moved: dict[int, tuple[int, float]] = {}  # number, and since when
    self.answered = time.monotonic()  # the service
    self.end: list[Any] = []  # exit status and line
    self.looked, self.once = time.monotonic(), threading.Lock()
    self.address, self.aborts = ('', 0), ctypes.CFUNCTYPE(None)()
    self.terminates = ctypes.CFUNCTYPE(None)(self.lost)

  def enter(self, phase: str) -> None:
    now = time.monotonic()
    count, total = self.usual.get(self.phase, (-1, 0.0))
    spent = now - self.since if count >= 0 else 0.0  # the first one compiles
    self.usual[self.phase] = count + 1, total + spent
    self.phase, self.since, self.warned = phase, now, False

  def tell(self) -> None:
    for number in itertools.count():
      phase = 'compilation' if _compiling() else self.phase
      beat = json.dumps([self.host, phase, self.step, number])
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self.client.key_value_set(f'{_KEYS}/{self.index}', beat, True)
        found = self.client.key_value_dir_get(f'{_KEYS}/')
        self.beats = {int(k.split('/')[1]): json.loads(x) for k, x in found}
        self.answered = time.monotonic()
      time.sleep(_EVERY)

  def judge(self) -> None:
    while (self.active or self.client) and self.phase != 'failed':
      if self.client:
        self.judge_others()
      if self.active:
        self.judge_time()
      if self.end:
        self.leave()
      time.sleep(_EVERY / 2)

  def judge_others(self) -> None:
    now = time.monotonic()
    if now - self.looked > _GONE / 2:  # this process itself stood still
      self.answered = now
    self.looked, silent = now, now - self.answered
    for index, (_, phase, _, number) in sorted(self.beats.items()):
      if self.moved.get(index, (-1,))[0] != number or silent > _GONE / 2:
        self.moved[index] = number, now
      if phase == 'failed':
        self.fail(index, 'ended with an error, which its output shows', 1)
      elif phase != 'done' and now - self.moved[index][1] > _GONE:
        self.fail(index, 'is gone', RETRY)
    if silent > _GONE:
      self.fail(0, 'is gone', RETRY)

  def fail(self, index: int, what: str, status: int) -> None:
    host = self.beats.get(index, ['unknown host'])[0]
    line = f'process {index} of {self.count} on {host} {what}'
    if status == RETRY:
      line += f'; start all again{self.kept()}'
    self.end = self.end or [status, line]

  def kept(self) -> str:
    paths = self.folder.glob('[0-9]*') if self.folder else ()
    steps = [int(path.name) for path in paths if path.name.isdigit()]
    return f', they go on from step {max(steps)}' if steps else ''

  def leave(self) -> None:
    self.once.acquire()
    print(self.end[1], file=sys.stderr, flush=True)
    if self.client:  # until the others know, who lose the service with us
      time.sleep(3 * _EVERY)
    os._exit(self.end[0])  # the main thread may hang in a collective

  def lost(self, *_: Any) -> None:
    time.sleep(_EVERY)  # the sockets of a killed process do not close at once
    with contextlib.suppress(OSError):
      socket.create_connection(self.address, 5).close()
      if not self.end:
        self.aborts()  # the service is there: it is something else
    self.fail(0, 'is gone', RETRY)
    self.leave()

  def judge_time(self) -> None:
    spent = time.monotonic() - self.since
    others = {k: v for k, v in self.beats.items() if k != self.index}
    if _compiling() or 'compilation' in [beat[1] for beat in others.values()]:
      return
    count, total = self.usual.get(self.phase, (0, 0.0))
    usual = total / max(count, 1)
    line = (
      f'{self.host}, step {self.step}: {self.phase} has taken {spent:.0f} s,'
      f' usually {usual:.1f}'
    )
    for index, (host, phase, step, _) in sorted(others.items()):
      behind = step < self.step or phase not in _WAITING
      if self.phase in _WAITING and behind:
        line += f'; waits for process {index} on {host}, in its {phase}'
    if count > 0 and spent > max(_LONG, _FAR * usual) and not self.warned:
      self.warned = True
      print(f'warning: {line}', file=sys.stderr, flush=True)
    if self.limit and spent > self.limit:
      faulthandler.dump_traceback(sys.stderr)
      self.end = self.end or [RETRY, f'{line}; start again{self.kept()}']


_watch = _Watch()


def join(address: str, count: int, index: int, local: Any) -> None:
  """Joins the other processes and watches them."""
  host, _, port = address.rpartition(':')
  _watch.address = host.strip('[]'), int(port)
  _watch.index, _watch.count = index, count
  # JAX aborts the process that loses process 0, and `jax_enable_recoverability`
  # changes that only for the loss of others.
  make = _jax.get_distributed_runtime_client
  _jax.get_distributed_runtime_client = functools.partial(
    make, missed_heartbeat_callback=_watch.lost
  )
  # Jaxlib 0.10 cannot pass its status to that function, and terminates.
  with contextlib.suppress(OSError, AttributeError):
    set_terminate = ctypes.CDLL('libstdc++.so.6')._ZSt13set_terminatePFvvE
    set_terminate.restype = type(_watch.aborts)
    _watch.aborts = set_terminate(_watch.terminates)
  day = 86_400  # our own beats are faster, and say more
  jax.distributed.initialize(
    address, count, index, local, heartbeat_timeout_seconds=day
  )
  _jax.get_distributed_runtime_client = make
  _watch.client = distributed.global_state.client
  _watch.answered = _watch.looked = time.monotonic()
  for target in (_watch.tell, _watch.judge):
    threading.Thread(target=target, daemon=True).start()


@contextlib.contextmanager
def watching(minutes: float | None, workdir: Path, step: int) -> Iterator[None]:
  """Watches the time of a training run that starts at a step.

  After `minutes` without progress it shows all stacks and ends the process with
  status 75; None only warns.
  """
  _watch.limit = minutes and 60 * minutes
  _watch.folder = workdir / 'checkpoints'
  _watch.usual, _watch.step, _watch.active = {}, step, True
  with phase('step'):
    if not _watch.client:
      threading.Thread(target=_watch.judge, daemon=True).start()
    try:
      yield
    finally:
      _watch.active = False


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
  """Marks what the main thread does; also a decorator."""
  here = threading.current_thread() is threading.main_thread()
  before = _watch.phase
  if here:
    _watch.enter(name)
  try:
    yield
  finally:
    if here:
      _watch.enter(before)


def progress(step: int | None = None) -> None:
  """Notes that the main thread has begun a step, or a batch of another loop."""
  _watch.step = step or _watch.step
  _watch.enter(_watch.phase)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Lets the other processes know how the main thread of this one ends."""
  status: Any = 0
  try:
    yield
  except SystemExit as stop:
    status = stop.code or 0
  except Exception as error:
    if not _watch.client:
      raise
    if isinstance(error, jax.errors.JaxRuntimeError):
      time.sleep(_GONE + 5 * _EVERY)  # first see whether a process is gone
    traceback.print_exc()
    status = 1
  together = status in (0, 128 + signal.SIGTERM)
  _watch.phase = 'done' if together else 'failed'
  if _watch.client and not together:
    time.sleep(3 * _EVERY)
    sys.stdout.flush()
    os._exit(status)  # at its exit JAX would wait for the others
  sys.exit(status)


def _compiling() -> bool:
  frame = sys._current_frames().get(threading.main_thread().ident or 0)
  while frame and 'compile' not in frame.f_code.co_name:
    frame = frame.f_back
  return frame is not None
