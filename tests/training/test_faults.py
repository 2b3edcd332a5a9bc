"""A signal is noted, and only once."""

import os
import signal
import threading

import pytest

from deeplab_jax.training.faults import StopSignal


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_and_gives_the_status_of_the_shell(number):
  with StopSignal() as stop:
    assert not stop.requested(1)
    os.kill(os.getpid(), number)
    assert stop.requested(2)
  assert stop.exit_status(3) == 128 + number


@pytest.fixture
def interruptible():
  """Python's own handler of SIGINT; a shell's background job ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('interruptible')
def test_second_signal_meets_the_handler_from_before():
  with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert stop.requested(2)


def test_handlers_are_restored_at_the_end():
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with StopSignal():
    assert signal.getsignal(signal.SIGTERM) not in before
  after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  assert after == before


def test_a_thread_leaves_the_handlers_alone():
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  seen = []

  def run():
    with StopSignal() as stop:
      handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
      seen.append((handlers, stop.requested(1)))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(before, False)]
