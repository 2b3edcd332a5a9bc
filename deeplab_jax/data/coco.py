"""The layout of COCO: instances in a JSON file, drawn as labels.

Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014). The format
is described at https://cocodataset.org/#format-data.
"""

import collections
import contextlib
import functools
import glob
import json as json_text
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.data import folder_files, layouts
from deeplab_jax.data.image_files import Made
from deeplab_jax.data.images import encode_label
from deeplab_jax.data.records import Item, Listing
from deeplab_jax.runtime.errors import UserError, first_line, require
from deeplab_jax.runtime.files import read_bytes

_BACKGROUND, _VOID = 0, 255
_Json = Mapping[str, Any]


def coco(
  root: Path,
  split: str,
  *,
  json: str = 'annotations/instances_{split}*.json',
  images: str = '',
  holdout: float = 0.2,
) -> Listing:
  """Images, and their instances in a JSON file.

  `json` is a glob; without `{split}` the file holds all splits, and `holdout`
  is the share of `val`. `images` is a folder, by default the one of SPLIT*,
  images/SPLIT*, images and the root that holds the first image.
  """
  pattern = json.replace('{split}', split)
  paths = glob.glob(pattern, root_dir=root)
  if len(paths) != 1:
    there = sorted(glob.glob(json.replace('{split}', '*'), root_dir=root))
    raise UserError(
      f'{root / pattern}: {len(paths)} such files, and one is needed; set '
      'the split or config.data.options.json; there is '
      f'{", ".join(there) or "none"}'
    )
  path, own = root / paths[0], collections.defaultdict(list)
  with _as_defined(path):
    content = json_text.loads(read_bytes(path, 2**33))
    names, values = _classes(content['categories'])
    for each in content['annotations']:
      if each['category_id'] not in values:
        raise KeyError(f'category {each["category_id"]}')
      own[each['image_id']].append(each)
    listed = [(str(x['file_name']), x, own[x['id']]) for x in content['images']]
    require(bool(listed), 'a split must have images', 'none')
    folder_files.refuse_repeats(path, [name for name, *_ in listed])
    ids = [f'image {x["id"]}' for x in content['images']]
    folder_files.refuse_repeats(path, ids)
  folder = _folder(root, images.replace('{split}', split), split, listed[0][0])
  # Splits may use the same names: a folder of the split is a part of the id.
  inner = f'{folder.name}/' if folder.name.startswith(split) else ''
  stat = path.stat()
  state = stat.st_size, stat.st_mtime_ns
  found: dict[str, Item | UserError] = {}
  for name, *of_image in listed:
    draw = functools.partial(_draw, f'{path}: {name}', values, *of_image)
    label = Made(f'{path}: {name}', os.path.basename(name), state, draw)
    try:
      inside = folder_files.inside(folder, name)
      image = folder_files.only(name, [folder / inside])
      found[name] = Item(inner + os.path.splitext(inside)[0], image, label)
    except UserError as error:
      found[name] = error
  if '{split}' not in json:
    found = layouts.share(path, split, found, holdout)
  return Listing(
    origin=path, found=found, classes=names, label_map=f'{_VOID}:void'
  )


@contextlib.contextmanager
def _as_defined(what: object) -> Iterator[None]:
  """Raises `UserError` for what is not as COCO defines it."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # a file may hold anything
    reason = f'{"no " * isinstance(error, KeyError)}{first_line(error)}'
    raise UserError(
      f'{what}: not as COCO defines it ({reason}); export it again'
    ) from error


def _classes(categories: Sequence[_Json]) -> tuple[list[str], dict[Any, int]]:
  """Returns the names of the classes, and the class of each category."""
  names, values = ['background'], {}
  for each in sorted(categories, key=lambda x: x['id']):
    require(each['id'] not in values, 'category ids must differ', each['id'])
    own = str(each['name']).casefold() == names[0]
    values[each['id']] = _BACKGROUND if own else len(names)
    names += [] if own else [str(each['name'])]
  require(len(names) <= _VOID, 'at most 254 categories fit', len(names))
  return names, values


def _folder(root: Path, given: str, split: str, name: str) -> Path:
  """Returns the first folder that holds an image, else the first one."""
  places = [given] if given else [f'{split}*', f'images/{split}*', 'images', '']
  globbed = (glob.glob(place or '.', root_dir=root) for place in places)
  folders = [root / x for found in globbed for x in sorted(found)]
  holding = (x for x in folders if (x / name).is_file())
  return next(holding, [*folders, root / given][0])


def _draw(
  origin: str,
  values: Mapping[Any, int],
  image: _Json,
  annotations: Sequence[_Json],
) -> bytes:
  """Returns a label as a PNG: crowds, and above them the smallest on top."""
  with _as_defined(origin):
    size = int(image['height']), int(image['width'])
    require(
      min(size) > 0 and size[0] * size[1] < 2**30, 'a size must fit', size
    )
    label = np.full(size, _BACKGROUND, np.uint8)
    below = label.size + 1  # as if they had more pixels than the image
    areas = np.full(size, below)  # of the instance on top
    for each in annotations:
      crowd, mask = each.get('iscrowd'), _mask(each, size)
      area = below if crowd else int(mask.sum())
      mask &= area <= areas
      label[mask] = _VOID if crowd else values[each['category_id']]
      areas[mask] = area
  return encode_label(label)


def _mask(annotation: _Json, size: tuple[int, int]) -> np.ndarray:
  """Returns the pixels of an annotation, bool [H, W]."""
  shape = annotation['segmentation']
  rule = f'annotation {annotation.get("id")}: segmentation must '
  require(bool(shape), f'{rule}not be empty', shape)
  if isinstance(shape, Mapping):  # runs down the columns, the first of 0
    counts = shape['counts']
    counts = _unpack(counts) if isinstance(counts, str) else counts
    same = [*shape['size']] == [*size] and sum(counts) == size[0] * size[1]
    require(same, f'{rule}fill the image, {size}', shape['size'])
    inside = np.arange(len(counts)) % 2 > 0
    return np.repeat(inside, counts).reshape(size[::-1]).T
  mask = np.zeros(size, bool)
  for ring in shape:
    points = np.array(ring, float).reshape(-1, 2)
    require(bool(np.isfinite(points).all()), f'{rule}be finite', 'NaN or inf')
    mask |= _fill(points, size)
  return mask


def _unpack(text: str) -> list[int]:
  """Reads runs as `rleToString` in COCO's maskApi.c writes them.

  Groups of 5 bits give the difference to the last but one.
  """
  counts, value, shift = list[int](), 0, 0
  for code in (ord(letter) - 48 for letter in text):
    value |= (code & 31) << shift
    shift += 5
    if not code & 32:  # the last group; its highest bit is the sign
      value -= (code & 16) << shift - 4
      counts.append(value + (counts[-2] if len(counts) > 2 else 0))
      value = shift = 0
  return counts


def _fill(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns the pixels whose centers lie in a polygon (x, y), bool [H, W]."""
  x, y = points.T
  to_x, to_y = np.roll(points, -1, 0).T
  rows = np.arange(size[0])[:, None] + 0.5
  row, edge = np.nonzero((y <= rows) != (to_y <= rows))  # where edges cross
  slope = (to_x - x)[edge] / (to_y - y)[edge]
  at = x[edge] + (rows[row, 0] - y[edge]) * slope
  first = np.ceil(at - 0.5).clip(0, size[1]).astype(int)  # to the right of it
  turns = np.zeros((size[0], size[1] + 1), np.uint8)
  np.add.at(turns, (row, first), 1)
  return np.cumsum(turns, 1, np.uint8)[:, :-1] % 2 > 0
