"""How a data set is stored: a TFDS builder that writes records once.

A new data set is one file with a `RecordsBuilder` and a loader, as `shapes` is.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from deeplab_jax.data.bands import kind_of
from deeplab_jax.data.datasets import DatasetInfo, Tally
from deeplab_jax.data.images import decode_image, encode_label
from deeplab_jax.data.pipeline import in_background
from deeplab_jax.runtime import files as disk
from deeplab_jax.runtime.errors import UnreadableError, UserError, first_line

log = logging.getLogger(__name__)

_SHARD = 4096  # records in a file
_STATE = 'state.json'  # of the other files of a prepared folder

# What a loader returns: for every split the builder that holds its records.
Builders = dict[str, tfds.core.DatasetBuilder]


@dataclasses.dataclass(eq=False, kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
  """Names what is prepared; a source that changes gets another name."""

  name: str = ''  # `prefix`, and a `fingerprint` of the source
  prefix: str = ''  # of all preparations of one source; '' for a single one
  as_stored: bool = False  # whether images keep their own channels and bits


def fingerprint(*values: Any) -> str:
  """Returns 12 hex digits that change with the values, plain JSON ones."""
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def split_key(split: str) -> str:
  """Returns a name for a split that TFDS takes, and that is not its 'all'."""
  if re.fullmatch('[a-z][a-z0-9_]{0,39}', split) and split != 'all':
    return split
  readable = re.sub('[^a-z0-9]+', '_', split.lower())[:20]
  return f'list_{readable}_{fingerprint(split)[:8]}'


class Item(NamedTuple):
  """A listed image, before its files are read."""

  name: str  # its id
  image: Any  # the file; its `str` names it in messages
  label: Any  # likewise; None means that all of it is void


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Listing:
  """What a layout finds of a split: its files, and what their labels mean."""

  origin: object  # where the ids are listed, for messages
  found: Mapping[str, Item | UserError]  # by listed id; why one has no files
  classes: Path | Sequence[str]  # lines as of classes.txt, or the file
  label_map: str = ''  # where `config.data.label_map` says nothing
  label_folder: Path | None = None  # its first palette gives the colors
  name: str = ''  # of the data set; empty for that of its folder


# A function (root, split, **options) that finds the files of a data set. It
# raises `UserError` for an unknown or empty split, or wrong options.
Layout = Callable[..., Listing]


class Sample(NamedTuple):
  """What a builder generates of one image."""

  name: str  # the id in its list
  file_name: str  # of the original image, without its folder
  image: bytes  # for `images.decode_image`
  label: np.ndarray  # uint8 [H, W], classes and the ignore label


def read_features(source: Sequence[bytes], index: Any, folder: object) -> Any:
  """Returns the features of a record; raises `UserError` if it is damaged."""
  # TFDS's own parser takes several times as long: it makes arrays of all.
  try:
    example = tf_example_pb2.Example.FromString(source[index])
  except RuntimeError as error:  # by the hashes of array_record
    raise UserError(
      f'{folder}: a file of records is damaged or missing; remove the folder'
      ' to prepare it again'
    ) from error
  return example.features.feature


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
  """Stores samples in the order in which they are generated.

  TFDS itself shuffles in memory, and needs TensorFlow above 1 GB. Here,
  `_split_generators` returns for each split an empty `Tally` and an iterator of
  `Sample`, and sets `info`, a `DatasetInfo.to_json()`, in the metadata. The
  base class adds `names`, the ids of each split, `classes`, those that each
  label shows, and `splits`, the tallies.
  """

  code_path = None  # TFDS looks for checksums beside the code, and fails

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'image': tfds.features.Text()
      if self.builder_config.as_stored
      else tfds.features.Image(shape=(None, None, 3)),
      'label': tfds.features.Image(shape=(None, None, 1)),
      **{key: tfds.features.Text() for key in ('name', 'file_name')},
      **{key: tfds.features.Scalar(np.int32) for key in ('height', 'width')},
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(),
    )

  def _download_and_prepare(
    self, dl_manager: Any, download_config: Any = None
  ) -> None:
    self.info.metadata.update(names={}, classes={}, splits={})
    generators = self._split_generators(dl_manager)
    written = self._info()  # of the temporary folder, which TFDS renames
    writer = tfds.core.SequentialWriter(
      written, max_examples_per_shard=_SHARD, file_format='array_record'
    )
    for split, (tally, samples) in generators.items():
      key = split_key(split)
      writer.initialize_splits([key])
      writer.add_examples({key: self._examples(split, samples, tally)})
    writer.close_all()
    self.info.set_splits(written.splits)

  def _examples(
    self, split: str, samples: Iterable[Sample], tally: Tally
  ) -> Iterator[dict[str, Any]]:
    """Yields what is stored of each sample, and counts it."""
    names = self.info.metadata['names'][split] = []
    classes = self.info.metadata['classes'][split] = []
    # Without a terminal, `None` shows no bar.
    samples = tqdm(samples, split, unit=' images', leave=False, disable=None)
    for sample in samples:
      names.append(sample.name)
      classes.append(tally.add(sample.label))
      if self.builder_config.as_stored:
        image = decode_image(sample.image)
        if tally.kind not in ('RGB', kind := kind_of(image)):
          raise UserError(
            f'{sample.file_name} has {kind}, but {names[0]} {tally.kind}; store'
            ' all alike, or set config.data.as_stored=False for RGB'
          )
        tally.add_image(image)
      yield {
        'image': sample.image,
        'label': io.BytesIO(encode_label(sample.label)),
        'name': sample.name,
        'file_name': sample.file_name,
        'height': sample.label.shape[0],
        'width': sample.label.shape[1],
      }
    self.info.metadata['splits'][split] = tally.to_json()


def require_ignore_label(info: DatasetInfo, given: int) -> None:
  """Raises `UserError` unless void has the value that `info` has for it."""
  if given != info.ignore_label:
    raise UserError(
      f'config.data.ignore_label of {info.name!r} is {info.ignore_label}, got '
      f'{given}'
    )


def readable(
  items: Sequence[Item],
  read: Callable[[Item], Any],
  *,
  origin: object = '',
  on_bad_image: str = 'stop',
  alone: Callable[[Item], bool] = lambda item: False,
) -> Iterator[tuple[Item, Any]]:
  """Yields each item with what `read` returns for it, in order.

  `read` is called on all cores, and when its turn comes for what takes much
  memory, as `alone` tells. An `UnreadableError` stops with a `UserError`, or
  with `on_bad_image='skip'` skips the item, listed at `origin`; if all are
  skipped, it stops as well.
  """

  def attempt(item: Item, ahead: bool) -> Any:
    try:
      return None if ahead and alone(item) else read(item)
    except UnreadableError as error:
      return error

  skipped = 0
  first = functools.partial(attempt, ahead=True)
  for item, value in zip(items, in_background(first, items), strict=True):
    value = attempt(item, ahead=False) if value is None else value
    if not isinstance(value, UnreadableError):
      yield item, value
      value = None  # it may be large, and the next one is read before it ends
    elif on_bad_image == 'stop':
      raise UserError(f"{value}, or set config.data.on_bad_image='skip'")
    else:
      skipped += 1
      log.warning('Skipped %r of %s: %s', item.name, origin, value)
  if 0 < skipped == len(items):
    raise UserError(f'{origin}: every image is unreadable; see the warnings')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides TFDS's greeting on stdout and its notes to authors of builders."""
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  logger, note = absl_logging.get_absl_logger(), 'Using custom data config'
  logger.addFilter(others := lambda record: note not in str(record.msg))
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.removeFilter(others)


def _state(path: Path) -> dict[str, Any]:
  """Tells files apart: by digests those that no hash in them protects."""
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    if file.suffix == '.json'
    else file.stat().st_size
    for file in path.iterdir()
    if file.name != _STATE
  }


def _damage(path: Path, make: Callable[[], Any]) -> str:
  """Says what is wrong with a prepared folder; '' if nothing is."""
  try:
    if (path / _STATE).exists():  # older ones have none
      noted, found = json.loads((path / _STATE).read_text()), _state(path)
      differ = {name for name, _ in noted.items() ^ found.items()}
      return ', '.join(sorted(differ))
    make().info.metadata['info']
  except Exception as error:  # TFDS raises many kinds
    return first_line(error)
  return ''


@_quiet()
def prepared(
  builder_class: type[RecordsBuilder], prepared_dir: str, config: SourceConfig
) -> RecordsBuilder:
  """Returns the builder of `config`, with its records on disk.

  TFDS writes into a folder of another name and renames it at the end, so a
  prepared folder is complete. One that was damaged later is prepared again. A
  second process waits for the first. Raises `UserError` if `prepared_dir`
  (empty: TFDS's own) cannot be written.
  """
  make = functools.partial(
    builder_class, data_dir=prepared_dir or None, config=config
  )
  # <prepared_dir>/<data set>/<config>/<version>
  home = Path(prepared_dir or tfds.core.constants.DATA_DIR).expanduser()
  if disk.is_remote(prepared_dir):
    raise UserError('config.data.prepared_dir: gs:// needs a mount by gcsfuse')
  home /= builder_class.name
  path = home / config.name / str(builder_class.VERSION)
  if path.exists() and not _damage(path, make):
    return make()
  try:
    with disk.locked(home / f'.{config.name}.lock'):
      damage = _damage(path, make) if path.exists() else ''
      if path.exists() and not damage:  # another process has done it
        return make()
      for leftover in path.parent.glob('incomplete.*'):
        shutil.rmtree(leftover, ignore_errors=True)
      aside = path.with_name('incomplete.damaged')
      if damage:
        log.warning('%s is damaged (%s); it is prepared again', path, damage)
        path.rename(aside)
      builder = make()
      try:
        builder.download_and_prepare(file_format='array_record')
      except BaseException:
        if damage:
          aside.rename(path)
        raise
      shutil.rmtree(aside, ignore_errors=True)
      path = Path(builder.data_path)
      disk.write_json(path / _STATE, _state(path))
  except (OSError, RuntimeError) as error:  # the latter of array_record
    named = str(getattr(error, 'filename', error) or home)
    if str(home) not in named and named not in str(home):  # in the source
      raise
    reason = getattr(error, 'strerror', None) or str(error).partition(';')[0]
    raise UserError(
      f'{home}: cannot be written ({reason}); make space there, or set '
      'config.data.prepared_dir to another folder'
    ) from error
  builder = make()  # read back, as every later run will
  # A preparation that failed has left a folder without a version.
  others = home.glob(f'{config.prefix}{"[0-9a-f]" * 12}/[0-9]*')
  for version in sorted(others) if config.prefix else ():
    if version.parent.name != config.name:
      log.info(
        '%s was prepared from another state of the same source or with other '
        'options; remove it if it is not needed',
        version.parent,
      )
  return builder
