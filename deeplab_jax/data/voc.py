"""PASCAL VOC 2012 for segmentation, also with the masks of SBD.

The data set of TFDS has no masks. The three variants are those of the field:

  voc2012    train (1464 images), val (1449), trainval, and test where it lies
             on this disk, without labels
  trainaug   train: (SBD train + SBD val + VOC train) minus VOC val, 10,582
             images; val
  list       train: the ids of a text file but for a share, which is holdout;
             val

VOC's masks go before those of others, and val has VOC's alone. Sources are
VOCtrainval_11-May-2012.tar (Everingham et al.) and SBD's benchmark.tgz
(Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data import (
  archives,
  datasets,
  images,
  label_files,
  records,
  voc_lists,
  voc_places,
)
from deeplab_jax.runtime import download, errors

log = logging.getLogger(__name__)

_INFO = datasets.DATASETS['voc2012']

# Images in each split of each variant, where all have the same.
PUBLISHED: dict[str, dict[str, int]] = {
  'voc2012': {'train': 1464, 'val': 1449, 'trainval': 2913, 'test': 1456},
  'trainaug': {'train': 10582, 'val': 1449},
  'list': {'val': 1449},
}
_VOC_IMAGES = 17_125  # in its archive, with and without masks
_OTHER_DISK = 'make room there, or set config.data.prepared_dir to another disk'


@dataclasses.dataclass(eq=False, kw_only=True)
class VocConfig(records.SourceConfig):
  """What to prepare; `make_config` fills it in.

  Attributes:
    variant: a key of `PUBLISHED`.
    places: where the data lie on this disk; None to download them.
    listed: of 'list', the ids.
    list_file: where they were read.
    holdout: the share of them that is held out.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.
  """

  variant: str = ''
  places: voc_places.Places | None = None
  listed: tuple[str, ...] = dataclasses.field(default=(), repr=False)
  list_file: str = ''
  holdout: float = 0.1
  on_bad_image: str = 'stop'


def make_config(
  variant: str,
  *,
  directory: str = '',
  list_file: str = '',
  holdout: float = 0.1,
  on_bad_image: str = 'stop',
) -> VocConfig:
  """Looks where the data are, and what state they are in.

  Args:
    variant: a key of `PUBLISHED`.
    directory: that holds the archives, or what they unpack to; '' to download
      them.
    list_file: of 'list', a text file of one id a line, with or without folder
      and suffix; of several words on a line the first counts.
    holdout: of 'list', the share of its ids that is held out: those whose
      SHA-256 is lowest.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.

  Returns:
    The config that `Voc2012Segmentation` takes.

  Raises:
    UserError: naming what is missing or cannot be used.
  """
  prefix, listed = variant, ()
  state: list[Any] = [on_bad_image]
  if variant == 'list':
    listed = voc_lists.read_list_file(list_file)
    prefix += '-' + re.sub(r'\W+', '_', pathlib.Path(list_file).stem)
    state += [listed, holdout]
  places = None
  if directory:
    places = voc_places.find_places(directory, more_masks=variant != 'voc2012')
    prefix += '-' + records.fingerprint(str(places.root))[:8]
    state += _state_of(places)
  else:
    state += [source.digest for source in voc_places.SOURCES.values()]
  return VocConfig(
    name=f'{prefix}-{records.fingerprint(*state)}',
    prefix=f'{prefix}-',
    variant=variant,
    places=places,
    listed=listed,
    list_file=list_file,
    holdout=holdout,
    on_bad_image=on_bad_image,
  )


class Voc2012Segmentation(records.RecordsBuilder):
  """TFDS builder of PASCAL VOC 2012 with masks; takes a `VocConfig`."""

  VERSION = tfds.core.Version('1.0.0')

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    config = self.builder_config
    self.info.metadata['info'] = _INFO.to_json()
    downloads = pathlib.Path(dl_manager.download_dir) / self.name
    if config.places is None:
      _require_download_space(config, downloads)
    files = _Files(config.places, downloads, self.data_dir)
    splits = {
      split: _find_items(ids, files)
      for split, ids in _VARIANTS[config.variant](config, files).items()
    }
    differing = [
      f'{split} has {len(splits[split])} images, not {count}'
      for split, count in PUBLISHED[config.variant].items()
      if split in splits and len(splits[split]) != count
    ]
    if differing:
      log.warning(
        '%s is not the published set: %s', config.variant, ', '.join(differing)
      )
    needed = sum(item.size for items in splits.values() for item in items)
    download.require_space(
      pathlib.Path(self.data_dir), needed, 'the prepared set', _OTHER_DISK
    )
    return {
      split: (
        datasets.Tally(_INFO.num_classes, _INFO.ignore_label),
        self._generate_examples(split, items),
      )
      for split, items in splits.items()
    }

  def _generate_examples(
    self, split: str, items: Sequence[_Item]
  ) -> Iterator[records.Sample]:
    on_bad_image = self.builder_config.on_bad_image
    for item, (image, size, label) in records.readable(
      items, _read, origin=f'split {split!r}', on_bad_image=on_bad_image
    ):
      records.check_size(item, size, label.shape)
      records.check_values(
        item,
        label,
        _INFO.num_classes,
        _INFO.ignore_label,
        remedy='or replace the file',
      )
      yield records.Sample(item.name, item.image.name, image, label)


def load(
  variant: str,
  *,
  directory: str,
  prepared_dir: str,
  splits: Sequence[str],
  ignore_label: int,
  on_bad_image: str,
  list: str = '',
  holdout: float = 0.1,
) -> records.Builders:
  """Loads a variant, see `load.load_dataset`."""
  records.require_ignore_label(_INFO, ignore_label)
  config = make_config(
    variant,
    directory=directory,
    list_file=list,
    holdout=holdout,
    on_bad_image=on_bad_image,
  )
  builder = records.prepared(Voc2012Segmentation, prepared_dir, config)
  if 'test' in splits and 'test' not in builder.info.splits:
    raise errors.UserError(
      f"no split 'test' in {variant}: its images are for registered users; "
      'put VOC2012test.tar beside the rest, set config.data.dir to that '
      "folder, and config.data.name='voc2012_segmentation'"
    )
  return dict.fromkeys(builder.info.splits, builder)


_load_whole = functools.partial(load, list='', holdout=0.0)
LOADERS = {
  'voc2012_segmentation': functools.partial(_load_whole, 'voc2012'),
  'voc2012_segmentation/voc2012': functools.partial(_load_whole, 'voc2012'),
  'voc2012_segmentation/trainaug': functools.partial(_load_whole, 'trainaug'),
  'voc2012_segmentation/list': functools.partial(load, 'list'),
}


@dataclasses.dataclass(frozen=True)
class _Ids:
  """The ids of a split.

  Attributes:
    names: the ids.
    origin: where they stand, for errors.
    masks: where their masks are, the first before the others; none for void.
  """

  names: list[str]
  origin: str
  masks: tuple[dict[str, archives.File], ...]


@dataclasses.dataclass(frozen=True)
class _Item:
  """One listed image: its id and its two files; without label it is void."""

  name: str
  image: archives.File
  label: archives.File | None

  @property
  def size(self) -> int:
    """In bytes."""
    return self.image.size + (self.label.size if self.label else 0)


def _find_items(ids: _Ids, files: _Files) -> list[_Item]:
  """Finds the files of a split.

  Raises:
    UserError: if ids are without image or mask; tells how many, and the first.
  """
  items, lacking = [], []
  for name in ids.names:
    image = files.images.get(name)
    label = next((masks[name] for masks in ids.masks if name in masks), None)
    if image is None:
      lacking.append(f'{name} (no image)')
    elif label is None and ids.masks:
      lacking.append(f'{name} (no mask)')
    else:
      items.append(_Item(name, image, label))
  if lacking:
    raise errors.UserError(
      f'{ids.origin}: {len(lacking)} of {len(ids.names)} ids have no image or '
      f'no mask: {voc_lists.some(lacking)}; add the files or take the ids off '
      'the list'
    )
  return items


def _read(item: _Item) -> tuple[bytes, tuple[int, int], np.ndarray]:
  """The image's bytes to store and its size, and the label uint8 [H, W]."""
  data, size = images.storable_image(str(item.image), item.image.read())
  if item.label is None:
    label = np.full(size, _INFO.ignore_label, np.uint8)
  else:
    mat = item.label.name.endswith('.mat')
    read_label = label_files.read_mat_label if mat else label_files.read_label
    label = read_label(str(item.label), item.label.read())
  return data, size, label


class _Files:
  """The files of VOC, and of SBD when they are asked for.

  Attributes:
    images: by id.
    masks: VOC's own, by id.
  """

  def __init__(
    self,
    places: voc_places.Places | None,
    downloads: pathlib.Path,
    spool_dir: str,
  ) -> None:
    self._places, self._downloads = places, downloads
    self._spool_dir = spool_dir
    self._voc = places.voc if places else _download('voc', downloads)
    parts = self._open(self._voc, voc_places.VOC_PARTS)
    if places and places.test:
      test = self._open(places.test, voc_places.VOC_PARTS)
      parts = {part: files | test[part] for part, files in parts.items()}
    self.images = parts['JPEGImages']
    self.masks = parts['SegmentationClass']
    self._lists = parts['ImageSets/Segmentation']

  def listed(self, name: str) -> _Ids | None:
    """The ids in ImageSets/Segmentation/NAME.txt, if there is one."""
    file = self._lists.get(name)
    if file is None:
      return None
    return _Ids(voc_lists.parse_ids(file.read()), str(file), (self.masks,))

  def train_and_val(self) -> tuple[_Ids, _Ids]:
    """The ids of VOC's train and val.

    Raises:
      UserError: if a list is not there.
    """
    train, val = self.listed('train'), self.listed('val')
    if train is None or val is None:
      raise errors.UserError(
        f'{self._voc}: ImageSets/Segmentation has no train.txt or no val.txt'
      )
    return train, val

  def more_masks(self, wanted_for: str = '') -> _Ids:
    """Opens SBD, or the folder SegmentationClassAug.

    Images that VOC lacks are added to `images`.

    Args:
      wanted_for: what needs it, for the error.

    Returns:
      All ids of the data set, with VOC's masks before its own.

    Raises:
      UserError: if neither is there.
    """
    places = self._places
    if places and places.aug:
      masks = self._open(places.aug, voc_places.AUG_PARTS)['.']
      return _Ids(sorted(masks), str(places.aug), (self.masks, masks))
    place = places.sbd if places else _download('sbd', self._downloads)
    if place is None:
      raise errors.UserError(
        f'{places.root}: neither {voc_places.SOURCES["sbd"].name} nor '
        'benchmark_RELEASE/dataset nor SegmentationClassAug is there'
        f'{wanted_for}; put one of them in, or leave config.data.dir empty to '
        'download'
      )
    has = {'img': self.images, 'cls': self.masks}
    parts = self._open(place, voc_places.SBD_PARTS, has)
    self.images = parts['img'] | self.images
    names = []
    for split in ('train', 'val'):
      if split not in parts['.']:
        raise errors.UserError(f'{place}: no {split}.txt in it')
      names += voc_lists.parse_ids(parts['.'][split].read())
    return _Ids(names, str(place), (self.masks, parts['cls']))

  def _open(
    self,
    place: pathlib.Path,
    parts: Mapping[str, str],
    without: Mapping[str, Container[str]] = MappingProxyType({}),
  ) -> dict[str, dict[str, archives.File]]:
    """Finds the files of each part by id, but for the ids `without`."""

    def key(path: str) -> tuple[str, str] | None:
      found = voc_places.find_part(path, parts)
      return None if found and found[1] in without.get(found[0], ()) else found

    files = (
      archives.files_in_folder(place, parts, key)
      if place.is_dir()
      else archives.files_in_archive(place, key, self._spool_dir)
    )
    result: dict[str, dict[str, archives.File]] = {part: {} for part in parts}
    for (part, name), file in files.items():
      result[part][name] = file
    return result


def _download(kind: str, folder: pathlib.Path) -> pathlib.Path:
  source = voc_places.SOURCES[kind]
  return download.download(
    source.urls,
    digest=source.digest,
    size=source.size,
    directory=folder,
    advice=f'try again, or get {source.name} elsewhere and put it into {folder}'
    ', or into another folder and set config.data.dir to that',
  )


def _require_download_space(config: VocConfig, downloads: pathlib.Path) -> None:
  """Refuses before the first byte is written what would not fit."""
  sources = [voc_places.SOURCES['voc']]
  counts = PUBLISHED[config.variant] | {'test': 0}  # which is not downloaded
  count = sum(counts.values()) + len(config.listed)
  if config.variant == 'trainaug':
    sources.append(voc_places.SOURCES['sbd'])
  missing = sum(
    download.missing_bytes(downloads / source.name, source.size)
    for source in sources
  )
  prepared = count * voc_places.SOURCES['voc'].size // _VOC_IMAGES
  download.require_space(
    downloads,
    missing + prepared,
    'the download and preparation of PASCAL VOC 2012',
    _OTHER_DISK,
  )


def _voc2012(config: VocConfig, files: _Files) -> dict[str, _Ids]:
  train, val = files.train_and_val()
  voc_lists.refuse_val(train.names, val.names, train.origin)
  trainval = dataclasses.replace(train, names=sorted(train.names + val.names))
  splits = {'train': train, 'val': val, 'trainval': trainval}
  test = files.listed('test')
  if test and not files.images.keys().isdisjoint(test.names):
    splits['test'] = dataclasses.replace(test, masks=())
  return splits


def _trainaug(config: VocConfig, files: _Files) -> dict[str, _Ids]:
  train, val = files.train_and_val()
  more = files.more_masks()
  listed = files.listed('trainaug') or files.listed('train_aug')
  if listed:
    voc_lists.refuse_val(listed.names, val.names, listed.origin)
    more = dataclasses.replace(listed, masks=more.masks)
  else:
    names = {*more.names, *train.names}.difference(val.names)
    more = dataclasses.replace(more, names=sorted(names))
  return {'train': more, 'val': val}


def _list(config: VocConfig, files: _Files) -> dict[str, _Ids]:
  _, val = files.train_and_val()
  voc_lists.refuse_val(config.listed, val.names, config.list_file)
  train, held = voc_lists.hold_out(config.listed, config.holdout)
  masks = (files.masks,)
  unmasked = [name for name in config.listed if name not in files.masks]
  if unmasked:
    masks = files.more_masks(
      f', for the {len(unmasked)} of {len(config.listed)} ids in '
      f'{config.list_file} that VOC has no mask of: {voc_lists.some(unmasked)}'
    ).masks
  splits = {'train': _Ids(train, config.list_file, masks), 'val': val}
  if held:
    splits['holdout'] = _Ids(held, config.list_file, masks)
  return splits


# For each variant its splits.
_VARIANTS = {'voc2012': _voc2012, 'trainaug': _trainaug, 'list': _list}


def _state_of(places: voc_places.Places) -> list[Any]:
  """Names, sizes and times of the files: it changes if they do."""
  state: list[Any] = []
  for place, parts in (
    (places.voc, voc_places.VOC_PARTS),
    (places.test, voc_places.VOC_PARTS),
    (places.aug, voc_places.AUG_PARTS),
    (places.sbd, voc_places.SBD_PARTS),
  ):
    if place is None:
      continue
    if place.is_dir():
      files = archives.files_in_folder(
        place,
        parts,
        lambda path, parts=parts: voc_places.find_part(path, parts),
      )
      state += sorted((*key, f.size, f.modified) for key, f in files.items())
    else:
      stat = place.stat()
      state.append((place.name, stat.st_size, stat.st_mtime_ns))
  return state
