"""What the TFDS builders of this package have in common."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2


def records_info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
  """Describes the records that `make_record` makes.

  The metadata is left to the builder: `info` (`DatasetInfo.to_json()`) and
  `splits`, what `Tally.to_json()` gives for each split.
  """
  return tfds.core.DatasetInfo(
    builder=builder,
    description=type(builder).__doc__,
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
