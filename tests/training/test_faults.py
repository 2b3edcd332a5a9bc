"""A signal is noted, and only once; metrics of steps are checked."""

import os
import signal
import threading

import numpy as np
import pytest

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training.faults import CheckedMetrics, Diverged, StopSignal

pytestmark = pytest.mark.xdist_group('alone')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted(number):
  with StopSignal() as stop:
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
  assert stop.number == number


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
  assert stop.requested()


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
      seen.append((handlers, stop.requested()))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(before, False)]


def unasked():
  pytest.fail('checkpoints are listed for an error alone')


def metrics(loss, valid_pixels=9):
  """What a step over two devices returns."""
  return {
    'loss': np.full(2, loss, np.float32),
    'valid_pixels': np.full(2, valid_pixels),
  }


def test_metrics_of_the_last_step_are_fetched():
  with CheckedMetrics(pytest.fail, unasked) as checked:
    checked.add(1, metrics(3.0))
    checked.add(2, metrics(2.5))
    assert checked.fetch() == {'loss': 2.5, 'valid_pixels': 9}


@pytest.mark.parametrize('kept', [None, 0, 3])
def test_first_step_that_is_not_finite_is_named_with_the_checkpoint(kept):
  checked = CheckedMetrics(pytest.fail, lambda: kept)
  for step, loss in enumerate([1.0, float('inf'), float('nan')], 4):
    checked.add(step, metrics(loss))
  with pytest.raises(
    UserError, match=r'loss is inf at step 5; .*rate'
  ) as error:
    checked.fetch()
  kept_words = f'The checkpoint of step {kept} is kept'
  assert (kept_words in str(error.value)) == (kept is not None)


def test_empty_batches_are_warned_of_once_and_counted():
  said = []
  with CheckedMetrics(said.append, unasked) as checked:
    for step, valid in enumerate([9, 0, 9, 0, 0], 1):
      checked.add(step, metrics(0.0, valid))
      checked.fetch()
    assert len(said) == 1 and 'batch of step 2 has no valid pixel' in said[0]
  assert said[1:] == ['warning: 3 batches had no valid pixel']


def test_loss_has_exploded_above_a_multiple_of_its_median():
  with CheckedMetrics(pytest.fail, lambda: None, limit=20) as checked:
    for step in range(1, 101):
      checked.add(step, metrics(50.0 if step == 7 else 2.0))
    checked.add(101, metrics(39.0))
    checked.fetch()
    checked.add(102, metrics(41.0))
    with pytest.raises(Diverged, match=r'loss rose to 41 at step 102') as e:
      checked.fetch()
  assert 'on_nan' not in str(e.value)  # it is set already
