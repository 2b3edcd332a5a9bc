"""Lines about long work, by a clock that the test moves."""

import pytest

from deeplab_jax.runtime import progress


@pytest.fixture
def clock(monkeypatch):
  """The time, in a list of one number."""
  now = [100.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  return now


def test_a_line_every_few_seconds_without_the_time_to_compile(clock, caplog):
  def work():
    for seconds in (60, 4, 4, 4, 4):
      clock[0] += seconds
      yield seconds

  with caplog.at_level('INFO', 'deeplab_jax'):
    assert list(progress.logged(work(), 40, 'images')) == [60, 4, 4, 4, 4]
  assert [record.getMessage() for record in caplog.records] == [
    '4/40 images  0.2/s  02:24 left'
  ]


def test_short_work_says_nothing(caplog):
  with caplog.at_level('INFO', 'deeplab_jax'):
    assert list(progress.logged(range(500), 500, 'images')) == list(range(500))
  assert not caplog.records
