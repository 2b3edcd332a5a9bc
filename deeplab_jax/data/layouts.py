"""Where the files of known data sets lie: a function for each layout.

It takes the folder of the data set and a split, and returns what it finds; its
other arguments are options, `config.data.options.NAME`. The layout of a VOC
devkit is in `folder_files`, that of COCO in `coco`, that of TFDS in `tfds_set`.
"""

import dataclasses
import difflib
import glob
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from deeplab_jax.data import folder_files
from deeplab_jax.data.bands import SUFFIXES
from deeplab_jax.data.datasets import voc_palette
from deeplab_jax.data.folder_files import Files
from deeplab_jax.data.label_files import LABEL_SUFFIXES
from deeplab_jax.data.records import Listing
from deeplab_jax.data.voc_sources import hold_out
from deeplab_jax.runtime.errors import UserError, naming

log = logging.getLogger(__name__)

T = TypeVar('T')
_SPLITS = ('train', 'val', 'test', 'training', 'validation', 'valid')


def images_masks(
  root: Path,
  split: str,
  *,
  images: str = 'images',
  masks: str = 'masks',
  holdout: float = 0.2,
) -> Listing:
  """Two folders or globs, whose files are matched by name.

  The names of all masks may begin or end with more than those of the images.
  `{split}` in both is the split, as are folders SPLIT in them or above them.
  Else lists SPLIT.txt hold the ids, or `holdout` is the share of `val`.
  """
  places, known = [images, masks], list[str]()
  for form in ('{}', '{}/{{split}}', '{{split}}/{}'):
    forms = [form.format(place) for place in (images, masks)]
    filled = {s: forms[0].replace('{split}', s) for s in (split, *_SPLITS)}
    found = [s for s in filled if glob.glob(filled[s], root_dir=root)]
    if '{split}' in forms[0] and found and not known:
      known, places = found, [x.replace('{split}', split) for x in forms]
      folder_files.require_split(root / forms[0], split, known)
  # Splits may use the same names: a folder of the split is a part of the id.
  own = split if known and all(split in x.split('/') for x in places) else ''
  of_images = _find('image', root, places[0], SUFFIXES, own)
  of_masks = _find('mask', root, places[1], LABEL_SUFFIXES, own)
  origin, ids = root / places[0], dict.fromkeys(of_images)
  lists = (root / f'{name}.txt' for name in (split, *_SPLITS))
  if not known and any(path.is_file() for path in lists):
    origin = root / f'{split}.txt'
    ids = dict.fromkeys(folder_files.read_list(root, split))
  elif not known:
    ids = share(origin, split, ids, holdout)
  affixes = _affixes(of_images, of_masks)
  pairs = folder_files.find_items(
    ids, of_images, of_masks, lambda name: [_mask_of(name, affixes)]
  )
  return Listing(
    origin=origin,
    found=pairs,
    classes=root / 'classes.txt',
    label_folder=root / masks if (root / masks).is_dir() else None,
  )


def share(
  origin: object, split: str, found: Mapping[str, T], holdout: float
) -> dict[str, T]:
  """Returns those of `train`, or the share of `val`, by a hash of their ids."""
  folder_files.require_split(origin, split, ('train', 'val'))
  with naming('config.data.options.holdout'):
    train, val = hold_out(list(found), holdout)
  chosen = train if split == 'train' else val
  if not chosen:
    raise UserError(
      f'{origin}: the split {split!r} is empty: config.data.options.holdout='
      f'{holdout} of {len(found)} images; set it higher'
    )
  text = '%s: %d of %d images of %s, by config.data.options.holdout=%g'
  log.info(text, split, len(chosen), len(found), origin, holdout)
  return {name: found[name] for name in chosen}


def _find(
  what: str, root: Path, place: str, suffixes: Sequence[str], own: str
) -> Files:
  """Finds the files of a folder or glob; ids have no fixed folder but `own`."""
  if not glob.has_magic(place):
    also = 'others if config.data.options.images and .masks name them'
    folder_files.require_folders(root, place, also=also)
    place += '/**/*'
  fixed = {*root.parts, *(x for x in place.split('/') if not glob.has_magic(x))}
  return Files(what, root, place, suffixes, fixed - {own})


# What begins and ends the names of images, and those of masks.
_Affixes = tuple[str, str, str, str]


def _affixes(images: Files, masks: Files) -> _Affixes:
  """Finds what names have around the part that an image and its mask share."""
  matcher = difflib.SequenceMatcher(autojunk=False)
  tries = {('', '', '', '')}
  for name in map(os.path.basename, (min(images), max(images))):
    matcher.set_seq2(name)
    for mask in map(os.path.basename, masks):
      matcher.set_seq1(mask)
      start, at, size = matcher.find_longest_match()
      own = name[:at], name[at + size :]
      if size:
        tries.add((*own, mask[:start], mask[start + size :]))
  scores = {
    affixes: sum(_mask_of(key, affixes) in masks for key in images)
    for affixes in sorted(tries, key=lambda x: (len(''.join(x)), x))[:20]
  }
  best = max(scores, key=scores.__getitem__)
  if not scores[best]:
    raise UserError(
      f'{masks.place}: no name there, as {min(masks)!r}, is that of an image, '
      f'as {min(images)!r}, but for a beginning or end that all have; rename '
      'them'
    )
  return best


def _mask_of(key: str, affixes: _Affixes) -> str:
  """Returns the id of the mask of an image; its own if the name differs."""
  start, end, mask_start, mask_end = affixes
  folder, slash, name = key.rpartition('/')
  bare = name[len(start) : len(name) - len(end)]
  if name != f'{start}{bare}{end}':
    return key
  return f'{folder}{slash}{mask_start}{bare}{mask_end}'


def ade20k(root: Path, split: str) -> Listing:
  """ADE20K as of the scene parsing challenge: 150 classes, 0 is void.

  Zhou et al., "Scene Parsing through ADE20K Dataset" (CVPR 2017).
  """
  folder_files.require_folders(
    root, 'images', 'annotations', also='a folder of each split'
  )
  split = {'train': 'training', 'val': 'validation'}.get(split, split)
  listing = images_masks(root, split, masks='annotations')
  names = [f'class {i}' for i in range(1, 151)]
  path = root / 'objectInfo150.txt'
  if path.is_file():  # index, share, two counts, names
    lines = folder_files.read_lines(path, 2**20)[1:]
    names = [line.split('\t')[-1].partition(',')[0] for line in lines]
  colors = voc_palette(len(names) + 1).tolist()
  rows = zip(['void', *names], colors, strict=True)
  classes = [f'{name} {r} {g} {b}' for name, (r, g, b) in rows]
  return dataclasses.replace(listing, classes=classes)


def cityscapes(root: Path, split: str) -> Listing:
  """Cityscapes, gtFine: its 19 classes, by trainIds or by ids.

  Cordts et al., "The Cityscapes Dataset" (CVPR 2016). The table is that of
  `labels.py` in its scripts.
  """
  folder_files.require_folders(
    root, 'leftImg8bit', 'gtFine', also='a folder of each split'
  )
  made = any(root.glob('gtFine/*/*/*_gtFine_labelTrainIds.png'))
  kind = 'labelTrainIds' if made else 'labelIds'
  listing = images_masks(
    root,
    split,
    images='leftImg8bit/{split}/*/*_leftImg8bit.png',
    masks=f'gtFine/{{split}}/*/*_gtFine_{kind}.png',
  )
  index = {int(line.split()[0]): i for i, line in enumerate(_CITYSCAPES)}
  pairs = [f'{i}:{index.get(i, "void")}' for i in range(34)]
  return dataclasses.replace(
    listing,
    classes=[line.split(maxsplit=1)[1] for line in _CITYSCAPES],
    label_map='' if made else ','.join(pairs),
  )


# Id, name and color of each class.
_CITYSCAPES = (
  '7 road 128 64 128', '8 sidewalk 244 35 232', '11 building 70 70 70',
  '12 wall 102 102 156', '13 fence 190 153 153', '17 pole 153 153 153',
  '19 traffic light 250 170 30', '20 traffic sign 220 220 0',
  '21 vegetation 107 142 35', '22 terrain 152 251 152', '23 sky 70 130 180',
  '24 person 220 20 60', '25 rider 255 0 0', '26 car 0 0 142',
  '27 truck 0 0 70', '28 bus 0 60 100', '31 train 0 80 100',
  '32 motorcycle 0 0 230', '33 bicycle 119 11 32',
)  # fmt: skip
