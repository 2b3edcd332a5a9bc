import itertools
import types

import jax
import numpy as np
import pytest

from deeplab_jax.benchmark import timing


def test_later_compilations_are_counted():
  sizes = itertools.count(1)
  twice = jax.jit(lambda x: 2 * x)
  result = timing.timed(lambda: twice(np.ones(next(sizes))), 3)
  assert result['calls'] == 3 and result['compilations'] == 4


@pytest.mark.parametrize(
  ('repeat', 'tick', 'calls'), [(None, 10, 3), (None, 0.25, 5), (2, 0.25, 2)]
)
def test_short_calls_are_timed_for_three_seconds(
  monkeypatch, repeat, tick, calls
):
  # The clock is read twice a call, and from the fourth on once before it.
  ticks = itertools.count()
  clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) * tick)
  monkeypatch.setattr(timing, 'time', clock)
  done = []
  result = timing.timed(lambda: done.append(0), repeat)
  assert result['calls'] == len(done) - 1 == calls
  assert result['seconds'] == tick
