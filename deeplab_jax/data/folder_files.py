"""The files of a directory in the layout of a VOC devkit.

classes.txt                          one class name a line, index from 0;
                                     all with a color 'name R G B', or none
JPEGImages/ID.jpg                    or .png, .bmp, ...
SegmentationClass/ID.png             palette or gray PNG of class indices, or
                                     of those colors; or .tif, _mask.png, ...
ImageSets/Segmentation/SPLIT.txt     one ID a line
"""

import collections
import functools
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from deeplab_jax.data import labels
from deeplab_jax.data.datasets import check_class_names
from deeplab_jax.data.image_files import IMAGE_SUFFIXES
from deeplab_jax.data.label_files import LABEL_SUFFIXES
from deeplab_jax.data.listing import Listing
from deeplab_jax.data.records import Item
from deeplab_jax.runtime.errors import UserError, naming
from deeplab_jax.runtime.files import near, near_file, read_bytes

# The folder of each kind of file, and the suffixes that count there.
_Kind = tuple[str, str, Sequence[str]]
_IMAGES = 'image', 'JPEGImages', IMAGE_SUFFIXES
_ARRAYS = 'image', 'JPEGImages', ['.npy']  # where there is no other
_LABELS = 'label', 'SegmentationClass', LABEL_SUFFIXES


def voc_devkit(root: pathlib.Path, split: str) -> Listing:
  """The layout of a VOC devkit."""
  lists = 'ImageSets/Segmentation'
  parts = 'JPEGImages', 'SegmentationClass', lists
  require_folders(root, *parts, also='classes.txt')
  return Listing(
    origin=root / lists / f'{split}.txt',
    found=find_items(root, read_list(root / lists, split)),
    classes=root / 'classes.txt',
    label_folder=root / 'SegmentationClass',
  )


def find_root(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the absolute path of a folder; raises `UserError` without one."""
  if not directory:
    raise UserError('config.data.dir is empty; name the folder of the data set')
  root = pathlib.Path(directory).expanduser().resolve()
  if not root.is_dir():
    raise UserError(
      f'{directory}: no such dataset folder{near_file(root)}; set '
      'config.data.dir'
    )
  return root


def require_folders(root: pathlib.Path, *parts: str, also: str) -> None:
  """Raises `UserError` unless the folders are there; names `also` with them."""
  for part in parts:
    if not (root / part).is_dir():
      raise UserError(
        f'{root / part}: no such folder{near_file(root / part)}; needed are '
        f'{", ".join(parts)} and {also}'
      )


def check_inside(directory: str) -> None:
  """Raises `UserError` if a link in a folder, at any depth, leads out of it."""
  root = pathlib.Path(os.path.realpath(os.path.expanduser(directory)))
  for folder, folders, names in os.walk(root):
    for path in (pathlib.Path(folder, name) for name in (*folders, *names)):
      if path.is_symlink() and path.exists():
        target = pathlib.Path(os.path.realpath(path))
        if not target.is_relative_to(root):
          raise UserError(
            f'{path} leads out of {root}, to {target}; if that is meant, set'
            ' config.data.allow_outside=True'
          )


def read_lines(path: pathlib.Path, most: int) -> list[str]:
  """Reads the lines of a text of at most so many bytes, or `UserError`."""
  try:
    text = read_bytes(path, most).decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: no text ({error}); save it as UTF-8') from error
  return [normal(line.strip()) for line in text.rstrip().splitlines()]


def read_classes(listing: Listing) -> list[str]:
  """Returns the class lines; raises `UserError` if one is wrong."""
  path: Any = listing.origin
  if not isinstance(listing.classes, pathlib.Path):
    lines = list(listing.classes)
  else:
    path = listing.classes
    if not path.is_file():
      raise UserError(
        f'{path}: no such file{near_file(path)}; write one class name a line, '
        'index from 0 (--mode=prepare tells how many)'
      )
    lines = read_lines(path, 2**20)
  if not 1 <= len(lines) <= 256 or not all(0 < len(x) < 256 for x in lines):
    raise UserError(f'{path}: needs 1 to 256 lines, a short name in each')
  with naming(str(path)):
    names, _ = labels.parse_classes(lines)
    check_class_names(names)
  refuse_repeats(path, names)
  return lines


def read_list(folder: pathlib.Path, split: str) -> list[str]:
  """Returns the ids of a list; raises `UserError` if none, or one repeats."""
  path = folder / f'{split}.txt'
  files = {
    normal(file.stem): file
    for file in sorted(folder.glob('*'))
    if file.suffix.lower() == '.txt' and file.name != 'classes.txt'
  }
  if normal(split) not in files:
    raise UserError(
      f'{path}: no such list{near(split, files)}; known splits: '
      f'{", ".join(files) or "none"}'
    )
  names = [line for line in read_lines(files[normal(split)], 2**28) if line]
  if not names:
    raise UserError(f'{path}: the split is empty; list one id a line')
  refuse_repeats(path, names)
  return names


def refuse_repeats(path: object, names: Sequence[str]) -> None:
  """Raises `UserError` if a name occurs twice in a file."""
  name, count = collections.Counter(names).most_common(1)[0]
  if count > 1:
    raise UserError(f'{path}: {name!r} stands {count} times; keep one')


def find_items(
  root: pathlib.Path, names: Iterable[str]
) -> dict[str, Item | UserError]:
  """Finds the files of ids, or errors that say what is missing.

  Ids may have the suffix of their image. Names are compared in Unicode's
  composed form (NFC): other systems write 'ü' as two characters.
  """
  files, found = _Files(root), dict[str, Item | UserError]()
  for name in names:
    try:
      found[name] = files.item(name)
    except UserError as error:
      found[name] = error
  return found


def inside(place: object, listed: str) -> str:
  """Returns a listed id in one spelling; raises `UserError` if it leads out."""
  name = normal(os.path.normpath(listed))
  if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
    bare, _ = os.path.splitext(os.path.basename(name))
    raise UserError(f'{listed!r} leads out of {place}; list ids, as {bare!r}')
  return name


def only(name: str, files: Sequence[pathlib.Path]) -> pathlib.Path:
  """Returns the file of an id; raises `UserError` for two, or no real one."""
  if len(files) > 1:
    raise UserError(
      f'{files[0]} and {files[1].name} share the id {name!r}; keep one'
    )
  if not files[0].is_file():
    what = 'no file; put a file there'
    if files[0].is_symlink():
      what = f'a symbolic link to {os.readlink(files[0])}, which is not '
      what += 'there; mend the link'
    raise UserError(f'{files[0]} is {what} or take {name!r} off the list')
  return files[0]


class _Files:
  """The images and labels of a folder."""

  def __init__(self, root: pathlib.Path) -> None:
    self._root = root
    self._listing = functools.cache(_listing)  # reads every directory once
    self._hints = 5  # comparing with all names takes its time

  def item(self, name: str) -> Item:
    """Raises `UserError` if a file is missing, or two files have that id."""
    name = inside(self._root / 'JPEGImages', name)
    bare, suffix = os.path.splitext(name)
    found = self._find(_IMAGES, name) or self._find(_ARRAYS, name)
    if not found and suffix.lower() in IMAGE_SUFFIXES:
      found = self._find(_IMAGES, bare)
      own = [f for f in found if normal(f.name) == os.path.basename(name)]
      found, name = own or found, bare if found else name
    masks = self._find(_LABELS, name) or self._find(_LABELS, f'{name}_mask')
    for kind, files in ((_IMAGES, found), (_LABELS, masks)):
      if not files:
        raise self._missing(kind, name)
    return Item(name, only(name, found), only(name, masks))

  def _find(self, kind: _Kind, name: str) -> list[pathlib.Path]:
    _, part, suffixes = kind
    path = self._root / part / name  # an id may name a subfolder
    files = self._listing(path.parent).get(path.name, ())
    return [file for file in files if file.suffix.lower() in suffixes]

  def _missing(self, kind: _Kind, name: str) -> UserError:
    """Says what is there instead."""
    what, part, suffixes = kind
    path, hint = self._root / part / name, ''
    listing = self._listing(path.parent)
    if path.name in listing:
      other = listing[path.name][0].name
      hint = f'; there is {other}, but {what} files end in {" ".join(suffixes)}'
    elif self._hints > 0:
      self._hints -= 1
      # An id with a folder too many is looked for without it.
      listing = listing or self._listing(self._root / part)
      hint = near(path.name, (f.name for fs in listing.values() for f in fs))
    return UserError(
      f'{path}{".png" if what == "label" else ""}: listed, but there is no '
      f'{what} file of that name{hint}; add it or take {name!r} off the list'
    )


def _listing(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """The entries of a folder by stem; none where there is no such folder."""
  files: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
  forms = (unicodedata.normalize(x, str(folder)) for x in ('NFC', 'NFD'))
  place = next(filter(os.path.isdir, forms), None)
  for file in sorted(pathlib.Path(place).iterdir()) if place else ():
    files[normal(file.stem)].append(file)
  return files


def normal(name: str) -> str:
  """Returns a name in Unicode's composed form."""
  return unicodedata.normalize('NFC', name)
