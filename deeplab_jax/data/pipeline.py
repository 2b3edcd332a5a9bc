"""Batches for training and evaluation, loaded in the background.

The numbers of threads and workers never change a pixel.
"""

import atexit
import collections
import functools
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeAlias, TypeVar

import cloudpickle
import cv2
import numpy as np
from absl import logging as absl_logging

from deeplab_jax.data import images
from deeplab_jax.data.buckets import FILLER, PlannedBatch
from deeplab_jax.data.transforms import RGB_FILL, Pair, Transform
from deeplab_jax.runtime.errors import UserError, require

log = logging.getLogger(__name__)

_STARTS = 3  # of a loader process for one batch
T = TypeVar('T')
R = TypeVar('R')
Record = dict[str, bytes]
Batch = dict[str, np.ndarray]
# `close()` ends the background work.
Batches: TypeAlias = Generator[Batch, None, None]


def make_train_iterator(
  source: Sequence[Record],
  transforms: Sequence[Transform],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  host: int = 0,
  hosts: int = 1,
  threads: int = 0,
  workers: int = 0,
  class_sampling: float = 0.0,
  shown: Sequence[Sequence[int]] = (),
) -> Batches:
  """Yields shuffled, transformed batches forever, starting at `start_step`.

  A batch is image uint8 [B / hosts, h, w, 3], label uint8 [B / hosts, h, w] and
  place int32 [B / hosts], the rows of the batch of all hosts, of which there
  are B, the `batch_size`. The batch of step `s` depends only on `seed` and `s`;
  at each step, all hosts together load what a single host would load. After
  the last transform, all images must have one size.

  Of the rows a share `class_sampling` takes another record: one of those that
  show a class, drawn uniformly as is the class; `shown` has the classes of each
  record. Such an epoch is not exact. This is the class uniform sampling of Zhu
  et al., "Improving Semantic Segmentation via Video Propagation and Label
  Relaxation" (2019), without crops around the class.

  Each of `workers` processes loads with `threads` threads. With 0 workers this
  process loads. With 0 threads the workers share the cores, at most 16 threads
  each. Workers are spawned, so programs need an `if __name__ == '__main__'`.
  For one that is killed another goes on with the same batches.

  `next` raises `UserError` if a record cannot be decoded, or workers are killed
  again and again.
  """
  _check_hosts(batch_size, host, hosts)
  require(len(source) > 0, 'source must have records', len(source))
  having: dict[int, list[int]] = {}  # the records that show a class
  for number, classes in enumerate(shown):
    for each in classes:
      having.setdefault(each, []).append(number)
  choices = [np.array(having[each]) for each in sorted(having)]
  rule = 'class_sampling needs `shown`'
  require(not class_sampling or choices != [], rule, shown)

  def load(step: int) -> Batch:
    # Rows are numbered across all steps and hosts. A row's number picks its
    # record, in an order that is new in every epoch, and seeds its transforms.
    pairs = []
    for row in range(step * batch_size + host, (step + 1) * batch_size, hosts):
      epoch, index = divmod(row, len(source))
      number = _order(len(source), seed, epoch)[index]
      if class_sampling:
        rng = np.random.default_rng((seed, 2, row))
        if rng.random() < class_sampling:
          number = rng.choice(choices[rng.integers(len(choices))])
      pairs.append(load_example(source[number], transforms, (seed, 1, row)))
    image, label = map(np.stack, zip(*pairs, strict=True))
    place = np.arange(host, batch_size, hosts, dtype=np.int32)
    return {'image': image, 'label': label, 'place': place}

  return _iterate(load, range(start_step, sys.maxsize), threads, workers)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  """The order of the records in an epoch."""
  return np.random.default_rng((seed, 0, epoch)).permutation(count)


def make_eval_iterator(
  source: Sequence[Record],
  plan: Sequence[PlannedBatch],
  transforms: Sequence[Transform] = (),
  *,
  ignore_label: int = 255,
  fill: np.ndarray = RGB_FILL,
  host: int = 0,
  hosts: int = 1,
  threads: int = 0,
) -> Batches:
  """Yields the batches of a plan, each image padded to the size of its batch.

  A batch is image uint8 [B / hosts, *size, 3], label uint8 [B / hosts, *size],
  size int32 [B / hosts, 2], (height, width) before padding, and index int32
  [B / hosts]. Filler rows have the index `buckets.FILLER` and the batch's size.
  Padding has `fill`, of the images' type and channels, and `ignore_label`. Rows
  are dealt to the hosts in turn, so all hosts yield the same number of batches
  of the same shapes. Transforms must not be random. `next` raises `ValueError`
  if an image is larger than its batch. For the rest see `make_train_iterator`.
  """
  for batch in plan:
    _check_hosts(len(batch.indices), host, hosts)

  def load(number: int) -> Batch:
    size, indices = plan[number].size, plan[number].indices[host::hosts]
    batch: Batch = {
      'image': np.full((len(indices), *size, len(fill)), fill, fill.dtype),
      'label': np.full((len(indices), *size), ignore_label, np.uint8),
      'size': np.full((len(indices), 2), size, np.int32),
      'index': np.array(indices, np.int32),
    }
    for row, index in enumerate(indices):
      if index == FILLER:
        continue
      image, label = load_example(source[index], transforms)
      height, width = batch['size'][row] = label.shape
      if height > size[0] or width > size[1]:
        name = source[index]['name'].decode()
        raise ValueError(
          f'record {name!r}: {height} high, {width} wide, above size={size}'
        )
      batch['image'][row, :height, :width] = image
      batch['label'][row, :height, :width] = label
    return batch

  return _iterate(load, range(len(plan)), threads)


def _iterate(
  load: Callable[[int], Batch], steps: range, threads: int, workers: int = 0
) -> Batches:
  """Yields `load` of each step, computed in the background."""
  counts = threads, workers
  require(min(counts) >= 0, 'threads and workers must be at least 0', counts)
  cv2.setNumThreads(0)  # OpenCV's own threads would compete with the loaders
  # More threads would mostly wait for the interpreter.
  threads = threads or min(cores() // max(workers, 1) or 1, 16)
  if not workers:
    return in_background(load, steps, threads, ahead=threads)
  work = cloudpickle.dumps(load)
  rows = [steps[worker::workers] for worker in range(workers)]
  batches = _in_turn([_from_worker(work, row, threads) for row in rows])
  # Programs that do not close it must end, too.
  alive: Any = weakref.ref(batches)
  atexit.register(lambda: (found := alive()) and found.close())
  return batches


def _in_turn(iterators: Sequence[Batches]) -> Batches:
  """Yields one batch of each, again and again; all begin with an empty one."""
  try:
    for iterator in iterators:
      next(iterator)
    for iterator in itertools.cycle(iterators):
      yield next(iterator)
  finally:
    for iterator in iterators:
      iterator.close()


def _from_worker(work: bytes, steps: range, threads: int) -> Batches:
  """Yields an empty batch, then those of the steps, from another process."""
  # The process shares a pipe with this one, and no lock or memory: if it is
  # killed, the pipe ends and nothing is left.
  spawn, failures = multiprocessing.get_context('spawn'), 0
  while True:
    receiver, sender = spawn.Pipe()  # sockets, which are faster than pipes
    process = spawn.Process(target=_work, args=(sender, work, steps, threads))
    process.start()
    sender.close()
    receive, result = receiver.recv_bytes, None
    try:
      if not failures:
        yield {}
      while True:
        result = pickle.loads(receive(), buffers=iter(receive, None))
        if isinstance(result, Exception):
          break
        yield result
        steps, failures = steps[1:], 0
    except (EOFError, OSError):  # in the middle of a batch, OSError
      failures += 1
    finally:
      receiver.close()
      process.kill()
      process.join()
    if isinstance(result, Exception):
      raise result
    ended = f'a loader process ended with status {process.exitcode}'
    if failures == _STARTS:
      raise UserError(
        f'{ended}, {_STARTS} times in a row, as for lack of memory; lower'
        ' config.data.workers'
      )
    log.warning('%s; another goes on', ended)


def _work(sender: Connection, work: bytes, steps: range, threads: int) -> None:
  """Sends the batches of a loader process, until nobody receives them."""
  # A signal to the whole group must leave the workers alive: the parent still
  # trains until its checkpoint is written.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  cv2.setNumThreads(0)
  absl_logging.set_verbosity(absl_logging.ERROR)  # TFDS greets each builder
  try:
    load = pickle.loads(work)
    for batch in in_background(load, steps, threads, ahead=threads):
      arrays: list[Any] = []
      sender.send_bytes(pickle.dumps(batch, 5, buffer_callback=arrays.append))
      for array in arrays:  # without a copy of them
        sender.send_bytes(array.raw())
  except ConnectionError:  # the parent has ended
    pass
  except Exception as error:
    error.add_note(traceback.format_exc())
    sender.send(error)


def load_example(
  record: Record, transforms: Sequence[Transform] = (), seed: Any = 0
) -> Pair:
  """Returns image [H, W, C] and label uint8 [H, W], transformed."""
  rng = np.random.default_rng(seed)
  try:
    image = images.decode_image(record['image'])
    label = images.decode_label(record['label'])
    if image.shape[:2] != label.shape:
      raise ValueError(f'image {image.shape} but label {label.shape}')
  except (ValueError, cv2.error) as error:
    raise UserError(
      f'record {record["name"].decode()!r} of the prepared data set is damaged '
      f'({" ".join(str(error).split())}); remove the folder to prepare it again'
    ) from error
  for transform in transforms:
    image, label = transform(image, label, rng)
  return image, label


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
  rule = f'batch_size must be a positive multiple of hosts={hosts}'
  require(batch_size > 0 and batch_size % hosts == 0, rule, batch_size)
  require(0 <= host < hosts, f'host must be 0 to {hosts - 1}', host)


def in_background(
  function: Callable[[T], R],
  items: Iterable[T],
  threads: int = 0,
  ahead: int = 0,
) -> Generator[R, None, None]:
  """Yields `function` of each item in order, computed ahead in threads.

  With 0 threads there is one per core. Of the results, `ahead` wait at most, by
  default two per thread.
  """
  threads = threads or cores()
  waiting: collections.deque[Any] = collections.deque()
  with ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > (ahead or 2 * threads):
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def cores() -> int:
  """Returns the number of cores that this process may use, if known."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
