"""The files of a directory in the layout of a VOC devkit.

classes.txt                          one class name a line, index from 0;
                                     all with a color 'name R G B', or none
JPEGImages/ID.jpg                    or .png, .bmp, ...
SegmentationClass/ID.png             palette or gray PNG of class indices, or
                                     of those colors; or .tif, _mask.png, ...
ImageSets/Segmentation/SPLIT.txt     one ID a line
"""

import collections
import glob
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from deeplab_jax.data import labels
from deeplab_jax.data.bands import SUFFIXES
from deeplab_jax.data.datasets import check_class_names
from deeplab_jax.data.image_files import IMAGE_SUFFIXES
from deeplab_jax.data.label_files import LABEL_SUFFIXES
from deeplab_jax.data.records import Item, Listing
from deeplab_jax.runtime.errors import UserError, naming
from deeplab_jax.runtime.files import near, near_file, read_bytes


def voc_devkit(root: Path, split: str) -> Listing:
  """The layout of a VOC devkit."""
  lists = 'ImageSets/Segmentation'
  parts = 'JPEGImages', 'SegmentationClass', lists
  require_folders(root, *parts, also='classes.txt')
  ids = read_list(root / lists, split)
  images = Files('image', root / parts[0], '**/*', SUFFIXES)
  masks = Files('label', root / parts[1], '**/*', LABEL_SUFFIXES)
  return Listing(
    origin=root / lists / f'{split}.txt',
    found=find_items(ids, images, masks, lambda x: [x, f'{x}_mask']),
    classes=root / 'classes.txt',
    label_folder=root / 'SegmentationClass',
  )


def find_root(directory: str | os.PathLike[str]) -> Path:
  """Returns the absolute path of a folder; raises `UserError` without one."""
  if not directory:
    raise UserError('config.data.dir is empty; name the folder of the data set')
  root = Path(directory).expanduser().resolve()
  if not root.is_dir():
    raise UserError(
      f'{directory}: no such dataset folder{near_file(root)}; set '
      'config.data.dir'
    )
  return root


def require_folders(root: Path, *parts: str, also: str) -> None:
  """Raises `UserError` unless the folders are there; names `also` with them."""
  for part in parts:
    if not (root / part).is_dir():
      raise UserError(
        f'{root / part}: no such folder{near_file(root / part)}; needed are '
        f'{", ".join(parts)} and {also}'
      )


def check_inside(directory: str) -> None:
  """Raises `UserError` if a link in a folder, at any depth, leads out of it."""
  root = Path(os.path.realpath(os.path.expanduser(directory)))
  for folder, folders, names in os.walk(root):
    for path in (Path(folder, name) for name in (*folders, *names)):
      if path.is_symlink() and path.exists():
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(root):
          raise UserError(
            f'{path} leads out of {root}, to {target}; if that is meant, set'
            ' config.data.allow_outside=True'
          )


def require_split(place: object, split: str, known: Iterable[str]) -> None:
  """Raises `UserError` unless a split is known."""
  if split not in (known := dict.fromkeys(known)):
    raise UserError(
      f'{place}: no such split, {split!r}{near(split, known)}; known splits: '
      f'{", ".join(known) or "none"}'
    )


def read_lines(path: Path, most: int) -> list[str]:
  """Reads the lines of a text of at most so many bytes, or `UserError`."""
  try:
    text = read_bytes(path, most).decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: no text ({error}); save it as UTF-8') from error
  return [normal(line.strip()) for line in text.rstrip().splitlines()]


def read_classes(listing: Listing) -> list[str]:
  """Returns the class lines; raises `UserError` if one is wrong."""
  path: Any = listing.origin
  if not isinstance(listing.classes, Path):
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


def read_list(folder: Path, split: str) -> list[str]:
  """Returns the ids of a list; raises `UserError` if none, or one repeats."""
  path = folder / f'{split}.txt'
  files = {
    normal(file.stem): file
    for file in sorted(folder.glob('*'))
    if file.suffix.lower() == '.txt' and file.name != 'classes.txt'
  }
  require_split(path, normal(split), files)
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


def inside(place: object, listed: str) -> str:
  """Returns a listed id in one spelling; raises `UserError` if it leads out."""
  name = normal(os.path.normpath(listed))
  if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
    bare, _ = os.path.splitext(os.path.basename(name))
    raise UserError(f'{listed!r} leads out of {place}; list ids, as {bare!r}')
  return name


def only(name: str, files: Sequence[Path]) -> Path:
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


class Files(dict[str, list[Path]]):
  """The files of one kind by id, which is their name without suffix."""

  def __init__(
    self,
    what: str,
    root: Path,
    pattern: str,
    suffixes: Sequence[str],
    fixed: Collection[str] = (),  # folders that are no part of an id
  ) -> None:
    """Finds what fits a glob; raises `UserError` if no file has a suffix."""
    super().__init__()
    self.what, self.suffixes = what, ' '.join(suffixes)
    self.place = str(root / pattern).removesuffix('/**/*')
    self._others: dict[str, str] = {}  # names of files of no such suffix
    self._hints = 5  # comparing with all names takes its time
    found = glob.glob(pattern, root_dir=root, recursive=True)
    # An array is the image where there is no other.
    for name in sorted(found, key=lambda name: (name.endswith('.npy'), name)):
      path = root / name
      folders = [x for x in Path(name).parent.parts if x not in fixed]
      key = normal('/'.join([*folders, path.stem]))
      if path.suffix.lower() not in suffixes:
        self._others[key] = path.name
      elif path.suffix != '.npy' or key not in self:
        self.setdefault(key, []).append(path)
    if not self:
      raise UserError(
        f'{self.place}: no {what} there; suffixes are {self.suffixes}'
      )

  def missing(self, key: str, name: str) -> UserError:
    """Says what is there instead of the file `key` of the id `name`."""
    hint = ''
    if key in self._others:
      hint = f'; there is {self._others[key]}, but its suffix is none of '
      hint += self.suffixes
    elif self._hints > 0:
      self._hints -= 1
      names = (file.name for files in self.values() for file in files)
      hint = near(os.path.basename(key), names)
    return UserError(
      f'{self.place}: there is no {self.what} {key!r}{hint}; add it or take '
      f'{name!r} off the list'
    )


def find_items(
  listed: Iterable[str],
  images: Files,
  masks: Files,
  mask_ids: Callable[[str], Sequence[str]],
) -> dict[str, Item | UserError]:
  """Finds the files of ids, or errors that say what is missing.

  Ids may have the suffix of their image. `mask_ids` returns those that a mask
  may have, the first that is there counts. Names are compared in Unicode's
  composed form (NFC): other systems write 'ü' as two characters.
  """

  def find(name: str) -> Item:
    name = inside(images.place, name)
    bare, suffix = os.path.splitext(name)
    files = images.get(name, [])
    if not files and suffix.lower() in IMAGE_SUFFIXES and bare in images:
      own = [file for file in images[bare] if file.suffix == suffix]
      files, name = own or images[bare], bare
    if not files:
      raise images.missing(name, name)
    keys = mask_ids(name)
    if not (own := next((masks[key] for key in keys if key in masks), [])):
      raise masks.missing(keys[0], name)
    return Item(name, only(name, files), only(name, own))

  found = dict[str, Item | UserError]()
  for name in listed:
    try:
      found[name] = find(name)
    except UserError as error:
      found[name] = error
  return found


def normal(name: str) -> str:
  """Returns a name in Unicode's composed form."""
  return unicodedata.normalize('NFC', name)
