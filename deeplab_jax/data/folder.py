"""Any directory in the layout of a VOC devkit, prepared as array_record.

  classes.txt                          one class name a line, index from 0;
                                       all with a color 'name R G B', or none
  JPEGImages/ID.jpg                    or .png, .bmp, ...
  SegmentationClass/ID.png             palette or gray PNG of class indices, or
                                       of those colors; or .tif, _mask.png, ...
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
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data import datasets, images, labels, records
from deeplab_jax.runtime import errors
from deeplab_jax.runtime.files import near, near_file

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
    meaning: of the label files' pixels.
    items: the images of the split.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.
  """

  directory: str = ''
  split: str = ''
  meaning: labels.Meaning | None = dataclasses.field(default=None, repr=False)
  items: tuple[Item, ...] = dataclasses.field(default=(), repr=False)
  on_bad_image: str = 'stop'


def make_config(
  directory: str | os.PathLike[str],
  split: str,
  *,
  ignore_label: int = 255,
  label_map: str = '',
  on_bad_image: str = 'stop',
) -> FolderConfig:
  """Surveys a split: its list, the classes, and that the files are there.

  Args:
    directory: the folder in VOC devkit layout.
    split: name of the list to prepare.
    ignore_label: label value of void pixels in the files.
    label_map: what other values in the files stand for, as
      `labels.parse_label_map` reads it.
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
  meaning = labels.Meaning(classes, ignore_label, label_map)
  items = _find_items(root, split)
  place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
  name = re.sub(r'[^A-Za-z0-9_]+', '_', root.name)
  prefix = f'{name}-{place}-{records.split_key(split)}-'
  colors = None if classes.colors is None else classes.colors.tolist()
  options = (ignore_label, list(meaning.label_map.items()), on_bad_image)
  fingerprint = _fingerprint((classes.lines, colors), items, *options)
  return FolderConfig(
    name=prefix + fingerprint,
    prefix=prefix,
    directory=str(root),
    split=split,
    meaning=meaning,
    items=items,
    on_bad_image=on_bad_image,
  )


class FolderSegmentation(records.RecordsBuilder):
  """TFDS builder of one split of a folder; takes a `FolderConfig`."""

  VERSION = tfds.core.Version('1.3.0')

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    config = self.builder_config
    self.info.metadata.update(splits={}, directory=config.directory)
    return {config.split: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
    config, meaning = self.builder_config, self.builder_config.meaning
    tally = records.Tally(len(meaning.classes), meaning.stored_ignore_label)
    palettes = labels.Palettes()
    for item, pair in records.readable(
      config.items,
      lambda item: read_pair(item, meaning),
      split=config.split,
      on_bad_image=config.on_bad_image,
    ):
      palettes.add(item.label, pair.colors)
      records.check_values(
        item,
        pair.label,
        len(meaning.lines),
        meaning.ignore_label,
        remedy='the file, classes.txt or config.data.ignore_label, or say what '
        'the value stands for with config.data.label_map',
      )
      label = meaning.to_classes(pair.label)
      tally.add(label)
      yield (
        item.name,
        records.make_record(
          item.name,
          item.image.name,
          pair.image,
          images.encode_label(label),
          label.shape,
        ),
      )
    if not tally.num_images:
      raise errors.UserError(
        f'{_list_path(config.directory, config.split)}: every listed image is '
        'unreadable; see the warnings above'
      )
    info = _make_info(config, palettes)
    self.info.metadata.update(info=info.to_json(), colors=palettes.to_json())
    self.info.metadata['splits'][config.split] = tally.to_json()


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
  """An image and its label, read and checked against one another.

  Attributes:
    image: bytes to store.
    label: uint8 [H, W], label values.
    colors: of the palette indices in use, see `Meaning.used_colors`.
  """

  image: bytes
  label: np.ndarray
  colors: dict[int, tuple[int, ...]]


def read_pair(item: Item, meaning: labels.Meaning) -> Pair:
  """Reads both files of an id.

  Raises:
    UserError: if one cannot be used, or they do not fit.
  """
  picture = images.open_picture(item.image)
  file = images.open_label(item.label)
  values = fit_label(item, picture, file, meaning.label_values(file))
  return Pair(images.storable(picture), values, meaning.used_colors(file))


def fit_label(
  item: Item,
  picture: images.Picture,
  file: images.LabelFile,
  values: np.ndarray,
) -> np.ndarray:
  """Returns the label's values [H, W] the way up that the picture is.

  An image may have an EXIF orientation that its label has not. The size tells
  whether the label was drawn on the image as shown or as stored.

  Raises:
    UserError: if the sizes differ, or both ways are possible.
  """
  height, width = picture.pixels.shape[:2]
  if picture.orientation == 1 or file.turned:
    records.check_size(item, (height, width), values.shape)
    return values
  stored = (width, height) if picture.orientation >= 5 else (height, width)
  if values.shape == stored == (height, width):
    raise errors.UserError(
      f'{item.image} has the EXIF orientation {picture.orientation} and its '
      f'label {item.label} has none, so which way up the label is cannot be '
      'told from its size; store the image upright, without that tag'
    )
  if values.shape == stored:
    return images.turn(values, picture.orientation)
  records.check_size(item, (height, width), values.shape)
  return values


def _make_info(
  config: FolderConfig, palettes: labels.Palettes
) -> datasets.DatasetInfo:
  meaning = config.meaning
  values = meaning.file_values()
  palette = meaning.colors
  if palette is None:
    palette = datasets.voc_palette(256)[list(meaning.values)]
    first = _first_palette(config.directory)
    for index, value in enumerate(values):
      if palettes.color(value):
        palette[index] = palettes.color(value)
      elif value < len(first):
        palette[index] = first[value]
  free = (v for v in range(255, -1, -1) if v not in values)
  void = meaning.ignore_label
  return datasets.DatasetInfo(
    name=pathlib.Path(config.directory).name,
    classes=meaning.classes,
    palette=palette,
    ignore_label=meaning.stored_ignore_label,
    values=values,
    void_value=next(free) if void in values else void,
  )


def _first_palette(root: str) -> np.ndarray:
  """Returns the colors of the first palette label, uint8 [N, 3]."""
  # of the whole folder, so that all splits have the same colours
  for path in sorted(pathlib.Path(root, 'SegmentationClass').rglob('*')):
    if path.suffix.lower() in images.LABEL_SUFFIXES:
      try:
        palette = images.label_palette(path)
      except errors.UserError:
        continue  # the check of the records reports it
      if palette is not None:
        return palette
  return np.zeros((0, 3), np.uint8)


def find_root(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder as an absolute path.

  Raises:
    UserError: naming it, or the part of a VOC devkit that it lacks.
  """
  root = pathlib.Path(directory).expanduser().resolve()
  if not root.is_dir():
    raise errors.UserError(
      f'{directory}: no such dataset folder{near_file(root)}; set '
      'config.data.dir'
    )
  for part in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
    if not (root / part).is_dir():
      raise errors.UserError(
        f'{root / part}: no such folder{near_file(root / part)}; a dataset '
        'folder needs JPEGImages, SegmentationClass, ImageSets/Segmentation '
        'and classes.txt'
      )
  return root


def _read_lines(path: pathlib.Path) -> list[str]:
  try:
    text = path.read_text(encoding='utf-8-sig')
  except FileNotFoundError as error:
    raise errors.UserError(f'{path}: no such file') from error
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f'{path}: no readable text ({error}); save it as UTF-8'
    ) from error
  return [_normal(line.strip()) for line in text.rstrip().splitlines()]


def read_classes(root: pathlib.Path) -> labels.ClassList:
  """Returns what `classes.txt` below a folder says.

  Raises:
    UserError: if the file is missing, or a line is blank, repeated or has a
      wrong color.
  """
  path = root / 'classes.txt'
  if not path.is_file():
    raise errors.UserError(
      f'{path}: no such file{near_file(path)}; write one class name a line, '
      'index from 0 (--mode=prepare tells how many)'
    )
  lines = _read_lines(path)
  if not 1 <= len(lines) <= 256 or '' in lines:
    raise errors.UserError(
      f'{path}: needs 1 to 256 lines with one class name each, none blank'
    )
  with errors.naming(str(path)):
    classes = labels.parse_classes(lines)
  _refuse_repeats(path, classes.lines)
  return classes


def _list_path(root: str | pathlib.Path, split: str) -> pathlib.Path:
  return pathlib.Path(root, 'ImageSets', 'Segmentation', f'{split}.txt')


def read_list(root: pathlib.Path, split: str) -> list[str]:
  """Returns the ids of a split of a folder.

  Raises:
    UserError: if there is no such list, or it is empty or repeats an id.
  """
  path = _list_path(root, split)
  folder = root / 'ImageSets' / 'Segmentation'
  files = {
    _normal(file.stem): file
    for file in sorted(folder.iterdir())
    if file.suffix.lower() == '.txt'
  }
  if _normal(split) not in files:
    known = ', '.join(files)
    raise errors.UserError(
      f'{path}: no such list{near(split, files)}; known splits: '
      f'{known or "none"}'
    )
  names = [line for line in _read_lines(files[_normal(split)]) if line]
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
  path = _list_path(root, split)
  if len(missing) > 1:
    names = ', '.join(list(missing)[:5]) + ', ...' * (len(missing) > 5)
    first = next(iter(missing.values()))
    raise errors.UserError(
      f'{path}: {len(missing)} listed ids without exactly one image and a '
      f'label ({names}), the first: {first}'
    )
  for error in missing.values():
    raise error
  _refuse_repeats(path, [item.name for item in items])
  return tuple(items)


class ImageFiles:
  """Finds the files of an id, reading every directory once.

  Names are compared in Unicode's composed form (NFC): other systems write 'ü'
  as two characters.

  Args:
    root: a folder in VOC devkit layout.
  """

  def __init__(self, root: pathlib.Path) -> None:
    self._root = root
    self._folders: dict[pathlib.Path, dict[str, list[pathlib.Path]]] = {}
    self._hints = 5  # comparing with all names takes its time

  def item(self, name: str) -> Item:
    """Returns the files of an id, which may have its image's suffix.

    Raises:
      UserError: if one is missing, or two files have that id.
    """
    # One spelling for each place, so that other lists name it alike.
    listed, name = name, _normal(os.path.normpath(name))
    if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
      raise errors.UserError(
        f'{listed!r} leads out of {self._root / "JPEGImages"}; list ids, as'
        f' {os.path.splitext(os.path.basename(name))[0]!r}'
      )
    found = self._files('JPEGImages', name, images.IMAGE_SUFFIXES)
    bare, suffix = os.path.splitext(name)
    if not found and suffix.lower() in images.IMAGE_SUFFIXES:
      found = self._files('JPEGImages', bare, images.IMAGE_SUFFIXES)
      own = [f for f in found if _normal(f.name) == os.path.basename(name)]
      found, name = own or found, bare if found else name
    if not found:
      raise self._missing('JPEGImages', name, 'image', images.IMAGE_SUFFIXES)
    suffixes = images.LABEL_SUFFIXES
    masks = self._files('SegmentationClass', name, suffixes)
    masks = masks or self._files('SegmentationClass', f'{name}_mask', suffixes)
    if not masks:
      raise self._missing('SegmentationClass', name, 'label', suffixes)
    for files in (found, masks):
      if len(files) > 1:
        raise errors.UserError(
          f'{files[0]} and {files[1].name} share the id {name!r}; keep one'
        )
      _refuse_broken_link(files[0], name)
    return Item(name, found[0], masks[0])

  def _files(
    self, part: str, name: str, suffixes: Sequence[str]
  ) -> list[pathlib.Path]:
    path = self._root / part / name  # an id may name a subfolder
    return [
      file
      for file in self._listing(path.parent).get(path.name, ())
      if file.suffix.lower() in suffixes
    ]

  def _listing(self, folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The entries of a folder by stem; none where there is no such folder."""
    if folder not in self._folders:
      files = collections.defaultdict(list)
      for form in ('NFC', 'NFD'):
        place = pathlib.Path(unicodedata.normalize(form, str(folder)))
        if place.is_dir():
          for file in sorted(place.iterdir()):
            files[_normal(file.stem)].append(file)
          break
      self._folders[folder] = files
    return self._folders[folder]

  def _missing(
    self, part: str, name: str, kind: str, suffixes: Sequence[str]
  ) -> errors.UserError:
    """Says what is there instead."""
    path = self._root / part / name
    listing = self._listing(path.parent)
    shown = f'{path}.png' if kind == 'label' else path
    hint = ''
    if path.name in listing:
      other = listing[path.name][0].name
      hint = f'; there is {other}, but {kind} files end in {" ".join(suffixes)}'
    elif self._hints > 0:
      self._hints -= 1
      # An id with a folder too many is looked for without it.
      listing = listing or self._listing(self._root / part)
      hint = near(path.name, (f.name for fs in listing.values() for f in fs))
    return errors.UserError(
      f'{shown}: listed, but there is no {kind} file of that name{hint}; add '
      f'it or take {name!r} off the list'
    )


def _refuse_broken_link(path: pathlib.Path, name: str) -> None:
  if path.is_symlink() and not path.is_file():
    raise errors.UserError(
      f'{path} is a symbolic link to {os.readlink(path)}, which is not there; '
      f'mend the link or take {name!r} off the list'
    )
  if not path.is_file():
    raise errors.UserError(
      f'{path} is no file; put a file there or take {name!r} off the list'
    )


def _normal(name: str) -> str:
  return unicodedata.normalize('NFC', name)


def _fingerprint(classes: Any, items: tuple[Item, ...], *options: Any) -> str:
  """Tells states of the files and the options apart."""
  rows = []
  for item in items:
    row = [item.name, item.image.name, item.label.name]
    for file in (item.image, item.label):
      stat = file.stat()
      row += [stat.st_size, stat.st_mtime_ns]
    rows.append(row)
  return records.fingerprint(classes, rows, options)
