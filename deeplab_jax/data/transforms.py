"""Transforms that move an image and its label together.

Each is a frozen dataclass called as

    image, label = transform(image, label, rng)

with image uint8 RGB [H, W, 3], label uint8 [H, W] and a numpy Generator, the
only source of chance. Images stay in 0..255: the model normalises them on the
device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import cv2
import numpy as np

Transform = Callable[
  [np.ndarray, np.ndarray, np.random.Generator],
  tuple[np.ndarray, np.ndarray],
]

# The mean of ImageNet's pixels, RGB: what the padding of a crop shows.
MEAN_COLOR = (124, 117, 104)


@dataclasses.dataclass(frozen=True)
class RandomScaleCropFlip:
  """Scales, cuts out a window at a random place and mirrors, in one pass.

  Only what the window shows is resized. Its borders fall on whole pixels of the
  image: both axes scale by the factor drawn to within half such a pixel over
  the window. Where the scaled image is smaller than the window, it is padded at
  the bottom and, before it is mirrored, the right.

  Attributes:
    size: height and width of the window.
    scale: smallest and largest factor; uniform between them.
    flip: probability to mirror left and right.
    fill: RGB of the padding in the image.
    ignore_label: of the padding in the label.
  """

  size: tuple[int, int]
  scale: tuple[float, float] = (0.5, 2.0)
  flip: float = 0.5
  fill: tuple[int, int, int] = MEAN_COLOR
  ignore_label: int = 255

  def __post_init__(self) -> None:
    if len(self.size) != 2 or min(self.size) < 1:
      raise ValueError(
        f'crop_size must be (height, width) from 1, got {self.size}'
      )
    if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < 2**31:
      raise ValueError(
        'scale must be (smallest, largest), above 0 and below 2^31, got'
        f' {self.scale}'
      )
    if not 0 <= self.flip <= 1:
      raise ValueError(f'flip must be 0 to 1, got {self.flip}')
    if len(self.fill) != 3 or not all(0 <= v <= 255 for v in self.fill):
      raise ValueError(
        f'fill must be three values in 0..255 (RGB), got {self.fill}'
      )
    if not 0 <= self.ignore_label <= 255:
      raise ValueError(
        f'ignore_label must be 0 to 255, got {self.ignore_label}'
      )

  def __call__(
    self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns image [*size, 3] and label [*size]."""
    factor = rng.uniform(*self.scale)
    rows, height = _draw_span(label.shape[0], self.size[0], factor, rng)
    columns, width = _draw_span(label.shape[1], self.size[1], factor, rng)
    mirrored = rng.random() < self.flip
    left = self.size[1] - width if mirrored else 0
    results = []
    for picture, fill, interpolation in (
      (image, self.fill, cv2.INTER_LINEAR),
      (label, self.ignore_label, cv2.INTER_NEAREST_EXACT),
    ):
      result = np.empty((*self.size, *picture.shape[2:]), np.uint8)
      # numpy copies whole rows, but repeats colours one by one.
      row = np.full(result.shape[1:], fill, np.uint8)
      result[height:] = row
      result[:height, :left] = row[:left]
      result[:height, left + width :] = row[left + width :]
      shown = result[:height, left : left + width]
      # OpenCV writes into `result` itself.
      cv2.resize(
        picture[rows, columns],
        (width, height),
        dst=shown,
        interpolation=interpolation,
      )
      if mirrored:
        cv2.flip(shown, 1, dst=shown)
      results.append(result)
    return results[0], results[1]


def _draw_span(
  length: int, size: int, factor: float, rng: np.random.Generator
) -> tuple[slice, int]:
  """Draws what a window shows along one axis.

  Args:
    length: of the image.
    size: of the window.
    factor: from image to window.
    rng: source of chance.

  Returns:
    The span of the image, and the pixels of the window that it becomes.
  """
  scaled = max(1, round(length * factor))
  shown = min(scaled, size)
  start = int(rng.integers(scaled - shown, endpoint=True))
  first = min(round(start * length / scaled), length - 1)
  last = max(round((start + shown) * length / scaled), first + 1)
  return slice(first, last), shown


@dataclasses.dataclass(frozen=True)
class CenterCrop:
  """Resizes so that the image just covers a window, and cuts out the middle.

  With a square window that is the shorter side resized to its side, the
  validation of many PyTorch repositories.

  Attributes:
    size: height and width of the window.
  """

  size: tuple[int, int]

  def __call__(
    self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns image [*size, 3] and label [*size]; draws no chance."""
    del rng
    pairs = tuple(zip(self.size, label.shape, strict=True))
    factor = max(wanted / has for wanted, has in pairs)
    height, width = (max(round(h * factor), w) for w, h in pairs)
    top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
    middle = np.s_[top : top + self.size[0], left : left + self.size[1]]
    size, nearest = (width, height), cv2.INTER_NEAREST_EXACT
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=nearest)
    return image[middle], label[middle]


@dataclasses.dataclass(frozen=True)
class ColorJitter:
  """Changes the colours; the label stays.

  torchvision's meaning, in the fixed order brightness, contrast, saturation,
  hue, each result rounded to uint8.

  Attributes:
    brightness: the image is multiplied by a factor in [1 - b, 1 + b].
    contrast: blended with its mean gray by such a factor.
    saturation: blended with its own gray by such a factor.
    hue: turned by an angle in [-hue, hue], in turns, at most 0.5.
  """

  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0

  def __post_init__(self) -> None:
    for name in ('brightness', 'contrast', 'saturation'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}')
    if not 0 <= self.hue <= 0.5:
      raise ValueError(f'hue must be 0 to 0.5 turns, got {self.hue}')

  def __call__(
    self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the changed image and the same label."""
    if self.brightness:
      factor = _factor(self.brightness, rng)
      image = cv2.LUT(image, _blend_table(factor, 0.0))
    if self.contrast:
      mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
      image = cv2.LUT(image, _blend_table(_factor(self.contrast, rng), mean))
    if self.saturation:
      factor = _factor(self.saturation, rng)
      gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
      gray = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
      image = cv2.addWeighted(image, factor, gray, 1 - factor, 0)
    if self.hue:
      shift = round(256 * rng.uniform(-self.hue, self.hue)) % 256
      hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
      hsv[..., 0] += np.uint8(shift)  # wraps, as hue does
      image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image, label


def apply_transforms(
  transforms: Sequence[Transform],
  image: np.ndarray,
  label: np.ndarray,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Applies `transforms` in order, all drawing from the one generator."""
  for transform in transforms:
    image, label = transform(image, label, rng)
  return image, label


def pad_to(
  image: np.ndarray,
  label: np.ndarray,
  size: tuple[int, int],
  fill: tuple[int, int, int] = MEAN_COLOR,
  ignore_label: int = 255,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads bottom and right to `size` (height, width).

  Args:
    image: uint8 [H, W, 3], no larger than `size`.
    label: uint8 [H, W].
    size: height and width wanted.
    fill: RGB of the padding in the image.
    ignore_label: of the padding in the label.

  Returns:
    image [*size, 3] and label [*size], contiguous.
  """
  bottom, right = size[0] - label.shape[0], size[1] - label.shape[1]
  if not bottom and not right:
    return np.ascontiguousarray(image), np.ascontiguousarray(label)
  constant, fill = cv2.BORDER_CONSTANT, tuple(int(v) for v in fill)
  return (
    cv2.copyMakeBorder(image, 0, bottom, 0, right, constant, value=fill),
    cv2.copyMakeBorder(
      label, 0, bottom, 0, right, constant, value=int(ignore_label)
    ),
  )


def _factor(strength: float, rng: np.random.Generator) -> float:
  return rng.uniform(max(0.0, 1 - strength), 1 + strength)


def _blend_table(factor: float, other: float) -> np.ndarray:
  """Returns `factor * value + (1 - factor) * other` of 0..255, uint8 [256]."""
  table = factor * np.arange(256) + (1 - factor) * other
  return np.clip(np.rint(table), 0, 255).astype(np.uint8)
