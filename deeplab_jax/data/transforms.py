"""Transforms that change an image and its label together.

    image, label = transform(image, label, rng)

The image is uint8 RGB [H, W, 3], or of other channels and uint16 if it is kept
as stored, the label uint8 [H, W], and the numpy Generator the only source of
randomness. The model normalizes images on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import cv2
import numpy as np

from deeplab_jax.data.labels import count_values
from deeplab_jax.runtime.errors import UserError, first_line, require

Array = np.ndarray
Rng = np.random.Generator
Pair = tuple[Array, Array]
Transform = Callable[[Array, Array, Rng], Pair]

# The mean of ImageNet's pixels, RGB: the padding of a crop.
MEAN_COLOR = (124, 117, 104)
_MORE_CROPS = 10  # at most, after one that a single class fills
# Spans of rows and columns, each with the pixels of the window that it becomes;
# whether it is mirrored; the angle.
_Place: TypeAlias = tuple[Sequence[tuple[slice, int]], bool, float]
RGB_FILL = np.array(MEAN_COLOR, np.uint8)


@dataclasses.dataclass(frozen=True)
class RandomScaleCropFlip:
  """Scales, cuts out a window at a random place, mirrors, turns, in one pass.

  Only what the window shows is resized. Its borders lie on whole pixels of the
  image, so each axis scales by the factor drawn to within half such a pixel
  over the window. Where the scaled image is smaller than the window, it is
  padded at the bottom and, before it is mirrored, at the right. It turns about
  the center of the window; corners show what the image has there, or padding.

  Place, mirroring and angle are drawn again, up to 10 times, while one class
  fills more than `max_share` of what is not void, or all is void. The last draw
  stays. It is `cat_max_ratio` of MMSegmentation's `RandomCrop`, often 0.75.
  """

  size: tuple[int, int]  # height and width of the window
  scale: tuple[float, float] = (0.5, 2.0)  # smallest and largest; uniform
  flip: float = 0.5  # probability to mirror left and right
  rotate: float = 0.0  # largest angle either way, in degrees; uniform
  max_share: float = 1.0  # 1 takes the first crop
  ignore_label: int = 255  # of the padding, which has the color `fill`
  fill: tuple[int, ...] = MEAN_COLOR

  def __post_init__(self) -> None:
    _check_size(self.size)
    low, high = self.scale if len(self.scale) == 2 else (0, 0)
    rule = 'scale must be (smallest, largest) above 0 and below 2^31'
    require(0 < low <= high < 2**31, rule, self.scale)
    flip, void = self.flip, self.ignore_label
    require(0 <= flip <= 1, 'flip must be a probability, 0 to 1', flip)
    rotate, share = self.rotate, self.max_share
    require(0 <= rotate <= 180, 'rotate must be 0 to 180 degrees', rotate)
    require(0 < share <= 1, 'crop_max_share must be above 0, up to 1', share)
    require(0 <= void <= 255, 'ignore_label must be 0 to 255', void)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns image [*size, C] and label [*size]."""
    factor, void = rng.uniform(*self.scale), self.ignore_label
    for _ in range(1 + _MORE_CROPS):
      lengths = zip(label.shape, self.size, strict=True)
      spans = [_draw_span(*pair, factor, rng) for pair in lengths]
      mirrored, most = rng.random() < self.flip, self.rotate
      place = spans, mirrored, rng.uniform(-most, most) if most else 0.0
      window = self._look(label, (void,), cv2.INTER_NEAREST_EXACT, place)
      if self.max_share == 1:
        break
      counts = count_values(window)
      counts[void] = 0
      if 0 < counts.max() <= self.max_share * counts.sum():
        break
    return self._look(image, self.fill, cv2.INTER_LINEAR, place), window

  def _look(
    self, picture: Array, fill: tuple[int, ...], how: int, place: _Place
  ) -> Array:
    """Returns what the window shows of an image or a label."""
    if self.rotate:
      return self._look_turned(picture, fill, how, place)
    ((rows, height), (columns, width)), mirrored, _ = place
    # numpy copies whole rows, but repeats colors one by one.
    row = np.full((1, self.size[1], *picture.shape[2:]), fill, picture.dtype)
    result = row.repeat(self.size[0], axis=0)
    left = self.size[1] - width if mirrored else 0
    shown, size = result[:height, left : left + width], (width, height)
    # OpenCV writes into `result` itself.
    cv2.resize(picture[rows, columns], size, shown, 0, 0, how)
    if mirrored:
      cv2.flip(shown, 1, shown)
    return result

  def _look_turned(
    self, picture: Array, fill: tuple[int, ...], how: int, place: _Place
  ) -> Array:
    (spans, mirrored, angle), (y, x) = place, (n - 1 for n in self.size)
    # From (x, y, 1) in the window to (x, y) in the image; pixels have whole
    # numbers: turns back, mirrors back, scales.
    matrix = cv2.getRotationMatrix2D((x / 2, y / 2), -angle, 1)
    if mirrored:
      matrix[0] = np.array([0, 0, x]) - matrix[0]
    for row, (span, shown) in zip(matrix, reversed(spans), strict=True):
      pixels = (span.stop - span.start) / shown
      row *= pixels
      row[2] += span.start + (pixels - 1) / 2
    how = cv2.INTER_LINEAR if how == cv2.INTER_LINEAR else cv2.INTER_NEAREST
    how, size, parts = how | cv2.WARP_INVERSE_MAP, self.size[::-1], []
    for first in range(0, len(fill), 4):  # the colors that OpenCV can fill
      color, part = fill[first : first + 4], np.atleast_3d(picture)
      part = part[..., first : first + 4]
      part = cv2.warpAffine(part, matrix, size, flags=how, borderValue=color)
      parts.append(part)
    return np.dstack(parts).reshape(*self.size, *picture.shape[2:])


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


@dataclasses.dataclass(frozen=True)
class GaussianBlur:
  """Blurs the image; its sigma is uniform in [0, `largest`] pixels.

  Chen et al., "A Simple Framework for Contrastive Learning of Visual
  Representations" (2020), draw it up to 2, nnU-Net (below) up to 1.5.
  """

  largest: float

  def __post_init__(self) -> None:
    require(0 <= self.largest <= 100, 'blur must be 0 to 100', self.largest)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns the blurred image and the same label."""
    sigma = max(rng.uniform(0, self.largest), 1e-3)  # for 0 OpenCV chooses
    blurred = cv2.GaussianBlur(image, (0, 0), sigma)
    return blurred.reshape(image.shape), label


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
  """Adds to each value its own noise, rounds and clips.

  The sigma of an image is uniform in [0, `largest`] levels of 0..255. Isensee
  et al., "nnU-Net" (2021); Bishop, "Training with Noise is Equivalent to
  Tikhonov Regularization" (1995).
  """

  largest: float

  def __post_init__(self) -> None:
    require(0 <= self.largest <= 255, 'noise must be 0 to 255', self.largest)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns the noisy image and the same label."""
    levels = np.iinfo(image.dtype).max / 255
    sigma = rng.uniform(0, self.largest) * levels
    # OpenCV needs a quarter of numpy's time. Its state is that of the thread.
    cv2.setRNGSeed(int(rng.integers(2**31)))
    flat = image.reshape(len(image), -1)
    noise = np.empty(flat.shape, np.float32)
    cv2.randn(noise, np.zeros(1), np.array([sigma]))
    kind = cv2.CV_8U if levels == 1 else cv2.CV_16U
    return cv2.add(flat, noise, dtype=kind).reshape(image.shape), label


@dataclasses.dataclass(frozen=True)
class Cutout:
  """Fills a rectangle of `size` times height and width; the label stays.

  Its center is uniform, so a part of it may lie outside. DeVries & Taylor,
  "Improved Regularization of Convolutional Neural Networks with Cutout" (2017),
  keep the target as well: the surroundings tell what is hidden.
  """

  size: float
  fill: tuple[int, ...] = MEAN_COLOR

  def __post_init__(self) -> None:
    require(0 <= self.size <= 1, 'cutout must be 0 to 1', self.size)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns the image with the rectangle, and the same label."""
    sides = [round(self.size * length) for length in label.shape]
    starts = rng.integers(label.shape) - np.floor_divide(sides, 2)
    ends = starts + sides
    image = image.copy()
    image[tuple(map(slice, np.maximum(starts, 0), ends))] = self.fill
    return image, label


@dataclasses.dataclass(frozen=True)
class OfRecipe:
  """A transform from elsewhere, whose results are checked.

  Raises `UserError` if the function fails, changes types or sizes, or gives the
  label a value that is neither a class nor void.
  """

  function: Transform
  num_classes: int
  ignore_label: int = 255

  def __post_init__(self) -> None:
    rule = 'transforms must be functions of a recipe, named by --config=RECIPE'
    require(callable(self.function), rule, self.function)

  def __call__(self, image: Array, label: Array, rng: Rng) -> Pair:
    """Returns what the function returns."""
    name = getattr(self.function, '__name__', self.function)
    culprit = f'config.data.transforms: {name}'
    expected = _kinds(image, label)
    try:
      image, label = self.function(image, label, rng)
      found = _kinds(image, label)
    except Exception as error:
      raise UserError(f'{culprit} failed: {first_line(error)}') from error
    if found != expected:
      raise UserError(f'{culprit} must return {expected}, got {found}')
    counts = count_values(label)
    counts[: self.num_classes] = counts[self.ignore_label] = 0
    if counts.any():
      raise UserError(
        f'{culprit} gave a label the value {counts.argmax()}, which is neither '
        f'one of {self.num_classes} classes nor void, {self.ignore_label}'
      )
    return image, label


def _kinds(*arrays: Array) -> str:
  return ' and '.join(f'{array.dtype} {list(array.shape)}' for array in arrays)
