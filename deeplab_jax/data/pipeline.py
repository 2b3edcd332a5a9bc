"""Batches for training and evaluation, loaded in the background by grain.

Both iterators are pure functions of their arguments: neither the number of
threads nor of workers changes a single pixel.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import cv2
import grain
import numpy as np
from absl import flags

from deeplab_jax.data import buckets, images, transforms
from deeplab_jax.runtime import errors

Record = dict[str, bytes]
Batch = dict[str, np.ndarray]


def make_train_iterator(
  source: Sequence[Record],
  transforms: Sequence[transforms.Transform],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  host: int = 0,
  hosts: int = 1,
  threads: int = 0,
  workers: int = 0,
) -> Iterator[Batch]:
  """Yields shuffled, transformed batches for ever.

  Step `s` is a pure function of `seed` and `s`; the hosts' batches of one step
  together are the batch of a single host.

  Args:
    source: random access to records `image`, `label`, `name`, as of
      `load.Dataset.source`.
    transforms: applied in order; the last must give all images one size.
    batch_size: of all hosts together, divisible by `hosts`; may exceed the
      number of records.
    seed: of shuffling and transforms.
    start_step: the first step to yield.
    host: index of this host.
    hosts: number of hosts.
    threads: that load, per worker; 0 for one a core, at most 16.
    workers: number of processes that load; 0 is this process alone. They are
      spawned: the program needs its `__main__` guard.

  Returns:
    An iterator of image uint8 [B / hosts, h, w, 3] and label uint8
    [B / hosts, h, w]; its `close()` ends the background work.

  Raises:
    UserError: on `next`, if a record does not decode.
    ValueError: if the arguments cannot work together.
  """
  _check_hosts(batch_size, host, hosts)
  if len(source) == 0:
    raise ValueError('source has no records')
  cv2.setNumThreads(0)  # OpenCV's own threads would compete with the loaders
  load = _LoadStep(source, tuple(transforms), batch_size, seed, host, hosts)
  dataset = (
    grain.MapDataset.range(start_step, sys.maxsize)
    .map(load)
    .to_iter_dataset(_read_options(threads, workers))
  )
  if workers:
    if not flags.FLAGS.is_parsed():  # outside absl.app; grain reads its flags
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=2
      ),
      worker_init_fn=_start_worker,
    )
  return iter(dataset)


def make_eval_iterator(
  source: Sequence[Record],
  plan: Sequence[buckets.PlannedBatch],
  transforms: Sequence[transforms.Transform] = (),
  *,
  fill: tuple[int, int, int] = transforms.MEAN_COLOR,
  ignore_label: int = 255,
  host: int = 0,
  hosts: int = 1,
  threads: int = 0,
) -> Iterator[Batch]:
  """Yields the batches of a plan, all images padded to the size of theirs.

  Every host yields the same number of batches of the same shapes.

  Args:
    source: as of `make_train_iterator`.
    plan: as of `buckets.plan_batches`; the rows of each batch are dealt to the
      hosts in turn.
    transforms: applied to each record; without chance.
    fill: RGB of the padding.
    ignore_label: of the padding, and of all filler rows.
    host: index of this host.
    hosts: number of hosts.
    threads: that load; 0 for one a core, at most 16.

  Returns:
    An iterator of image uint8 [B / hosts, *size, 3], label uint8
    [B / hosts, *size], size int32 [B / hosts, 2] (height and width before
    padding; `size` itself in filler rows) and index int32 [B / hosts]
    (`buckets.FILLER` in filler rows); its `close()` ends the background work.

  Raises:
    UserError: on `next`, if a record does not decode.
    ValueError: if the arguments cannot work together; on `next`, if an image
      is larger than its batch.
  """
  for batch in plan:
    _check_hosts(len(batch.indices), host, hosts)
  cv2.setNumThreads(0)
  load = _LoadPadded(
    source,
    tuple(transforms),
    tuple(plan),
    tuple(fill),
    ignore_label,
    host,
    hosts,
  )
  dataset = (
    grain.MapDataset.range(len(plan))
    .map(load)
    .to_iter_dataset(_read_options(threads))
  )
  return iter(dataset)


@dataclasses.dataclass(frozen=True, eq=False)
class _LoadStep:
  """Loads this host's share of the batch of a step.

  Rows are numbered over all steps and hosts. Their number says which record
  they show, in an order that is new in every epoch, and seeds its transforms.
  """

  source: Sequence[Record]
  transforms: tuple[transforms.Transform, ...]
  batch_size: int
  seed: int
  host: int
  hosts: int

  def __call__(self, step: int) -> Batch:
    start = step * self.batch_size
    rows = range(start + self.host, start + self.batch_size, self.hosts)
    batch: Batch = {}
    # One after the other: an image passes through the memory of the one before
    # it, still in the cache, and is copied once.
    for place, row in enumerate(rows):
      epoch, index = divmod(row, len(self.source))
      image, label = transforms.apply_transforms(
        self.transforms,
        *_decode(
          self.source[_order(len(self.source), self.seed, epoch)[index]]
        ),
        np.random.default_rng((self.seed, 1, row)),
      )
      for name, picture in (('image', image), ('label', label)):
        if not place:
          batch[name] = np.empty((len(rows), *picture.shape), np.uint8)
        batch[name][place] = picture
    return batch


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  """The order of the records in an epoch."""
  return np.random.default_rng((seed, 0, epoch)).permutation(count)


@dataclasses.dataclass(frozen=True, eq=False)
class _LoadPadded:
  """Loads this host's rows of one planned batch."""

  source: Sequence[Record]
  transforms: tuple[transforms.Transform, ...]
  plan: tuple[buckets.PlannedBatch, ...]
  fill: tuple[int, int, int]
  ignore_label: int
  host: int
  hosts: int

  def __call__(self, number: int) -> Batch:
    size = self.plan[number].size
    indices = self.plan[number].indices[self.host :: self.hosts]
    images = np.empty((len(indices), *size, 3), np.uint8)
    images[:] = self.fill
    labels = np.full((len(indices), *size), self.ignore_label, np.uint8)
    sizes = np.full((len(indices), 2), size, np.int32)
    for row, index in enumerate(indices):
      if index == buckets.FILLER:
        continue
      image, label = load_example(self.source[index], self.transforms)
      height, width = label.shape
      if height > size[0] or width > size[1]:
        raise ValueError(
          f'record {_name(self.source[index])!r} is {height} high and {width} '
          f'wide, larger than size={size}'
        )
      images[row, :height, :width] = image
      labels[row, :height, :width] = label
      sizes[row] = label.shape
    return {
      'image': images,
      'label': labels,
      'size': sizes,
      'index': np.array(indices, np.int32),
    }


def load_example(
  record: Record, transforms_: Sequence[transforms.Transform] = ()
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the image and label that `make_eval_iterator` pads."""
  return transforms.apply_transforms(
    transforms_, *_decode(record), np.random.default_rng(0)
  )


def _decode(record: Record) -> tuple[np.ndarray, np.ndarray]:
  """Returns image uint8 [H, W, 3] and label uint8 [H, W] of a record."""
  try:
    image = images.decode_image(record['image'])
    label = images.decode_label(record['label'])
    if image.shape[:2] != label.shape:
      raise ValueError(f'image {image.shape} but label {label.shape}')
  except (ValueError, cv2.error) as error:
    raise errors.UserError(
      f'record {_name(record)!r} of the prepared data set is damaged '
      f'({" ".join(str(error).split())}); remove the prepared folder, it will '
      'be made again'
    ) from error
  return image, label


def _name(record: Record) -> str:
  name = record.get('name', b'')
  return name.decode() if isinstance(name, bytes) else str(name)


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
  if batch_size < 1 or batch_size % hosts:
    raise ValueError(
      f'batch_size must be a positive multiple of hosts={hosts}, got '
      f'{batch_size}'
    )
  if not 0 <= host < hosts:
    raise ValueError(f'host must be 0 to {hosts - 1}, got {host}')


def _read_options(threads: int, workers: int = 0) -> grain.ReadOptions:
  if not threads:
    # More would rather wait for the interpreter than work.
    threads = min(cores() // max(workers, 1) or 1, 16)
  # The buffer counts batches here; grain's own 500 would fill the memory.
  return grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=threads + 1
  )


def cores() -> int:
  """Cores that this process may use, where the system tells."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _start_worker(worker: int, workers: int) -> None:
  """Prepares a loader process, so that it ends with its parent, not before."""
  del worker, workers
  cv2.setNumThreads(0)
  # A signal to the whole group must leave the workers alive: the parent still
  # trains until its checkpoint is written.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process().pid

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # the parent was killed; nobody else would end this process

  threading.Thread(target=watch, daemon=True).start()
