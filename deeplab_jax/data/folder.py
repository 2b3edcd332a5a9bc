"""Any directory whose layout is known, prepared as array_record.

Every split is a prepared set of its own, so that an evaluation reuses what
training prepared. Its files are read and checked once, here. The name of the
set has a fingerprint of the source: a split that changed is prepared again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data import folder_files, proposals, records
from deeplab_jax.data.datasets import DatasetInfo, Tally, voc_palette
from deeplab_jax.data.image_files import Made, turn
from deeplab_jax.data.images import (
  Picture,
  encode_image,
  open_picture,
  read_size,
)
from deeplab_jax.data.label_files import LABEL_SUFFIXES, LabelFile, open_label
from deeplab_jax.data.labels import Meaning, Palettes, count_values
from deeplab_jax.data.records import Builders, Item, Layout, Listing, Sample
from deeplab_jax.runtime.errors import LabelError, UserError

_LARGE = 2**24  # pixels of an image; larger ones are read one at a time


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderConfig(records.SourceConfig):
  """What to prepare: the images of one split, and what their labels mean."""

  directory: str
  split: str
  listing: Listing = dataclasses.field(repr=False)
  meaning: Meaning = dataclasses.field(repr=False)
  items: tuple[Item, ...] = dataclasses.field(repr=False)
  on_bad_image: str
  tile: int


def load(
  *,
  directory: str,
  prepared_dir: str,
  splits: Sequence[str],
  ignore_label: int,
  label_map: str,
  on_bad_image: str,
  as_stored: bool = False,
  tile: int = 0,
  layout: Layout = folder_files.voc_devkit,
) -> Builders:
  """Loads the splits of a folder, see `load.load_dataset`."""
  root = folder_files.find_root(directory)
  # All lists are checked before the first is prepared, which may take minutes.
  configs, first = {}, None
  how = {'on_bad_image': on_bad_image, 'as_stored': as_stored, 'tile': tile}
  for split in splits:
    listing = layout(root, split)
    lines = folder_files.read_classes(listing)
    if lines != (first := first or lines):
      raise UserError(
        f'{listing.origin}: its classes are not those of {splits[0]} ('
        f'{len(lines)} and {len(first)}); give all splits the same classes'
      )
    meaning = Meaning(lines, ignore_label, label_map or listing.label_map)
    configs[split] = _make_config(root, split, listing, meaning, how)
  builders: Builders = {}
  palettes = Palettes()
  try:
    for split, config in configs.items():
      builder = records.prepared(FolderSegmentation, prepared_dir, config)
      palettes.add(builder.info.metadata['colors'])
      builders[split] = builder
  except LabelError as error:
    listed = {split: config.items for split, config in configs.items()}
    fixed = not isinstance(listing.classes, Path)
    proposal = proposals.propose(listed, lines, ignore_label, fixed=fixed)
    if not proposal:
      raise
    raise UserError(f'{error}; {proposal}') from error
  return builders


def _make_config(
  root: Path,
  split: str,
  listing: Listing,
  meaning: Meaning,
  how: dict[str, Any],
) -> FolderConfig:
  """Checks the files of a split, and names their state."""
  found, origin = listing.found, listing.origin
  missing = {k: x for k, x in found.items() if isinstance(x, UserError)}
  if missing:
    first = next(iter(missing.values()))
    if len(missing) == 1:
      raise first
    some = ', '.join(list(missing)[:5]) + ', ...' * (len(missing) > 5)
    raise UserError(
      f'{origin}: {len(missing)} listed ids without exactly one image and a '
      f'label ({some}), the first: {first}'
    )
  items = tuple(x for x in found.values() if isinstance(x, Item))
  folder_files.refuse_repeats(origin, [item.name for item in items])
  rows = [
    [x.name, x.image.name, x.label.name, *_state(x.image), *_state(x.label)]
    for x in items
  ]
  colors = meaning.line_colors
  classes = meaning.lines, None if colors is None else colors.tolist()
  label_map = list(meaning.label_map.items())
  options = [meaning.void_value, label_map, how['on_bad_image']]
  options += ['as stored'] * how['as_stored']  # older names did not know it
  options += [['tile', how['tile']]] * bool(how['tile'])
  place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
  name = re.sub(r'[^A-Za-z0-9_]+', '_', listing.name or root.name)
  prefix = f'{name}-{place}-{records.split_key(split)}-'
  return FolderConfig(
    name=prefix + records.fingerprint(classes, rows, options),
    prefix=prefix,
    directory=str(root),
    split=split,
    listing=listing,
    meaning=meaning,
    items=items,
    **how,
  )


def _state(file: Path | Made) -> Sequence[Any]:
  """What changes with the contents of a file."""
  if isinstance(file, Made):
    return file.state
  return (stat := file.stat()).st_size, stat.st_mtime_ns


class FolderSegmentation(records.RecordsBuilder):
  """TFDS builder of one split of a folder; takes a `FolderConfig`."""

  VERSION = tfds.core.Version('1.3.0')

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    config, meaning = self.builder_config, self.builder_config.meaning
    self.info.metadata['directory'] = config.directory
    tally = Tally(len(meaning.classes), meaning.stored_ignore_label)
    return {config.split: (tally, self._generate_examples())}

  def _generate_examples(self) -> Iterator[Sample]:
    config, meaning = self.builder_config, self.builder_config.meaning
    palettes = Palettes()
    how = {'tile': config.tile, 'as_stored': config.as_stored}
    for item, (image, values, colors) in records.readable(
      config.items,
      functools.partial(read_pair, meaning=meaning, **how),
      origin=config.listing.origin,
      on_bad_image=config.on_bad_image,
      alone=functools.partial(is_large, **how),
    ):
      palettes.add(colors)
      yield from cut(item, image, values, meaning, config.tile)
      del image, values  # before the next one is read
    if not self.info.metadata['names'][config.split]:
      raise UserError(
        f'{config.directory}: no tile of {config.split} shows a class'
      )
    info = _make_info(config, palettes).to_json()
    self.info.metadata.update(info=info, colors=list(palettes.values()))


def is_large(item: Item, tile: int, as_stored: bool) -> bool:
  """Whether an image is to be cut, and so large that it is read alone."""
  with contextlib.suppress(UserError):  # which reading it finds again
    if tile:
      size = read_size(item.image, as_stored=as_stored, to_cut=True)
      return math.prod(size) > _LARGE
  return False


def read_pair(
  item: Item, meaning: Meaning, tile: int = 0, as_stored: bool = False
) -> tuple[Any, np.ndarray, list[list[Any]]]:
  """Reads both files of an id; raises `UserError` if they cannot be used.

  Returns the image's bytes to store, the label values uint8 [H, W], and the
  colors of the palette, see `Meaning.used_colors`. Of an image that is larger
  than a tile it returns the pixels, for `cut`.
  """
  picture = open_picture(item.image, as_stored=as_stored, to_cut=tile > 0)
  file = open_label(item.label, to_cut=tile > 0)
  values = fit_label(item, picture, file, meaning.label_values(file))
  counts = count_values(values)
  counts[: len(meaning.lines)] = counts[meaning.void_value] = 0
  if counts.any():
    value = int(counts.argmax())
    raise LabelError(
      f'{item.label}: label value {value} ({counts[value]} pixels) is neither '
      f'one of the {len(meaning.lines)} classes nor the ignore label '
      f'{meaning.void_value}; correct the file, classes.txt or '
      'config.data.ignore_label, or say what the value stands for with '
      'config.data.label_map'
    )
  large = 0 < tile < max(values.shape)
  image = picture.pixels if large else picture.storable()
  return image, values, meaning.used_colors(file)


def cut(
  item: Item, image: Any, values: np.ndarray, meaning: Meaning, tile: int
) -> Iterator[Sample]:
  """Yields the sample of a pair, or its tiles if `image` is pixels [H, W, C].

  Tiles have at most `tile` pixels a side, sizes that differ by at most one, and
  names that end in '@ROW,COLUMN'. Those of void alone are left out.
  """
  if isinstance(image, bytes):
    label = meaning.to_classes(values)
    yield Sample(item.name, item.image.name, image, label)
    return
  rows, columns = (
    np.linspace(0, side, -(-side // tile) + 1).astype(int).tolist()
    for side in values.shape
  )
  for row, top in enumerate(rows[:-1]):
    for column, left in enumerate(columns[:-1]):
      place = np.s_[top : rows[row + 1], left : columns[column + 1]]
      label = meaning.to_classes(values[place])
      if (label != meaning.stored_ignore_label).any():
        name = f'{item.name}@{row},{column}'
        data = encode_image(np.ascontiguousarray(image[place]))
        yield Sample(name, item.image.name, data, label)


def fit_label(
  item: Item, picture: Picture, file: LabelFile, values: np.ndarray
) -> np.ndarray:
  """Returns the label values [H, W] with the same side up as the picture.

  An image may have an EXIF orientation, and its label none. Then the size tells
  whether the label was drawn on the image as shown or as stored. Raises
  `UserError` if the sizes differ, or both are possible.
  """
  shown = picture.pixels.shape[:2]
  if picture.orientation != 1 and not file.turned:
    stored = shown[::-1] if picture.orientation >= 5 else shown
    if values.shape == stored == shown:
      raise UserError(
        f'{item.image} has the EXIF orientation {picture.orientation} and its '
        f'label {item.label} has none, so which way up the label is cannot be '
        'told from its size; store the image upright, without that tag'
      )
    if values.shape == stored:
      return turn(values, picture.orientation)
  if shown != values.shape:
    raise UserError(
      f'{item.label}: label is {values.shape[1]}x{values.shape[0]} but its '
      f'image {item.image} is {shown[1]}x{shown[0]}; make the sizes equal'
    )
  return values


def _make_info(config: FolderConfig, palettes: Palettes) -> DatasetInfo:
  meaning = config.meaning
  values, void = meaning.file_values(), meaning.void_value
  palette = meaning.colors
  if palette is None:
    palette = voc_palette(256)[list(meaning.values)]
    first = _first_palette(config.listing.label_folder)
    for index, value in enumerate(values):
      if value in palettes:
        palette[index] = palettes[value][1:4]
      elif value < len(first):
        palette[index] = first[value]
  free = (v for v in range(255, -1, -1) if v not in values)
  return DatasetInfo(
    name=config.listing.name or Path(config.directory).name,
    classes=meaning.classes,
    palette=palette,
    ignore_label=meaning.stored_ignore_label,
    values=values,
    void_value=next(free) if void in values else void,
  )


def _first_palette(folder: Path | None) -> np.ndarray:
  """Returns the colors of the first palette label, uint8 [N, 3]."""
  # Of the whole folder, so that all splits have the same colors.
  for path in sorted(folder.rglob('*')) if folder else ():
    if path.suffix.lower() in LABEL_SUFFIXES:
      with contextlib.suppress(UserError):  # the check of records reports it
        if (palette := open_label(path).palette) is not None:
          return palette
  return np.zeros((0, 3), np.uint8)
