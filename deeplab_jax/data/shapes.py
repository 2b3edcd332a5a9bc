"""The embedded data set: scenes of textured shapes, drawn when first needed.

Shapes are vivid on a dull ground, each class varies about a hue of its own, and
textures are the same for all: a network that sees form and color learns them in
a minute. Shapes overlap, and the frame cuts some of them.
"""

import colorsys
import dataclasses
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data import datasets, records
from deeplab_jax.data.images import encode_image
from deeplab_jax.data.pipeline import in_background

Array = np.ndarray
Rng = np.random.Generator
Size = tuple[int, int]

_INFO = datasets.DATASETS['shapes']
_HUES = _INFO.num_classes - 1
_SUPERSAMPLING = 4  # draws outlines finer than a pixel, to smooth them


@dataclasses.dataclass(eq=False, kw_only=True)
class ShapesConfig(records.SourceConfig):
  """The number of scenes by split."""

  train: int = 400
  val: int = 64

  def __post_init__(self) -> None:
    # With the size of the scenes and the seed, which are the same for all.
    self.name = f'144x192_train{self.train}_val{self.val}_seed0'


class ShapesSegmentation(records.RecordsBuilder):
  """TFDS builder of the embedded data set."""

  VERSION = tfds.core.Version('1.2.0')  # a new one for every new look

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    self.info.metadata['info'] = _INFO.to_json()
    count, void = _INFO.num_classes, _INFO.ignore_label
    return {
      split: (datasets.Tally(count, void), self._generate_examples(split))
      for split in ('train', 'val')
    }

  def _generate_examples(self, split: str) -> Iterator[records.Sample]:
    stream = ('train', 'val').index(split)

    def draw(index: int) -> records.Sample:
      # A seed per scene: a longer split begins with the same scenes.
      rng = np.random.default_rng((0, stream, index))
      image, label = generate_scene(rng)
      name = f'{split}_{index:05d}'
      return records.Sample(name, f'{name}.png', encode_image(image), label)

    return in_background(draw, range(getattr(self.builder_config, split)))


def load(*, prepared_dir: str, ignore_label: int) -> records.Builders:
  """Loads both splits, see `load.load_dataset`."""
  records.require_ignore_label(_INFO, ignore_label)
  builder = records.prepared(ShapesSegmentation, prepared_dir, ShapesConfig())
  return dict.fromkeys(builder.info.splits, builder)


def generate_scene(rng: Rng, size: Size = (144, 192)) -> tuple[Array, Array]:
  """Draws two to four overlapping shapes on a textured ground.

  `size` is (height, width), at least 32 each. A pure function of the
  generator's state. Returns image uint8 RGB [H, W, 3], and label uint8 [H, W]:
  0 for the ground, 1 to 5 in the order of `DATASETS['shapes'].classes`, 255 on
  the outlines.
  """
  if min(size) < 32:
    raise ValueError(f'size must be at least 32 by 32, got {size}')
  gray = rng.uniform(50, 205)
  tint = rng.uniform(-12, 12, 3)
  image = _texture(rng, size, gray + tint, rng.uniform(-50, 50))
  label = np.zeros(size, np.uint8)
  placed: list[tuple[Array, Array]] = []
  for _ in range(rng.integers(2, 5)):
    shape = int(rng.integers(1, _INFO.num_classes))
    cover = _place(rng, size, _INFO.classes[shape], placed)
    if cover is None:
      continue
    color = _vivid_color(rng, shape)
    texture = _texture(rng, size, color, rng.uniform(-50, 50, 3))
    image += cover[..., None] * (texture - image)
    inside = (cover >= 0.5).astype(np.uint8)
    label[inside > 0] = shape
    square, border = np.ones((3, 3), np.uint8), cv2.BORDER_REPLICATE
    gradient = cv2.MORPH_GRADIENT
    outline = cv2.morphologyEx(inside, gradient, square, borderType=border)
    label[outline > 0] = _INFO.ignore_label
  image += rng.normal(0, 4, (*size, 1))
  return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def _place(
  rng: Rng, size: Size, shape: str, placed: list[tuple[Array, Array]]
) -> Array | None:
  """Finds a place for a shape that leaves most of every shape visible.

  `placed` holds the pixels of each earlier shape and those of them that are
  still visible, both bool [H, W]; it is updated. Returns the share of each
  pixel covered, float32 [H, W], or None.
  """
  for _ in range(10):
    cover, whole_area = _draw(rng, size, shape)
    inside = cover >= 0.5
    if inside.sum() >= 0.75 * whole_area and all(
      (seen & ~inside).sum() >= 0.6 * whole.sum() for whole, seen in placed
    ):
      placed[:] = [(whole, seen & ~inside) for whole, seen in placed]
      placed.append((inside, inside))
      return cover
  return None


def _draw(rng: Rng, size: Size, shape: str) -> tuple[Array, float]:
  """Draws one shape of random size, place and angle.

  Returns the share of each pixel covered, float32 [H, W], and the area in
  pixels of the whole shape, with what lies outside the frame.
  """
  height, width = size
  radius = rng.uniform(0.25, 0.42) * min(size)
  center = rng.uniform((0, 0), (width, height))
  outline = _outline(shape, rng.uniform(-0.35, 0.35)) * radius
  fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
  points = np.rint((outline + center) * _SUPERSAMPLING).astype(np.int32)
  cv2.fillPoly(fine, [points], 255)
  area = cv2.contourArea(outline.astype(np.float32))
  if shape == 'ring':
    hole = np.rint((0.5 * outline + center) * _SUPERSAMPLING)
    cv2.fillPoly(fine, [hole.astype(np.int32)], 0)
    area *= 1 - 0.5**2
  cover = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
  return cover.astype(np.float32) / 255, area


def _outline(shape: str, angle: float) -> Array:
  """Returns the corners (x, y), [N, 2], of a shape of radius 1, turned."""
  corners = {'disc': 64, 'ring': 64, 'square': 4, 'triangle': 3, 'star': 10}
  count = corners[shape]
  start = angle - np.pi / (4 if shape == 'square' else 2)
  angles = start + 2 * np.pi * np.arange(count) / count
  points = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  if shape == 'star':
    points[1::2] *= 0.5
  return points


def _vivid_color(rng: Rng, shape: int) -> Array:
  """Returns an RGB near the usual hue of the class, float64 [3]."""
  hue = (shape / _HUES + rng.normal(0, 0.03)) % 1
  value = rng.uniform(170, 255)
  return np.multiply(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1), 1), value)


def _texture(rng: Rng, size: Size, color: Array, other: float | Array) -> Array:
  """Returns a pattern of `color` and `color + other`, float32 [H, W, 3]."""
  height, width = size
  y, x = np.mgrid[:height, :width].astype(np.float32)
  angle = rng.uniform(0, 2 * np.pi)
  along = np.cos(angle) * x + np.sin(angle) * y
  across = np.cos(angle) * y - np.sin(angle) * x
  period = rng.uniform(4, 10)
  kind = rng.integers(5)
  if kind == 0:  # stripes, checks, blobs, a slope or grain
    mask = np.sin(2 * np.pi * along / period) > 0
  elif kind == 1:
    wave = 2 * np.pi / period
    mask = np.sin(wave * along) * np.sin(wave * across) > 0
  elif kind == 2:
    coarse = rng.random((height // 8, width // 8), np.float32)
    mask = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
  elif kind == 3:
    mask = (along - along.min()) / np.ptp(along)
  else:
    mask = rng.random(size, np.float32)
  mask = np.asarray(mask, np.float32)[..., None]
  return np.clip(color + mask * other, 0, 255).astype(np.float32)
