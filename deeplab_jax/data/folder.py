"""Any directory in the layout of a VOC devkit, prepared as array_record.

  classes.txt                          one class name a line, index from 0
  JPEGImages/ID.jpg                    or .png, .bmp, ...
  SegmentationClass/ID.png             palette or gray PNG of class indices
  ImageSets/Segmentation/SPLIT.txt     one ID a line

Every split is a prepared set of its own, so that evaluation alone reuses what
training prepared. Its files are read and checked once, here, so that training
meets no surprise. The name of the set carries a fingerprint of the source: a
split that changed is prepared anew.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax import errors
from deeplab_jax.data import datasets, images, records

log = logging.getLogger(__name__)

ON_BAD_IMAGE = ('stop', 'skip')


@dataclasses.dataclass(frozen=True)
class Item:
  """One listed image: its id and its two files."""

  name: str
  image: pathlib.Path
  label: pathlib.Path


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderConfig(records.SourceConfig):
  """What to prepare; `make_config` fills it in.

  Attributes:
    directory: the source folder.
    split: name of the list.
    classes: names of the classes.
    items: the images of the split.
    ignore_label: label value of void pixels.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.
  """

  directory: str = ''
  split: str = ''
  classes: tuple[str, ...] = ()
  items: tuple[Item, ...] = dataclasses.field(default=(), repr=False)
  ignore_label: int = 255
  on_bad_image: str = 'stop'


def make_config(
  directory: str | os.PathLike[str],
  split: str,
  *,
  ignore_label: int = 255,
  on_bad_image: str = 'stop',
) -> FolderConfig:
  """Surveys a split: its list, the classes, and that the files are there.

  Args:
    directory: the folder in VOC devkit layout.
    split: name of the list to prepare.
    ignore_label: label value of void pixels.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.

  Returns:
    The config that `FolderSegmentation` takes.

  Raises:
    UserError: naming what is missing, empty or listed twice.
  """
  if on_bad_image not in ON_BAD_IMAGE:
    raise errors.UserError(
      f"config.data.on_bad_image must be 'stop' or 'skip', got {on_bad_image!r}"
    )
  root = find_root(directory)
  classes = read_classes(root)
  items = _find_items(root, split)
  place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
  name = re.sub(r'[^A-Za-z0-9_]+', '_', root.name)
  prefix = f'{name}-{place}-{split}-'
  fingerprint = _fingerprint(classes, items, ignore_label, on_bad_image)
  return FolderConfig(
    name=prefix + fingerprint,
    prefix=prefix,
    directory=str(root),
    split=split,
    classes=classes,
    items=items,
    ignore_label=ignore_label,
    on_bad_image=on_bad_image,
  )


class FolderSegmentation(records.RecordsBuilder):
  """TFDS builder of one split of a folder; takes a `FolderConfig`."""

  VERSION = tfds.core.Version('1.2.0')

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    config = self.builder_config
    info = datasets.DatasetInfo(
      name=pathlib.Path(config.directory).name,
      classes=config.classes,
      palette=_find_palette(config.directory, len(config.classes)),
      ignore_label=config.ignore_label,
    )
    self.info.metadata.update(
      info=info.to_json(), splits={}, directory=config.directory
    )
    return {config.split: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
    config = self.builder_config
    tally = records.Tally(len(config.classes), config.ignore_label)
    for item, (image, size, label) in records.readable(
      config.items, _read, split=config.split, on_bad_image=config.on_bad_image
    ):
      records.check_size(item, size, label.shape)
      records.check_values(
        item,
        label,
        len(config.classes),
        config.ignore_label,
        remedy='the file, classes.txt or config.data.ignore_label',
      )
      tally.add(label)
      yield (
        item.name,
        records.make_record(
          item.name,
          item.image.name,
          image,
          images.encode_label(label),
          label.shape,
        ),
      )
    if not tally.num_images:
      raise errors.UserError(
        f'{_list_path(config.directory, config.split)}: every listed image is '
        'unreadable; see the warnings above'
      )
    self.info.metadata['splits'][config.split] = tally.to_json()


def _read(item: Item) -> tuple[bytes, tuple[int, int], np.ndarray]:
  """The image's bytes to store and its size, and the label uint8 [H, W]."""
  return *images.storable_image(item.image), images.read_label(item.label)


def _find_palette(root: str, num_classes: int) -> np.ndarray:
  """Returns the colours of the first palette label or VOC's, uint8 [C, 3]."""
  result = datasets.voc_palette(num_classes)
  # of the whole folder, so that all splits have the same colours
  for path in sorted(pathlib.Path(root, 'SegmentationClass').rglob('*.png')):
    try:
      palette = images.label_palette(path)
    except errors.UnreadableError:
      continue  # the check of the records reports it
    if palette is not None:
      count = min(len(palette), num_classes)
      result[:count] = palette[:count]
      break
  return result


def find_root(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder as an absolute path.

  Raises:
    UserError: naming it, or the part of a VOC devkit that it lacks.
  """
  root = pathlib.Path(directory).expanduser().resolve()
  if not root.is_dir():
    raise errors.UserError(
      f'{directory}: no such dataset folder; set config.data.dir'
    )
  for part in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
    if not (root / part).is_dir():
      raise errors.UserError(
        f'{root / part}: no such folder; a dataset folder needs JPEGImages, '
        'SegmentationClass, ImageSets/Segmentation and classes.txt'
      )
  return root


def _read_lines(path: pathlib.Path) -> list[str]:
  try:
    text = path.read_text(encoding='utf-8-sig')
  except FileNotFoundError as error:
    raise errors.UserError(f'{path}: no such file') from error
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'{path}: no readable text ({error})') from error
  return [line.strip() for line in text.rstrip().splitlines()]


def read_classes(root: pathlib.Path) -> tuple[str, ...]:
  """Returns the class names of `classes.txt` below a folder.

  Raises:
    UserError: if the file is missing, or a line is blank or repeated.
  """
  path = root / 'classes.txt'
  if not path.is_file():
    raise errors.UserError(
      f'{path}: no such file; write one class name a line, index from 0 '
      '(--mode=prepare tells how many)'
    )
  classes = _read_lines(path)
  if not 1 <= len(classes) <= 256 or '' in classes:
    raise errors.UserError(
      f'{path}: needs 1 to 256 lines with one class name each, none blank'
    )
  _refuse_repeats(path, classes)
  return tuple(classes)


def _list_path(root: str | pathlib.Path, split: str) -> pathlib.Path:
  return pathlib.Path(root, 'ImageSets', 'Segmentation', f'{split}.txt')


def read_list(root: pathlib.Path, split: str) -> list[str]:
  """Returns the ids of a split of a folder.

  Raises:
    UserError: if there is no such list, or it is empty or repeats an id.
  """
  path = _list_path(root, split)
  if not re.fullmatch(r'\w[\w-]*', split) or not path.is_file():
    known = ', '.join(sorted(p.stem for p in path.parent.glob('*.txt')))
    raise errors.UserError(
      f'{path}: no such list; known splits: {known or "none"}'
    )
  names = [line for line in _read_lines(path) if line]
  if not names:
    raise errors.UserError(f'{path}: the split is empty; list one id a line')
  _refuse_repeats(path, names)
  return names


def _refuse_repeats(path: pathlib.Path, names: Sequence[str]) -> None:
  name, count = collections.Counter(names).most_common(1)[0]
  if count > 1:
    raise errors.UserError(f'{path}: {name!r} stands {count} times; keep one')


def _find_items(root: pathlib.Path, split: str) -> tuple[Item, ...]:
  files = ImageFiles(root)
  items, missing = [], {}
  for name in read_list(root, split):
    try:
      items.append(files.item(name))
    except errors.UserError as error:
      missing[name] = error
  if len(missing) > 1:
    names = ', '.join(list(missing)[:5]) + ', ...' * (len(missing) > 5)
    raise errors.UserError(
      f'{_list_path(root, split)}: {len(missing)} listed ids without '
      f'exactly one image and a label ({names}); add them or take them off the '
      'list'
    )
  for error in missing.values():
    raise error
  return tuple(items)


class ImageFiles:
  """Finds the files of an id, reading every directory once.

  Args:
    root: a folder in VOC devkit layout.
  """

  def __init__(self, root: pathlib.Path) -> None:
    self._root = root
    self._folders: dict[pathlib.Path, dict[str, list[pathlib.Path]]] = {}

  def item(self, name: str) -> Item:
    """Returns the files of an id.

    Raises:
      UserError: if one is missing, or two images have that id.
    """
    found = self._images(name)
    if not found:
      raise errors.UserError(
        f'{self._root / "JPEGImages" / name}: listed, but there is no image '
        'file of that name; add it or take it off the list'
      )
    if len(found) > 1:
      raise errors.UserError(
        f'{found[0]} and {found[1].name} share the id {name!r}; keep one'
      )
    label = self._root / 'SegmentationClass' / f'{name}.png'
    if not label.is_file():
      raise errors.UserError(
        f'{label}: listed, but there is no such label; add it or take '
        f'{name!r} off the list'
      )
    return Item(name, found[0], label)

  def _images(self, name: str) -> list[pathlib.Path]:
    path = self._root / 'JPEGImages' / name  # an id may name a subfolder
    if path.parent not in self._folders:
      files = collections.defaultdict(list)
      if path.parent.is_dir():
        for file in sorted(path.parent.iterdir()):
          if file.suffix.lower() in images.IMAGE_SUFFIXES:
            files[file.stem].append(file)
      self._folders[path.parent] = files
    return self._folders[path.parent].get(path.name, [])


def _fingerprint(
  classes: tuple[str, ...], items: tuple[Item, ...], *options: Any
) -> str:
  """Tells states of the files and the options apart."""
  rows = []
  for item in items:
    row = [item.name, item.image.name]
    for file in (item.image, item.label):
      stat = file.stat()
      row += [stat.st_size, stat.st_mtime_ns]
    rows.append(row)
  return records.fingerprint(classes, rows, options)
