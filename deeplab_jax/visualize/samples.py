"""Pages of samples, on which a person sees whether the data are right.

Every class has its samples, the rare ones as well, in their images' own
colours and in those of the palette.
"""

import concurrent.futures
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from deeplab_jax.data import images
from deeplab_jax.data.datasets import DatasetInfo, Tally
from deeplab_jax.visualize import labels as visualize

_PAGE = (3800, 1860)  # largest height and width, without the margin
_PICTURE = 300  # largest width of an image
_TEXT = 20  # height of letters
_CAPTION = 42  # height of the line over a sample
_GAP = 4  # between pictures; these are all in pixels
_CANDIDATES = 24  # images of a class of which its samples are chosen
_CHUNK = 128  # labels read between looks at what is still wanted


def sample_page(
  source: Sequence[dict[str, bytes]],
  info: DatasetInfo,
  tally: Tally,
  title: str,
) -> np.ndarray:
  """Draws samples of every class, image beside label, below a legend.

  The same records give the same page.

  Args:
    source: the records of a split.
    info: its classes.
    tally: its counts.
    title: the first line.

  Returns:
    uint8 [H, W, 3], at most about 2000 pixels wide and 4000 high.
  """
  present = np.flatnonzero(tally.class_pixels).tolist()
  per_class = 3 if len(present) <= 12 else 2 if len(present) <= 30 else 1
  parts = [
    [visualize.legend([(title, None)], _PAGE[1], 32)],
    [_legend(info, tally)],
  ]
  if present:
    height = _PAGE[0] - sum(part.shape[0] for (part,) in parts)
    columns, box = _layout(len(present), per_class, tally, height)
    chosen = _choose(source, tally, per_class)
    tiles = []
    for index in present:
      row = [_tile(source[r], index, info, box) for r in chosen[index]]
      # the classes stand below one another
      tiles += row + [np.full_like(row[0], 255)] * (per_class - len(row))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    parts.append([visualize.grid(rows, 3 * _GAP)])
  page = visualize.grid(parts, 2 * _GAP)
  margins = [(4 * _GAP, 4 * _GAP)] * 2 + [(0, 0)]
  return np.pad(page, margins, constant_values=255)


def _layout(
  num_classes: int, per_class: int, tally: Tally, page_height: int
) -> tuple[int, tuple[int, int]]:
  """Returns how many samples stand in a row, and (height, width) of an image.

  The images are as large as the page allows.
  """
  (height, width), _ = tally.sizes.most_common(1)[0]
  aspect = min(max(height / width, 0.5), 2.0)
  best = 1, 0.0
  for classes in range(1, num_classes + 1):
    rows = -(-num_classes // classes)
    size = min(
      _PICTURE,
      (_PAGE[1] / (classes * per_class) - 4 * _GAP) / 2,
      (page_height / rows - _CAPTION - 3 * _GAP) / aspect,
    )
    best = max(best, (classes * per_class, size), key=lambda pair: pair[1])
  columns, size = best
  return columns, (int(size * aspect), int(size))


def _choose(
  source: Sequence[dict[str, bytes]], tally: Tally, per_class: int
) -> dict[int, list[int]]:
  """Chooses record numbers for each class, from most of it to the median.

  The rarest class chooses first, and none what another has, if it can.
  """
  counts = _count(source, tally)
  chosen: dict[int, list[int]] = {}
  taken: set[int] = set()
  for index in np.argsort(tally.class_images, kind='stable').tolist():
    having = sorted(
      (record for record, pixels in counts.items() if pixels[index]),
      key=lambda record: (-counts[record][index], record),
    )
    fresh = [record for record in having if record not in taken]
    if len(fresh) < per_class:
      fresh = having
    places = np.linspace(0, len(fresh) // 2, per_class).astype(int)
    chosen[index] = [fresh[p] for p in np.unique(places) if p < len(fresh)]
    taken.update(chosen[index])
  return chosen


def _count(
  source: Sequence[dict[str, bytes]], tally: Tally
) -> dict[int, np.ndarray]:
  """Counts the pixels of each class, by record number, in as many as needed.

  Records come in a shuffled order until every class was seen often enough.
  """
  num_classes = len(tally.class_pixels)

  def pixels(record: int) -> np.ndarray:
    label = images.decode_label(source[record]['label'])
    return np.bincount(label.ravel(), minlength=256)[:num_classes]

  order = np.random.default_rng(0).permutation(len(source)).tolist()
  wanted = np.minimum(tally.class_images, _CANDIDATES)
  seen = np.zeros(num_classes, np.int64)
  counts: dict[int, np.ndarray] = {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, len(order), _CHUNK):
      chunk = order[start : start + _CHUNK]
      counts.update(zip(chunk, threads.map(pixels, chunk), strict=True))
      seen += sum(counts[record] > 0 for record in chunk)
      if (seen >= wanted).all():
        break
  return counts


def _tile(
  record: dict[str, bytes], index: int, info: DatasetInfo, box: tuple[int, int]
) -> np.ndarray:
  """Draws one sample of class `index`, image beside label, with its caption."""
  image = images.decode_image(record['image'])
  label = images.decode_label(record['label'])
  shares = visualize.class_shares(label, info.num_classes, info.ignore_label)
  caption = f'{info.classes[index]}  {_percent(shares[index])}'
  caption += f'  {record["name"].decode()}'
  strip = visualize.legend([(caption, info.palette[index].tolist())], 0, _TEXT)
  height, width = label.shape
  scale = min(box[0] / height, box[1] / width)
  size = max(1, round(width * scale)), max(1, round(height * scale))
  picture = visualize.panel(
    [_resize(image, size, Image.Resampling.LANCZOS)],
    None,
    [_resize(label, size, Image.Resampling.NEAREST)],
    info.palette,
    info.ignore_label,
    _GAP,
  )
  tile = np.full((_CAPTION + box[0], 2 * box[1] + _GAP, 3), 255, np.uint8)
  strip = strip[:_CAPTION, : tile.shape[1]]
  tile[: strip.shape[0], : strip.shape[1]] = strip
  tile[_CAPTION : _CAPTION + picture.shape[0], : picture.shape[1]] = picture
  return tile


def _resize(
  array: np.ndarray, size: tuple[int, int], filter: Image.Resampling
) -> np.ndarray:
  return np.asarray(Image.fromarray(array).resize(size, filter))


def _legend(info: DatasetInfo, tally: Tally) -> np.ndarray:
  """Names all classes with their share of pixels and number of images."""
  shares = tally.class_pixels / max(tally.class_pixels.sum(), 1)
  entries = [
    (
      f'{name}  {_percent(share)} in {count:,} images',
      info.palette[index].tolist(),
    )
    for index, (name, share, count) in enumerate(
      zip(info.classes, shares, tally.class_images, strict=True)
    )
  ]
  void = tally.void_pixels / sum(h * w * n for (h, w), n in tally.sizes.items())
  entries.append((f'void  {_percent(void)} of all', visualize.VOID_COLOR))
  return visualize.legend(entries, _PAGE[1], 13 if len(entries) > 40 else 24)


def _percent(share: float) -> str:
  return f'{100 * share:.2f}%'
