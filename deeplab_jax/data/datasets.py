"""What a data set means and holds.

It is a file beside `records`, so that predictions start without TFDS.
"""

import collections
import dataclasses
import unicodedata
from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from deeplab_jax.data.bands import kind_of
from deeplab_jax.data.transforms import RGB_FILL
from deeplab_jax.runtime.errors import require


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetInfo:
  """The meaning of the label values of one data set, and of its images.

  Images are uint8 RGB, unless they are kept as they are stored: then `mean`
  and `std` were measured, and have a number for each channel.
  """

  name: str
  classes: tuple[str, ...]  # by the value in stored labels
  palette: np.ndarray  # uint8 [C, 3], an RGB color for each class
  ignore_label: int = 255  # stored for void pixels, which no metric counts
  values: tuple[int, ...] = ()  # in the label files; empty for 0..C-1
  void_value: int = -1  # in the label files; -1 for `ignore_label`
  bits: int = 8  # of a channel, 8 or 16
  mean: tuple[float, ...] = ()  # of the training images, as stored
  std: tuple[float, ...] = ()  # of the training images, as stored

  def __post_init__(self) -> None:
    count = len(self.classes)
    void = self.ignore_label if self.void_value < 0 else self.void_value
    palette = np.asarray(self.palette, np.uint8)
    object.__setattr__(self, 'classes', tuple(self.classes))
    object.__setattr__(self, 'values', tuple(self.values or range(count)))
    object.__setattr__(self, 'void_value', void)
    object.__setattr__(self, 'mean', tuple(self.mean))
    object.__setattr__(self, 'std', tuple(self.std))
    object.__setattr__(self, 'palette', palette)
    check_class_names(self.classes[:256])
    shape, fits = palette.shape, count <= self.ignore_label <= 255
    require(shape == (count, 3), f'palette must be [{count}, 3]', shape)
    rule = f'ignore_label must be no class, 0 to {count - 1}, and at most 255'
    require(fits, rule, self.ignore_label)

  @property
  def num_classes(self) -> int:
    """The number of classes, without void."""
    return len(self.classes)

  @property
  def normalization(self) -> dict[str, Any]:
    """Settings of `deeplab_v3`: `mean` and `std`, or none for its preset's."""
    return {'mean': self.mean, 'std': self.std} if self.mean else {}

  @property
  def fill(self) -> np.ndarray:
    """The pixel [C] of the images' type that pads them: the mean color."""
    mean = np.rint(self.mean).astype(f'uint{self.bits}')
    return mean if self.mean else RGB_FILL

  def in_file_values(
    self, label: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns labels, int [H, W], as the data set's own files would hold them.

    That is the values uint8 [H, W], the palette that shows them, uint8 [N, 3],
    and the value of void: what `visualize.indexed_png` takes.
    """
    table = np.arange(256, dtype=np.uint8)
    table[self.ignore_label] = self.void_value
    table[: len(self.values)] = self.values
    palette = np.zeros((max(self.values) + 1, 3), np.uint8)
    palette[list(self.values)] = self.palette
    return table[label], palette, self.void_value

  def list_classes(self) -> list[dict[str, Any]]:
    """Returns what each class is called, and its value and color in a mask."""
    rows = zip(self.classes, self.values, self.palette, strict=True)
    return [
      {'class': i, 'name': n, 'value': v, 'color': f'#{bytes(rgb).hex()}'}
      for i, (n, v, rgb) in enumerate(rows)
    ]

  def to_json(self) -> dict[str, Any]:
    """Returns a dict of plain JSON values, which `from_json` reads."""
    lists = {'classes': list(self.classes), 'values': list(self.values)}
    return {**vars(self), **lists, 'palette': self.palette.tolist()}

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> Self:
    """Reads `to_json`, also of older versions without the last values."""
    return cls(**values)


def check_class_names(names: Iterable[Any]) -> None:
  """Raises `ValueError` for a long name, or one with control characters."""
  kinds = 'Cc', 'Cs', 'Zl', 'Zp'  # controls, half characters, line breaks
  for name in names:
    kept = isinstance(name, str) and len(name) < 256
    kept = kept and not any(unicodedata.category(c) in kinds for c in name)
    require(kept, 'a class name must be short and printable', str(name)[:40])


class Tally:
  """Counts the images and pixels of a split."""

  def __init__(self, num_classes: int, ignore_label: int) -> None:
    self.ignore_label = ignore_label
    self.num_images = self.void_pixels = 0
    # Images of each (height, width).
    self.sizes: collections.Counter[tuple[int, ...]] = collections.Counter()
    zeros = np.zeros(num_classes, np.int64)
    self.class_pixels = zeros.copy()  # of each class
    self.class_images = zeros.copy()  # in which each class occurs
    self.class_image_pixels = zeros.copy()  # of those images, without void
    self.kind, self.bits = 'RGB', 8  # of the images
    self.moments = np.zeros((2, 1))  # sums of `add_image` for each channel

  def add(self, label: np.ndarray) -> list[int]:
    """Adds a label uint8 [H, W] of classes and void; returns its classes."""
    counts = np.bincount(label.ravel(), minlength=256)
    self.void_pixels += int(counts[self.ignore_label])
    counts[self.ignore_label] = 0
    pixels = counts[: len(self.class_pixels)]
    self.num_images += 1
    self.sizes[label.shape] += 1
    self.class_pixels += pixels
    self.class_images += pixels > 0
    self.class_image_pixels += np.where(pixels > 0, pixels.sum(), 0)
    return np.flatnonzero(pixels).tolist()

  def add_image(self, image: np.ndarray) -> None:
    """Adds an image as stored, uint8 or uint16 [H, W, C], all of one kind."""
    sums = np.einsum('hwc->c', image, dtype=float)
    squares = np.einsum('hwc,hwc->c', image, image, dtype=float)
    self.moments = self.moments + np.stack([sums, squares])
    self.kind, self.bits = kind_of(image), 8 * image.itemsize

  def describe_images(self) -> dict[str, Any]:
    """Returns `bits`, `mean` and `std` for a `DatasetInfo`, if they are known.

    The std of a channel that has one value is 1.
    """
    pixels = sum(h * w * count for (h, w), count in self.sizes.items())
    mean, squares = self.moments / max(pixels, 1)
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    std = np.where(std > 1e-3, std, 1)
    known = {'bits': self.bits, 'mean': mean.tolist(), 'std': std.tolist()}
    return {} if self.kind == 'RGB' else known

  def to_json(self) -> dict[str, Any]:
    """Returns a dict of plain JSON values, which `from_json` reads."""
    sizes = [[*size, count] for size, count in sorted(self.sizes.items())]
    arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
    lists = {k: v.tolist() for k, v in arrays.items()}
    return vars(self) | lists | {'sizes': sizes}

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> Self:
    """Reads `to_json`."""
    tally = cls(len(values['class_pixels']), values['ignore_label'])
    for name, value in values.items():
      array = isinstance(getattr(tally, name), np.ndarray)
      setattr(tally, name, np.array(value) if array else value)
    sizes = {(h, w): count for h, w, count in values['sizes']}
    tally.sizes = collections.Counter(sizes)
    return tally


def voc_palette(num: int) -> np.ndarray:
  """Returns the first `num` (at most 256) colors of PASCAL VOC, uint8 [num, 3].

  As in `VOClabelcolormap.m` of the devkit, the bits of the index go to red,
  green and blue in turn, the lowest to the highest places.
  """
  index, place = np.arange(num)[:, None, None], np.arange(8)
  bits = index >> (3 * place + np.arange(3)[:, None]) & 1  # [num, 3, 8]
  return (bits << (7 - place)).sum(-1).astype(np.uint8)


_SHAPES = ('background', 'disc', 'square', 'triangle', 'star', 'ring')
_VOC = (
  'background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car',
  'cat', 'chair', 'cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person',
  'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip

DATASETS: dict[str, DatasetInfo] = {
  'shapes': DatasetInfo('shapes', _SHAPES, voc_palette(len(_SHAPES))),
  'voc2012': DatasetInfo('voc2012', _VOC, voc_palette(len(_VOC))),
}
