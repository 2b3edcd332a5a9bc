"""Transforms that change an image and its label together.

    image, label = transform(image, label, rng)

The image is uint8 RGB [H, W, 3], or of other channels and uint16 if it is kept
as stored, the label uint8 [H, W], and the numpy Generator the only source of
randomness. The model normalizes images on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from deeplab_jax.runtime.errors import require

Array = np.ndarray
Rng = np.random.Generator
Pair = tuple[Array, Array]
Transform = Callable[[Array, Array, Rng], Pair]

# The mean of ImageNet's pixels, RGB: the padding of a crop.
MEAN_COLOR = (124, 117, 104)
RGB_FILL = np.array(MEAN_COLOR, np.uint8)


@dataclasses.dataclass(frozen=True)
class RandomScaleCropFlip:
  """Scales, cuts out a window at a random place and mirrors, in one pass.

  Only what the window shows is resized. Its borders lie on whole pixels of the
  image, so each axis scales by the factor drawn to within half such a pixel
  over the window. Where the scaled image is smaller than the window, it is
  padded at the bottom and, before it is mirrored, at the right.
  """

  size: tuple[int, int]  # height and width of the window
  scale: tuple[float, float] = (0.5, 2.0)  # smallest and largest; uniform
  flip: float = 0.5  # probability to mirror left and right
  ignore_label: int = 255  # of the padding, which has `fill`
  fill: tuple[int, ...] = MEAN_COLOR

  def __post_init__(self) -> None:
    _check_size(self.size)
    low, high = self.scale if len(self.scale) == 2 else (0, 0)
    rule = 'scale must be (smallest, largest) above 0 and below 2^31'
    require(0 < low <= high < 2**31, rule, self.scale)
    flip, void = self.flip, self.ignore_label
    require(0 <= flip <= 1, 'flip must be a probability, 0 to 1', flip)
    require(0 <= void <= 255, 'ignore_label must be 0 to 255', void)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns image [*size, C] and label [*size]."""
    factor = rng.uniform(*self.scale)
    rows, height = _draw_span(label.shape[0], self.size[0], factor, rng)
    columns, width = _draw_span(label.shape[1], self.size[1], factor, rng)
    mirrored = rng.random() < self.flip
    left = self.size[1] - width if mirrored else 0
    results = []
    for picture, fill, interpolation in (
      (image, self.fill, cv2.INTER_LINEAR),
      (label, (self.ignore_label,), cv2.INTER_NEAREST_EXACT),
    ):
      # numpy copies whole rows, but repeats colors one by one.
      shape = 1, self.size[1], *picture.shape[2:]
      row = np.full(shape, fill, picture.dtype)
      result = row.repeat(self.size[0], axis=0)
      shown, size = result[:height, left : left + width], (width, height)
      # OpenCV writes into `result` itself.
      cv2.resize(picture[rows, columns], size, shown, 0, 0, interpolation)
      if mirrored:
        cv2.flip(shown, 1, shown)
      results.append(result)
    return results[0], results[1]


def _draw_span(
  length: int, size: int, factor: float, rng: Rng
) -> tuple[slice, int]:
  """Draws a span of an axis, and the pixels of the window that it becomes."""
  scaled = max(1, round(length * factor))
  shown = min(scaled, size)
  start = int(rng.integers(scaled - shown, endpoint=True))
  first = min(round(start * length / scaled), length - 1)
  last = max(round((start + shown) * length / scaled), first + 1)
  return slice(first, last), shown


def _check_size(size: Sequence[int]) -> None:
  if len(size) != 2 or min(size) < 1:
    raise ValueError(f'crop_size must be (height, width) from 1, got {size}')


@dataclasses.dataclass(frozen=True)
class CenterCrop:
  """Resizes so that the image just covers a window, and cuts out the middle.

  Many PyTorch repositories validate so, with a square window.
  """

  size: tuple[int, int]  # height and width of the window

  def __post_init__(self) -> None:
    _check_size(self.size)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns image [*size, C] and label [*size]; draws nothing from `rng`."""
    pairs = tuple(zip(self.size, label.shape, strict=True))
    factor = max(wanted / has for wanted, has in pairs)
    height, width = (max(round(h * factor), w) for w, h in pairs)
    top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
    middle = np.s_[top : top + self.size[0], left : left + self.size[1]]
    size, nearest = (width, height), cv2.INTER_NEAREST_EXACT
    channels = image.shape[2]
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    image = image.reshape(height, width, channels)  # OpenCV drops a single one
    label = cv2.resize(label, size, interpolation=nearest)
    return image[middle], label[middle]


@dataclasses.dataclass(frozen=True)
class ColorJitter:
  """Changes the colors as torchvision does; the label stays.

  Strengths are of brightness, contrast, saturation and hue, applied in this
  order, each rounded to the type. Factors are uniform in [1 - s, 1 + s]: they
  multiply the image, blend it with its mean gray, and blend it with its own
  gray. The hue is rotated by up to `s` turns either way. Only uint8 RGB has
  saturation and hue; the mean gray of other images is that of all values.
  """

  strengths: tuple[float, float, float, float]  # 0 changes nothing

  def __post_init__(self) -> None:
    valid = len(self.strengths) == 4 and self.strengths[3] <= 0.5
    if not valid or not all(strength >= 0 for strength in self.strengths):
      raise ValueError(
        'color_jitter must be four strengths from 0 (brightness, contrast, '
        f'saturation, hue), the hue up to 0.5, got {self.strengths}'
      )

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns the changed image and the same label."""
    brightness, contrast, saturation, hue = self.strengths
    if brightness:
      image = _blend(image, _factor(brightness, rng), 0.0)
    if contrast:
      is_rgb = image.shape[2] == 3 and image.dtype == np.uint8
      gray = image.reshape(len(image), -1)
      gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if is_rgb else gray
      image = _blend(image, _factor(contrast, rng), cv2.mean(gray)[0])
    if saturation:
      factor = _factor(saturation, rng)
      gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
      gray = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
      image = cv2.addWeighted(image, factor, gray, 1 - factor, 0)
    if hue:
      shift = round(256 * rng.uniform(-hue, hue)) % 256
      hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
      hsv[..., 0] += np.uint8(shift)  # wraps, as hue does
      image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image, label


def _factor(strength: float, rng: Rng) -> float:
  return rng.uniform(max(0.0, 1 - strength), 1 + strength)


def _blend(image: Array, factor: float, other: float) -> Array:
  """Returns `factor * image + (1 - factor) * other`, rounded to its type."""
  most = np.iinfo(image.dtype).max
  table = factor * np.arange(most + 1) + (1 - factor) * other
  table = np.clip(np.rint(table), 0, most).astype(image.dtype)
  if image.dtype == np.uint8:
    return cv2.LUT(image, table).reshape(image.shape)
  return table[image]
