"""What the TFDS builders of this package have in common."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from deeplab_jax.runtime import errors

log = logging.getLogger(__name__)

_CHUNK = 64  # records in memory at once
_SHARD = 4096  # records in a file

_Item = TypeVar('_Item', bound='Item')
_T = TypeVar('_T')
_Read = TypeVar('_Read')


@dataclasses.dataclass(eq=False, kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
  """Names what is prepared from files that may change.

  Attributes:
    name: of the prepared set, `prefix` and a `fingerprint` of the source.
    prefix: common to all preparations of one source.
  """

  name: str = ''
  prefix: str = ''


def fingerprint(*values: Any) -> str:
  """Returns 12 hex digits that change with the values, plain JSON ones."""
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def split_key(split: str) -> str:
  """Returns the name under which TFDS stores a split.

  TFDS takes no dots, spaces or brackets, and 'all' means something else to it.
  """
  if re.fullmatch('[a-z][a-z0-9_]{0,39}', split) and split != 'all':
    return split
  readable = re.sub('[^a-z0-9]+', '_', split.lower())[:20]
  return f'list_{readable}_{fingerprint(split)[:8]}'


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
  """Stores records in the order in which they are generated.

  TFDS itself shuffles a split in memory, and needs TensorFlow where it exceeds
  1 GB.

  The metadata holds `names`, the ids of each split; the builders add `info`
  (`DatasetInfo.to_json()`) and `splits`, what `Tally.to_json()` gives for each
  split.
  """

  code_path = None  # no checksums to look for; TFDS fails where it looks

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.Image(shape=(None, None, 1)),
          'name': tfds.features.Text(),
          'file_name': tfds.features.Text(),
          'height': tfds.features.Scalar(np.int32),
          'width': tfds.features.Scalar(np.int32),
        }
      ),
      metadata=tfds.core.MetadataDict(),
    )

  def _download_and_prepare(
    self, dl_manager: Any, download_config: Any = None
  ) -> None:
    generators = self._split_generators(dl_manager)
    # that of the temporary folder, which TFDS renames in the end
    written = self._info()
    writer = tfds.core.SequentialWriter(
      written, max_examples_per_shard=_SHARD, file_format='array_record'
    )
    names = self.info.metadata['names'] = {}
    for split, examples in generators.items():
      writer.initialize_splits([split_key(split)])
      names[split] = []
      quiet = not sys.stderr.isatty()
      examples = iter(
        tqdm(examples, split, unit=' images', leave=False, disable=quiet)
      )
      while chunk := list(itertools.islice(examples, _CHUNK)):
        names[split] += [name for name, _ in chunk]
        chunk_records = [record for _, record in chunk]
        writer.add_examples({split_key(split): chunk_records})
    writer.close_all()
    self.info.set_splits(written.splits)


def make_record(
  name: str, file_name: str, image: bytes, label: bytes, size: tuple[int, int]
) -> dict[str, Any]:
  """One record as a builder yields it.

  Args:
    name: the id in its list.
    file_name: of the original image, without its folder.
    image: JPEG or PNG bytes.
    label: bytes of a gray PNG of class indices.
    size: (height, width) of both.
  """
  return {
    'image': io.BytesIO(image),
    'label': io.BytesIO(label),
    'name': name,
    'file_name': file_name,
    'height': size[0],
    'width': size[1],
  }


class Item(Protocol):
  """One listed image: its id, and its two files as messages name them."""

  name: str
  image: Any
  label: Any


def readable(
  items: Iterable[_Item],
  read: Callable[[_Item], _Read],
  *,
  split: str,
  on_bad_image: str,
) -> Iterator[tuple[_Item, _Read]]:
  """Yields each item with what `read` makes of it, in order.

  Args:
    items: the images of the split.
    read: called on all cores; raises `UnreadableError` where a file is no whole
      image.
    split: its name, for messages.
    on_bad_image: 'stop' at such a file, or 'skip' its item.

  Raises:
    UserError: naming the file.
  """

  def attempt(item: _Item) -> tuple[_Item, Any]:
    try:
      return item, read(item)
    except errors.UnreadableError as error:
      return item, error

  for item, value in in_threads(items, attempt):
    if not isinstance(value, errors.UnreadableError):
      yield item, value
    elif on_bad_image == 'stop':
      raise errors.UserError(
        f"{value}, or set config.data.on_bad_image='skip'"
      ) from value
    else:
      log.warning('Skipped %r of split %r: %s', item.name, split, value)


def in_threads(
  items: Iterable[_T], function: Callable[[_T], _Read]
) -> Iterator[_Read]:
  """Yields the function's results in order, computed on all cores."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    while chunk := list(itertools.islice(items, _CHUNK)):
      yield from threads.map(function, chunk)


def check_size(
  item: Item, image_size: tuple[int, ...], label_size: tuple[int, ...]
) -> None:
  """Raises `UserError` unless both sizes (height, width) are the same."""
  if image_size != label_size:
    raise errors.UserError(
      f'{item.label}: label is {label_size[1]}x{label_size[0]} but its image '
      f'{item.image} is {image_size[1]}x{image_size[0]}; make them the same '
      'size'
    )


def check_values(
  item: Item,
  label: np.ndarray,
  num_classes: int,
  ignore_label: int,
  *,
  remedy: str,
) -> None:
  """Raises `UserError` unless a label uint8 [H, W] holds classes and void.

  Args:
    item: of the label.
    label: the class indices.
    num_classes: they are below it,
    ignore_label: or this.
    remedy: what to correct, for the error.
  """
  counts = np.bincount(label.ravel(), minlength=256)
  counts[:num_classes] = 0
  counts[ignore_label] = 0
  if counts.any():
    value = int(counts.argmax())
    raise errors.UserError(
      f'{item.label}: label value {value} ({counts[value]} pixels) is neither '
      f'one of the {num_classes} classes nor the ignore label {ignore_label}; '
      f'correct {remedy}'
    )


class Records(Sequence[dict[str, Any]]):
  """The records of `make_record` at random access, images as their bytes."""

  def __init__(self, serialized: Sequence[bytes]) -> None:
    """Wraps `builder.as_data_source(split, deserialize_method=RAW_BYTES)`."""
    self._serialized = serialized

  def __len__(self) -> int:
    return len(self._serialized)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return map(self.__getitem__, range(len(self)))

  def __getitem__(self, index: int) -> dict[str, Any]:
    # TFDS's own parser takes several times as long, as it makes arrays of all.
    example = tf_example_pb2.Example.FromString(self._serialized[index])
    return {
      name: (feature.bytes_list.value or feature.int64_list.value)[0]
      for name, feature in example.features.feature.items()
    }


class Tally:
  """Counts what a split holds, while its labels pass by.

  Attributes:
    num_images: how many labels were added.
    sizes: number of images by (height, width).
    class_pixels: int64 [C], pixels of each class.
    class_images: int64 [C], images in which each class occurs.
    class_image_pixels: int64 [C], the pixels that are not void of those images.
    void_pixels: pixels of the ignore label.
  """

  def __init__(self, num_classes: int, ignore_label: int) -> None:
    self._ignore_label = ignore_label
    self.num_images = 0
    self.sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    self.class_pixels = np.zeros(num_classes, np.int64)
    self.class_images = np.zeros(num_classes, np.int64)
    self.class_image_pixels = np.zeros(num_classes, np.int64)
    self.void_pixels = 0

  def add(self, label: np.ndarray) -> None:
    """Adds a label uint8 [H, W] of classes and void."""
    counts = np.bincount(label.ravel(), minlength=256)
    self.void_pixels += int(counts[self._ignore_label])
    counts[self._ignore_label] = 0
    pixels = counts[: len(self.class_pixels)]
    self.num_images += 1
    self.sizes[label.shape] += 1
    self.class_pixels += pixels
    self.class_images += pixels > 0
    self.class_image_pixels += np.where(pixels > 0, pixels.sum(), 0)

  @property
  def max_size(self) -> tuple[int, int]:
    """The largest height and the largest width, not always of one image."""
    height, width = np.max(list(self.sizes), axis=0).tolist()
    return height, width

  def to_json(self) -> dict[str, Any]:
    """Returns a dict of plain JSON values; `from_json` reads it."""
    return {
      'num_images': self.num_images,
      'ignore_label': self._ignore_label,
      'sizes': [[*size, count] for size, count in sorted(self.sizes.items())],
      'class_pixels': self.class_pixels.tolist(),
      'class_images': self.class_images.tolist(),
      'class_image_pixels': self.class_image_pixels.tolist(),
      'void_pixels': self.void_pixels,
    }

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> Tally:
    """Returns the tally that `to_json` made `values` of."""
    tally = cls(len(values['class_pixels']), values['ignore_label'])
    tally.num_images = values['num_images']
    tally.void_pixels = values['void_pixels']
    tally.sizes.update({(h, w): count for h, w, count in values['sizes']})
    for name in ('class_pixels', 'class_images', 'class_image_pixels'):
      setattr(tally, name, np.array(values[name], np.int64))
    return tally
