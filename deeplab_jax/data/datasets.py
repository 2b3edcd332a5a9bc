"""What a segmentation data set means: class names, colours, ignore label."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetInfo:
  """The meaning of the label values of one data set.

  Attributes:
    name: of the data set.
    classes: one name per class; the index is the value in stored labels.
    palette: uint8 [C, 3], one RGB colour per class.
    ignore_label: label value of void pixels, which no measure counts.
    values: the value of each class in the label files, where the index is
      another; None for 0..C-1.
    void_value: the value of void there; None for `ignore_label`.
  """

  name: str
  classes: tuple[str, ...]
  palette: np.ndarray
  ignore_label: int = 255
  values: tuple[int, ...] | None = None
  void_value: int | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, 'classes', tuple(self.classes))
    values = range(len(self.classes)) if self.values is None else self.values
    object.__setattr__(self, 'values', tuple(values))
    if self.void_value is None:
      object.__setattr__(self, 'void_value', self.ignore_label)
    palette = np.asarray(self.palette, np.uint8)
    object.__setattr__(self, 'palette', palette)
    if palette.shape != (len(self.classes), 3):
      raise ValueError(
        f'palette must have shape ({len(self.classes)}, 3), one colour per '
        f'class, got {palette.shape}'
      )
    if not 0 <= self.ignore_label <= 255:
      raise ValueError(
        f'ignore_label must be 0 to 255, got {self.ignore_label}'
      )
    if self.ignore_label < len(self.classes):
      raise ValueError(
        f'ignore_label {self.ignore_label} is one of the classes, 0 to '
        f'{len(self.classes) - 1}; void must be none'
      )
    if len(self.values) != len(self.classes):
      raise ValueError(
        f'{len(self.values)} values for {len(self.classes)} classes'
      )

  @property
  def num_classes(self) -> int:
    """The number of classes, the ignore label not among them."""
    return len(self.classes)

  def in_file_values(
    self, label: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns a label map as the data set's own files would hold it.

    Args:
      label: int [H, W] of classes and `ignore_label`.

    Returns:
      The values uint8 [H, W], the palette that shows them, uint8 [N, 3], and
      the value of void: what `visualize.indexed_png` takes.
    """
    table = np.arange(256, dtype=np.uint8)
    table[self.ignore_label] = self.void_value
    table[: len(self.values)] = self.values
    palette = np.zeros((max(self.values) + 1, 3), np.uint8)
    palette[list(self.values)] = self.palette
    return table[label], palette, self.void_value

  def to_json(self) -> dict[str, Any]:
    """Returns a dict of plain JSON values; `from_json` reads it."""
    return {
      'name': self.name,
      'classes': list(self.classes),
      'palette': self.palette.tolist(),
      'ignore_label': self.ignore_label,
      'values': list(self.values),
      'void_value': self.void_value,
    }

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> DatasetInfo:
    """Returns the info that `to_json` made `values` of."""
    return cls(
      name=values['name'],
      classes=tuple(values['classes']),
      palette=np.array(values['palette'], np.uint8).reshape(-1, 3),
      ignore_label=int(values['ignore_label']),
      # Absent in what older versions wrote.
      values=values.get('values'),
      void_value=values.get('void_value'),
    )


def voc_palette(num: int) -> np.ndarray:
  """Returns the first `num` (at most 256) VOC colours, uint8 [num, 3].

  The bits of the index are dealt to red, green and blue in turn, the lowest
  bits to the highest places, as in the VOC devkit's `VOClabelcolormap.m`.
  """
  index = np.arange(num, dtype=np.uint8)
  palette = np.zeros((num, 3), np.uint8)
  for place in range(7, -1, -1):
    for channel in range(3):
      palette[:, channel] |= ((index >> channel) & 1) << place
    index >>= 3
  return palette


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
