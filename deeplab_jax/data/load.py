"""Data sets by name: prepared on disk once, then read at random access."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging

from deeplab_jax.data import datasets, folder, labels, records, shapes, voc
from deeplab_jax.runtime import errors
from deeplab_jax.runtime import files as disk

log = logging.getLogger(__name__)

# What a loader gives: for every split the TFDS builder that holds its records.
Builders = dict[str, tfds.core.DatasetBuilder]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A prepared data set.

  Attributes:
    info: what the label values mean.
    builders: for every split the TFDS builder that holds its records.
  """

  info: datasets.DatasetInfo
  builders: Builders

  def source(self, split: str) -> Sequence[dict[str, bytes]]:
    """Returns the raw records of a split, at random access.

    A record is a dict of `image` (JPEG or PNG bytes), `label` (bytes of a gray
    PNG of class indices) and `name` (bytes); `images.decode_image` and
    `images.decode_label` decode them.
    """
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return records.Records(
      self._builder(split).as_data_source(
        records.split_key(split), deserialize_method=raw
      )
    )

  def sizes(self, split: str) -> list[tuple[int, int]]:
    """Returns (height, width) of each record; decodes no image."""
    return [
      (int(record['height']), int(record['width']))
      for record in self.source(split)
    ]

  def names(self, split: str) -> list[str]:
    """Returns the ids of a split, in the order of its records."""
    return list(self._builder(split).info.metadata['names'][split])

  def shared_names(self, split: str, other: str) -> list[str]:
    """Returns the ids that are in both splits, sorted."""
    return sorted(set(self.names(split)).intersection(self.names(other)))

  def tally(self, split: str) -> records.Tally:
    """Returns what a split holds: images, sizes, pixels of each class."""
    metadata = self._builder(split).info.metadata
    return records.Tally.from_json(metadata['splits'][split])

  def _builder(self, split: str) -> tfds.core.DatasetBuilder:
    if split not in self.builders:
      raise errors.UserError(
        f'no split {split!r} in {self.info.name}; known: '
        f'{", ".join(self.builders)}'
      )
    return self.builders[split]


def load_dataset(
  name: str | Callable[..., Builders],
  *,
  directory: str | None = '',
  prepared_dir: str | None = '',
  splits: Sequence[str] = ('train', 'val'),
  ignore_label: int = 255,
  label_map: str = '',
  on_bad_image: str = 'stop',
  options: Mapping[str, Any] | None = None,
) -> Dataset:
  """Loads a data set, and prepares it first if that was not done yet.

  Args:
    name: a key of `LOADERS`.
    directory: the source, for the data sets that have one.
    prepared_dir: where prepared data sets lie; '' is TFDS's own place
      (TFDS_DATA_DIR, else ~/tensorflow_datasets).
    splits: the splits wanted.
    ignore_label: label value of void pixels in the files.
    label_map: of 'folder', what other values in the files stand for, see
      `labels.parse_label_map`.
    on_bad_image: 'stop' at an unreadable file, or 'skip' its record.
    options: of this data set alone, by name.

  Raises:
    UserError: if the name, a split, an option or anything in the source is
      wrong.
  """
  options = {'list': '', 'holdout': 0.1} | dict(options or {})
  loader = name if callable(name) else LOADERS.get(name)
  if directory and name == 'shapes':
    raise errors.UserError(
      f"config.data.dir={directory} is for data sets that read it, as 'folder'"
      ' does; shapes does not'
    )
  if on_bad_image not in ('stop', 'skip'):
    raise errors.UserError(
      f"config.data.on_bad_image must be 'stop' or 'skip', got {on_bad_image!r}"
    )
  if loader is None:
    raise errors.UserError(
      f'config.data.name: no data set {name!r}; known: {", ".join(LOADERS)}'
    )
  if not 0 <= ignore_label <= 255:
    raise errors.UserError(
      f'config.data.ignore_label must be 0 to 255, got {ignore_label}'
    )
  if label_map and name != 'folder':
    raise errors.UserError(
      f"config.data.label_map={label_map} is for config.data.name='folder', "
      f'got {name!r}'
    )
  if not splits:
    raise ValueError('splits must name at least one split')
  builders = loader(
    directory=directory or '',
    prepared_dir=prepared_dir or None,
    splits=splits,
    ignore_label=ignore_label,
    label_map=label_map,
    on_bad_image=on_bad_image,
    list_file=options['list'],
    holdout=options['holdout'],
  )
  any_builder = next(iter(builders.values()))
  info = datasets.DatasetInfo.from_json(any_builder.info.metadata['info'])
  dataset = Dataset(info, builders)
  for split in splits:
    dataset.tally(split)  # fails early
  return dataset


def _load_shapes(
  *, prepared_dir: str | None, ignore_label: int, **unused: Any
) -> Builders:
  _check_ignore_label('shapes', ignore_label)
  config = shapes.ShapesConfig()
  builder = _prepared(shapes.ShapesSegmentation, prepared_dir, config)
  return dict.fromkeys(builder.info.splits, builder)


def _load_folder(
  *,
  directory: str,
  prepared_dir: str | None,
  splits: Sequence[str],
  ignore_label: int,
  label_map: str,
  on_bad_image: str,
  **unused: Any,
) -> Builders:
  if not directory:
    raise errors.UserError(
      "config.data.dir is empty; the data set 'folder' needs its directory"
    )
  # All are surveyed before the first is prepared, which may take minutes.
  configs = {
    split: folder.make_config(
      directory,
      split,
      ignore_label=ignore_label,
      label_map=label_map,
      on_bad_image=on_bad_image,
    )
    for split in splits
  }
  builders = {
    split: _prepared(folder.FolderSegmentation, prepared_dir, config)
    for split, config in configs.items()
  }
  palettes = labels.Palettes()
  for builder in builders.values():
    palettes.merge(builder.info.metadata['colors'])
  return builders


def _load_voc(
  variant: str,
  *,
  prepared_dir: str | None,
  splits: Sequence[str],
  ignore_label: int,
  label_map: str,
  **options: Any,
) -> Builders:
  _check_ignore_label('voc2012', ignore_label)
  config = voc.make_config(variant, **options)
  builder = _prepared(voc.Voc2012Segmentation, prepared_dir, config)
  if 'test' in splits and 'test' not in builder.info.splits:
    raise errors.UserError(
      f"no split 'test' in {variant}: its images are for registered users; "
      'put VOC2012test.tar beside the rest, set config.data.dir to that '
      "folder, and config.data.name='voc2012_segmentation'"
    )
  return dict.fromkeys(builder.info.splits, builder)


def _check_ignore_label(name: str, given: int) -> None:
  own = datasets.DATASETS[name].ignore_label
  if given != own:
    raise errors.UserError(
      f'config.data.ignore_label of {name!r} is {own}, got {given}'
    )


# Each loads one kind of data set; the keywords are those of `load_dataset`.
LOADERS: dict[str, Callable[..., Builders]] = {
  'shapes': _load_shapes,
  'folder': _load_folder,
  'voc2012_segmentation': functools.partial(_load_voc, 'voc2012'),
} | {
  f'voc2012_segmentation/{variant}': functools.partial(_load_voc, variant)
  for variant in voc.PUBLISHED
}


def _prepared(
  builder_class: type[tfds.core.DatasetBuilder],
  prepared_dir: str | None,
  config: shapes.ShapesConfig | records.SourceConfig,
) -> tfds.core.DatasetBuilder:
  """Returns the builder with its data on disk.

  TFDS writes into a folder of another name and renames it at the end, so a
  prepared folder is whole. The lock makes a second process wait for the first
  instead of doing the work again.
  """
  with _quiet():
    builder = builder_class(data_dir=prepared_dir, config=config)
  if builder.info.splits:
    return builder
  # <prepared_dir>/<data set>/<config>/<version>
  path = pathlib.Path(builder.data_path)
  home = path.parent.parent
  with _locked(home / f'.{config.name}.lock'), _quiet():
    builder = builder_class(data_dir=prepared_dir, config=config)
    if builder.info.splits:  # another process has done it
      return builder
    for leftover in path.parent.glob('incomplete.*'):
      shutil.rmtree(leftover, ignore_errors=True)
    builder.download_and_prepare(file_format='array_record')
    # read back, as every later run will
    builder = builder_class(data_dir=prepared_dir, config=config)
  if isinstance(config, records.SourceConfig):
    _report_older(home, config)
  return builder


def _report_older(home: pathlib.Path, config: records.SourceConfig) -> None:
  """Logs which other preparations of the same source lie in `home`."""
  # one that failed has left a folder without a version
  for version in sorted(home.glob(f'{config.prefix}{"[0-9a-f]" * 12}/[0-9]*')):
    other = version.parent
    if other.name != config.name:
      log.info(
        '%s was prepared from another state of the same source or with other '
        'options; remove it if it is not needed',
        other,
      )


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """`disk.locked`, whose failure names the setting."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(disk.locked(path))
    except OSError as error:
      raise errors.UserError(
        f'{path.parent}: cannot be written ({error.strerror}); set '
        'config.data.prepared_dir to another folder'
      ) from error
    yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps from the user what TFDS tells authors of builders.

  That is its greetings on stdout, its progress bars where stderr is no
  terminal, and its warning that a config is not one of the class's own.
  """
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  logger = absl_logging.get_absl_logger()
  logger.addFilter(_is_for_users)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.removeFilter(_is_for_users)


def _is_for_users(record: Any) -> bool:
  return not str(record.msg).startswith('Using custom data configuration')
