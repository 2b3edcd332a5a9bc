"""Data sets by name: prepared on disk once, then read at random access."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from deeplab_jax.data import (
  coco,
  folder,
  folder_files,
  layouts,
  records,
  shapes,
  tfds_set,
  voc,
)
from deeplab_jax.data.datasets import DatasetInfo, Tally
from deeplab_jax.data.images import decode_label
from deeplab_jax.data.records import Builders, Layout
from deeplab_jax.runtime.errors import UserError, check_choice, naming, require


class Records(Sequence[dict[str, Any]]):
  """Random access to the records that TFDS gives as bytes, from a folder."""

  def __init__(self, serialized: Sequence[bytes], folder: str) -> None:
    self._serialized, self._folder = serialized, folder

  def __len__(self) -> int:
    return len(self._serialized)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return map(self.__getitem__, range(len(self)))

  def __getitem__(self, index: Any) -> Any:
    features = records.read_features(self._serialized, index, self._folder)
    return {
      name: (feature.bytes_list.value or feature.int64_list.value)[0]
      for name, feature in features.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A prepared data set."""

  info: DatasetInfo  # what the label values mean
  builders: Builders  # for every split the one that holds its records

  def source(self, split: str) -> Records:
    """Returns the records of a split.

    A record is a dict of `image` and `label` (bytes for `images.decode_image`
    and `decode_label`), `name`, `file_name`, `height` and `width`.
    """
    builder, key = self._builder(split), records.split_key(split)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    serialized = builder.as_data_source(key, deserialize_method=raw)
    return Records(serialized, builder.data_path)

  def sizes(self, split: str) -> list[tuple[int, int]]:
    """Returns (height, width) of each record; decodes no image."""
    return [(int(x['height']), int(x['width'])) for x in self.source(split)]

  def names(self, split: str) -> list[str]:
    """Returns the ids of a split, in the order of its records."""
    return list(self._builder(split).info.metadata['names'][split])

  def shared_names(self, split: str, other: str) -> list[str]:
    """Returns the ids that are in both splits, sorted."""
    return sorted(set(self.names(split)).intersection(self.names(other)))

  def tally(self, split: str) -> Tally:
    """Returns what a split holds: images, sizes, pixels of each class."""
    metadata = self._builder(split).info.metadata
    return Tally.from_json(metadata['splits'][split])

  def classes_shown(self, split: str) -> list[list[int]]:
    """Returns the classes in each label, in the order of the records.

    Those of a set of an older version, which does not know them, are read.
    """
    known = self._builder(split).info.metadata.get('classes', {})
    if split in known:
      return known[split]
    tally = Tally(self.info.num_classes, self.info.ignore_label)
    labels = (decode_label(record['label']) for record in self.source(split))
    return list(map(tally.add, labels))

  def _builder(self, split: str) -> tfds.core.DatasetBuilder:
    if split not in self.builders:
      known = ', '.join(self.builders)
      raise UserError(f'no split {split!r} in {self.info.name}; known: {known}')
    return self.builders[split]


# A new data set is a line here, or is passed to `load_dataset`: a loader, or a
# layout, which is a function of (root, split, **options).
LOADERS: dict[str, Callable[..., Any]] = {
  'shapes': shapes.load,
  'folder': folder_files.voc_devkit,
  'images_masks': layouts.images_masks,
  'coco': coco.coco,
  'cityscapes': layouts.cityscapes,
  'ade20k': layouts.ade20k,
  **voc.LOADERS,
}


def _loader(name: Any) -> Callable[..., Any] | None:
  if str(name).startswith('tfds/'):
    return functools.partial(tfds_set.tfds_set, name[5:])
  return name if callable(name) else LOADERS.get(name)


def find_layout(name: Any, options: Mapping[str, Any]) -> Layout | None:
  """Returns a layout, by name or given, with its options; None for a loader."""
  found = _loader(name)
  takes = list(inspect.signature(found).parameters) if found else []
  if not found or takes[:2] != ['root', 'split']:
    return None
  _refuse_unknown(name, options, takes[2:])
  return functools.partial(found, **options)


def load_dataset(
  name: str | Callable[..., Any],
  *,
  directory: str | None = '',
  prepared_dir: str | None = '',
  splits: Sequence[str] = ('train', 'val'),
  ignore_label: int = 255,
  label_map: str | None = '',
  on_bad_image: str = 'stop',
  as_stored: bool = False,
  tile: int | None = None,
  options: Mapping[str, Any] | None = None,
) -> Dataset:
  """Loads a data set, and prepares it first if that was not done yet.

  Args:
    name: a key of `LOADERS`, a layout (see `Layout`), or a loader: a
      function that takes, by keyword, those of the other arguments that it
      needs and its own options, and returns for each split a `RecordsBuilder`
      from `records.prepared`.
    directory: the source, for the data sets that have one.
    prepared_dir: folder of prepared data sets; empty for TFDS's own folder
      (TFDS_DATA_DIR, else ~/tensorflow_datasets).
    splits: the splits wanted.
    ignore_label: label value of void pixels in the files.
    label_map: only for layouts, see `labels.parse_label_map`.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.
    as_stored: images keep their own channels and bits, else they become RGB.
    tile: side in pixels of the tiles that larger images are cut into.
    options: options that only this data set has, by name.

  Raises `UserError` if an argument, or anything in the source, is wrong.
  """
  loader = _loader(name)
  if loader is None:
    known = ', '.join([*LOADERS, 'tfds/NAME'])
    raise UserError(f'config.data.name: no data set {name!r}; known: {known}')
  with naming('config.data'):
    fits = 0 <= ignore_label <= 255
    require(fits, 'ignore_label must be 0 to 255', ignore_label)
    check_choice('on_bad_image', on_bad_image, ('stop', 'skip'))
    require(bool(splits), 'splits must name at least one', splits)
  arguments = {
    'directory': directory or '',
    'prepared_dir': prepared_dir or '',
    'splits': splits,
    'ignore_label': ignore_label,
    'label_map': label_map or '',
    'on_bad_image': on_bad_image,
    'as_stored': as_stored,
    'tile': tile or 0,
  }
  options = options or {}
  if layout := find_layout(name, options):
    loader, options = functools.partial(folder.load, layout=layout), {}
  builders = loader(**_taken(loader, name, arguments, options))
  info = next(iter(builders.values())).info.metadata['info']
  dataset = Dataset(DatasetInfo.from_json(info), builders)
  # It refuses a split that is not there.
  first, *others = (dataset.tally(split) for split in splits)
  for split, tally in zip(splits[1:], others, strict=True):
    if tally.kind != first.kind:
      raise UserError(
        f'{dataset.info.name}: {split} has images of {tally.kind}, {splits[0]}'
        f' of {first.kind}; store all alike'
      )
  measured = dataclasses.replace(dataset.info, **first.describe_images())
  return dataclasses.replace(dataset, info=measured)


def _taken(
  loader: Any, name: Any, arguments: dict[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what a loader takes; refuses what is set and it does not take."""
  fixed = getattr(loader, 'keywords', {})  # by functools.partial
  parameters = inspect.signature(loader).parameters
  takes = [key for key in parameters if key not in fixed]
  _refuse_unknown(name, options, [k for k in takes if k not in arguments])
  for key in ('directory', 'label_map', 'as_stored', 'tile'):
    if arguments[key] and key not in takes:
      setting = 'dir' if key == 'directory' else key
      raise UserError(
        f'config.data.{setting}={arguments[key]} is for data sets that read '
        f"it, as 'folder' does; {_shown(name)} does not"
      )
  return {k: v for k, v in arguments.items() if k in takes} | dict(options)


def _refuse_unknown(
  name: Any, options: Mapping[str, Any], known: Sequence[str]
) -> None:
  for key in options:
    if key not in known:
      raise UserError(
        f'config.data.options.{key}: data set {_shown(name)} has no such '
        f'option; known: {", ".join(known) or "none"}'
      )


def _shown(name: Any) -> str:
  return getattr(name, 'func', name).__name__ if callable(name) else name
