"""How far long work is, as lines in the log."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar('T')
log = logging.getLogger(__name__)

_SECONDS = 10  # between two lines


def logged(items: Iterable[T], total: int, what: str) -> Iterator[T]:
  """Yields the items, and every few seconds logs how many of `total` are done.

  As in `12/400 images  3.1/s  02:05 left`, with `what` the word in the middle.
  The first item does not count for the pace, since it may wait for a compiler.
  """
  start = last = time.monotonic()
  for count, item in enumerate(items, 1):
    yield item
    now = time.monotonic()
    if count == 1:
      start = last = now
    elif now - last > _SECONDS:
      last, pace = now, (now - start) / (count - 1)
      left = tqdm.format_interval(pace * (total - count))
      log.info(f'{count}/{total} {what}  {1 / pace:.1f}/s  {left} left')
