"""PASCAL VOC 2012 for segmentation, alone or with the masks of SBD.

TFDS has the boxes of VOC but no masks. There are three variants:

  voc2012    train, val and trainval of VOC; test, without labels, if its images
             are on this disk
  trainaug   train: (SBD train + SBD val + VOC train) minus VOC val; val
  list       train: the ids of a text file, less a share called holdout; val

Where both have a mask, VOC's is taken; val has VOC's masks only. The sources
are VOCtrainval_11-May-2012.tar (Everingham et al.) and benchmark.tgz of SBD
(Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011).
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data import datasets, folder, images, labels, records
from deeplab_jax.data import voc_sources as sources
from deeplab_jax.data.records import Builders, Item, Sample
from deeplab_jax.runtime.download import missing_bytes, require_space
from deeplab_jax.runtime.errors import UserError, naming

log = logging.getLogger(__name__)

_INFO = datasets.DATASETS['voc2012']
_MEANING = labels.Meaning(_INFO.classes, _INFO.ignore_label)

# Images in each split of each variant, where they are the same for everyone.
PUBLISHED: dict[str, dict[str, int]] = {
  'voc2012': {'train': 1464, 'val': 1449, 'trainval': 2913, 'test': 1456},
  'trainaug': {'train': 10582, 'val': 1449},
  'list': {'val': 1449},
}
_VOC_IMAGES = 17_125  # in its archive, with and without masks
_OTHER_DISK = 'make room there, or set config.data.prepared_dir to another disk'


@dataclasses.dataclass(eq=False, kw_only=True)
class VocConfig(records.SourceConfig):
  """What to prepare; without `places` the sources are downloaded."""

  variant: str = ''
  places: dict[str, Path] = dataclasses.field(default_factory=dict)
  list_file: str = ''
  train: Sequence[str] = dataclasses.field(default=(), repr=False)
  holdout: Sequence[str] = dataclasses.field(default=(), repr=False)
  on_bad_image: str = 'stop'


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
) -> Builders:
  """Loads all splits of a variant, see `load.load_dataset`.

  `list` is a text file of one id a line, with or without folder and suffix;
  only the first word of a line counts. `holdout` is the share to hold out.
  Raises `UserError` if something is missing or cannot be used.
  """
  records.require_ignore_label(_INFO, ignore_label)
  config = VocConfig(variant=variant, on_bad_image=on_bad_image)
  state: Any = [on_bad_image]
  prefix = variant
  if variant == 'list':
    ids = sources.read_list_file(list)
    with naming('config.data.options.holdout'):
      config.train, config.holdout = sources.hold_out(ids, holdout)
    config.list_file = list
    prefix += '-' + re.sub(r'\W+', '_', Path(list).stem)
    state += [ids, holdout]
  if directory:
    config.places = sources.find_places(directory, variant != 'voc2012')
    prefix += '-' + records.fingerprint(str(config.places['root']))[:8]
    state += sources.state_of(config.places)
  else:
    state += [source.digest for source in sources.SOURCES.values()]
  config.prefix = f'{prefix}-'
  config.name = config.prefix + records.fingerprint(*state)
  builder = records.prepared(Voc2012Segmentation, prepared_dir, config)
  if 'test' in splits and 'test' not in builder.info.splits:
    raise UserError(
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


class Voc2012Segmentation(records.RecordsBuilder):
  """TFDS builder of PASCAL VOC 2012 with masks; takes a `VocConfig`."""

  VERSION = tfds.core.Version('1.0.0')

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    config = self.builder_config
    self.info.metadata['info'] = _INFO.to_json()
    downloads = Path(dl_manager.download_dir) / self.name
    if not config.places:
      _require_download_space(config, downloads)
    splits = _find_splits(config, downloads)
    for split, count in PUBLISHED[config.variant].items():
      number = len(splits.get(split, range(count)))
      if number != count:
        message = '%s is not the published set: %s has %d images, not %d'
        log.warning(message, config.variant, split, number, count)
    found = (x for items in splits.values() for item in items for x in item[1:])
    needed = sum(file.state[0] for file in found if file)
    folder = Path(self.data_dir)
    require_space(folder, needed, 'the prepared set', _OTHER_DISK)
    return {
      split: (
        datasets.Tally(_INFO.num_classes, _INFO.ignore_label),
        self._generate_examples(split, items),
      )
      for split, items in splits.items()
    }

  def _generate_examples(
    self, split: str, items: Sequence[Item]
  ) -> Iterator[Sample]:
    skip, origin = self.builder_config.on_bad_image, f'split {split!r}'
    read = records.readable(items, _read, origin=origin, on_bad_image=skip)
    return (sample for _, sample in read)


def _require_download_space(config: VocConfig, downloads: Path) -> None:
  """Refuses what would not fit, before the first byte is downloaded."""
  voc, sbd = sources.SOURCES['voc'], sources.SOURCES['sbd']
  wanted = [voc, sbd] if config.variant == 'trainaug' else [voc]
  missing = sum(missing_bytes(downloads / x.name, x.size) for x in wanted)
  counts = PUBLISHED[config.variant] | {'test': 0}  # not in the downloads
  count = sum(counts.values()) + len(config.train) + len(config.holdout)
  prepared = count * voc.size // _VOC_IMAGES
  what = 'the download and preparation of PASCAL VOC 2012'
  require_space(downloads, missing + prepared, what, _OTHER_DISK)


def _read(item: Item) -> Sample:
  if item.label:
    image, label, _ = folder.read_pair(item, _MEANING)
  else:
    picture = images.open_picture(item.image)
    image = picture.storable()
    label = np.full(picture.pixels.shape[:2], _INFO.ignore_label, np.uint8)
  return Sample(item.name, item.image.name, image, label)


class _Ids(NamedTuple):
  """Ids, and where they are listed."""

  names: Sequence[str]
  origin: str


def _find_splits(config: VocConfig, downloads: Path) -> dict[str, list[Item]]:
  """Finds the images and the masks of each split."""
  place = config.places.get('voc') or sources.fetch('voc', downloads)
  files = sources.find_files('voc', place)
  if 'test' in config.places:
    files |= sources.find_files('test', config.places['test'])
  lists = {
    name: _Ids(sources.parse_ids(file.read()), str(file))
    for (part, name), file in files.items()
    if part == 'list'
  }
  if not lists.keys() >= {'train', 'val'}:
    raise UserError(f'{place}: no train.txt or no val.txt in ImageSets')
  train, val = lists['train'], lists['val']
  items = {'train': [], 'val': _find_items(val, files)}  # without SBD's masks
  if config.variant == 'voc2012':
    _refuse_val(train, val)
    trainval = _Ids(sorted([*train.names, *val.names]), train.origin)
    items['trainval'] = _find_items(trainval, files)
    test = lists.get('test')
    if test and any(('image', name) in files for name in test.names):
      items['test'] = _find_items(test, files, void=True)
  elif config.variant == 'trainaug':
    sbd, files = _add_sbd(config, downloads, files)
    names = sorted({*sbd.names, *train.names}.difference(val.names))
    listed = lists.get('trainaug') or lists.get('train_aug')
    train = listed or _Ids(names, sbd.origin)
    _refuse_val(train, val)
  else:
    train = _Ids([*config.train, *config.holdout], config.list_file)
    _refuse_val(train, val)
    unmasked = sorted(x for x in train.names if ('mask', x) not in files)
    if unmasked:
      why = (
        f', for the {len(unmasked)} of {len(train.names)} ids in '
        f'{train.origin} that VOC has no mask of: {_some(unmasked)}'
      )
      _, files = _add_sbd(config, downloads, files, why)
    if config.holdout:
      held = train._replace(names=config.holdout)
      items['holdout'] = _find_items(held, files)
    train = train._replace(names=config.train)
  items['train'] = _find_items(train, files)
  return items


def _add_sbd(
  config: VocConfig, downloads: Path, files: sources.Files, why: str = ''
) -> tuple[_Ids, sources.Files]:
  """Returns the ids of SBD, and `files` with what SBD has beyond them.

  A folder SegmentationClassAug takes the place of SBD.
  """
  places = config.places
  if 'aug' in places:
    added = sources.find_files('aug', places['aug'])
    return _Ids([name for _, name in added], str(places['aug'])), added | files
  if places and 'sbd' not in places:
    raise UserError(
      f'{places["root"]}: neither {sources.SOURCES["sbd"].name} nor '
      f'benchmark_RELEASE/dataset nor SegmentationClassAug is there{why}; put '
      'one of them in, or leave config.data.dir empty to download'
    )
  place = places.get('sbd') or sources.fetch('sbd', downloads)
  added = sources.find_files('sbd', place, skip=files)
  names = []
  for split in ('train', 'val'):
    if ('sbd list', split) not in added:
      raise UserError(f'{place}: no {split}.txt in it')
    names += sources.parse_ids(added['sbd list', split].read())
  return _Ids(names, str(place)), added | files


def _find_items(
  ids: _Ids, files: sources.Files, *, void: bool = False
) -> list[Item]:
  """Finds the files of each id; masks only if the labels are not `void`."""
  items = [
    Item(x, files.get(('image', x)), void or files.get(('mask', x)))
    for x in ids.names
  ]
  lacking = [
    f'{x.name} (no {"mask" if x.image else "image"})'
    for x in items
    if not (x.image and x.label)
  ]
  if lacking:
    raise UserError(
      f'{ids.origin}: {len(lacking)} of {len(ids.names)} ids have no image or '
      f'no mask: {_some(lacking)}; add the files or take the ids off the list'
    )
  return [item._replace(label=None) for item in items] if void else items


def _refuse_val(train: _Ids, val: _Ids) -> None:
  if shared := sorted({*train.names}.intersection(val.names)):
    raise UserError(
      f'{train.origin}: {len(shared)} of {len(train.names)} ids are images of '
      f'VOC val, which would make its score worthless: {_some(shared)}; take '
      'them off the list'
    )


def _some(names: list[str]) -> str:
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
