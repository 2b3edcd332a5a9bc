"""Masks for image files: --mode=predict."""

import collections
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.config import to_json
from deeplab_jax.data import bands, images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.pipeline import in_background
from deeplab_jax.predict import Predictor
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import as_path, is_remote, replacing, write
from deeplab_jax.runtime.progress import logged
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.weights import networks

log = logging.getLogger(__name__)

_TABLE = 'class_shares.csv'
_COLUMNS = 'mask', 'image', 'version', 'network', 'height', 'width'
Row = dict[str, str]  # of that table


def predict(
  config: ConfigDict, workdir: Path, inputs: Sequence[str]
) -> list[Path]:
  """Segments image files with a checkpoint of `workdir`.

  For each image of `inputs` (files, folders or globs) it writes `NAME.png`, the
  classes as a palette PNG of the image's own size, which it returns, and
  `NAME_overlay.png`, the classes over the image with a legend, if
  `config.predict.overlay`. `config.predict.probabilities` adds
  `probabilities/NAME.npz`, float16 [H, W, C], or `NAME_CLASS.png` of 16 bits.
  `class_shares.csv` holds the share of each class in each image; a table over
  all images is printed. What the same network has segmented with the same
  settings is not done again, so a run that was stopped goes on. Hosts divide
  the images; one command at a time may write into a folder.

  Raises `UserError` without a checkpoint, for results inside a folder of
  `inputs`, and at the end, for images it could not read.
  """
  networks.check_workdir(workdir)
  images.list_images(inputs, bands.SUFFIXES)  # fails early
  predictor = Predictor.from_config(config, workdir)
  stored = {'suffixes': bands.SUFFIXES} if predictor.info.mean else {}
  paths = images.list_images(inputs, **stored)
  folder = as_path(config.predict.output_dir or workdir / 'predictions')
  deepest = folder / 'probabilities' if config.predict.probabilities else folder
  place = f'config.predict.output_dir={folder}'
  for source in map(Path, inputs):
    source = source.expanduser().resolve()
    inside = not is_remote(folder) and folder.resolve().is_relative_to(source)
    if source.is_dir() and inside:
      raise UserError(
        f'{place} is inside {source}, which is read; name another'
      )
  try:
    deepest.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{place}: {error.strerror}') from error
  targets, info = _targets(paths, folder), predictor.info
  network, rows = _identity(predictor, config), _read_rows(folder)
  host, hosts = jax.process_index(), jax.process_count()
  origins = {path: _origin(path, network) for path in paths[host::hosts]}
  todo = [
    path
    for path, origin in origins.items()
    if not targets[path].exists()
    or not origin.items() <= rows.get(targets[path].name, {}).items()
  ]
  if len(todo) < len(origins):
    log.info('%d images are done already', len(origins) - len(todo))
  if earlier := sum(targets[path].exists() for path in todo):
    log.warning('%d earlier predictions in %s are replaced', earlier, folder)
  unread, names = len(todo), _class_columns(info)
  journal = folder / f'.class_shares_{time.time_ns()}_{host}.csv'
  text = {'encoding': 'utf-8', 'errors': 'surrogateescape', 'newline': ''}
  options: Any = {} if is_remote(folder) else text  # there put at the end
  with journal.open('w', **options) as file:
    writer = csv.DictWriter(file, [*_COLUMNS, *names])
    writer.writeheader()
    # What was noted of these images holds no more.
    writer.writerows({'mask': targets[path].name} for path in todo)
    file.flush()
    for path, label in _segment(predictor, config, todo, targets):
      shares = visualize.class_shares(label, info.num_classes)
      size = {'height': label.shape[0], 'width': label.shape[1]}
      by_class = zip(names, (f'{x:.6f}' for x in shares), strict=True)
      row = {'mask': targets[path].name, **origins[path], **size}
      writer.writerow(row | dict(by_class))
      file.flush()
      unread -= 1
  unread = sum(distributed.gathered(unread))
  if distributed.is_first_process():
    rows = _merge_rows(folder)
    done = [rows.get(target.name, {}) for target in targets.values()]
    done = [row for row in done if row.get('network') == network]
    print(_table(done, info))
    count = len(paths) - unread
    print(f'{count} images segmented by step {predictor.step}, in {folder}')
  if unread:
    raise UserError(
      f'{unread} of {len(paths)} images could not be read, see above'
    )
  return list(targets.values())


def _targets(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
  """Where each image's result goes; equal names are told apart by a number."""
  targets, numbers = {}, collections.Counter[str]()
  # No result takes the place of a picture.
  taken = {p.stem for p in paths if p.parent.resolve() == folder.resolve()}
  for path in paths:
    name = path.stem
    while name in taken or f'{name}_overlay' in taken:
      numbers[path.stem] += 1
      name = f'{path.stem}_{1 + numbers[path.stem]}'
    taken |= {name, f'{name}_overlay'}
    targets[path] = folder / f'{name}.png'
  return targets


def _identity(predictor: Predictor, config: ConfigDict) -> str:
  """Names the step, and by a digest the weights and all that shapes results."""
  settings = to_json(config)
  del settings['predict']['output_dir']
  protocol = predictor.protocol.describe(predictor.model)
  kept = settings['model'], settings['predict'], protocol
  digest = hashlib.blake2b(json.dumps(kept).encode(), digest_size=4)
  for leaf in jax.tree.leaves(predictor.variables):
    digest.update(np.asarray(leaf).tobytes())
  return f'step {predictor.step} {digest.hexdigest()}'


def _origin(path: Path, network: str) -> Row:
  """The columns that tell whether a row still holds."""
  version = 'not there'
  with contextlib.suppress(OSError):
    state = path.stat()
    version = f'{state.st_size} bytes {state.st_mtime_ns}'
  return {'image': str(path), 'version': version, 'network': network}


def _segment(
  predictor: Predictor,
  config: ConfigDict,
  paths: Sequence[Path],
  targets: dict[Path, Path],
) -> Iterator[tuple[Path, np.ndarray]]:
  """Yields path and classes [H, W] of images whose results are written.

  Images of one padded size follow each other. Those that cannot be read are
  named and left out.
  """
  threads, kind = predictor.threads, config.predict.probabilities
  writers = 1 if kind else threads  # probabilities may be large
  stored = bool(predictor.info.mean)
  measure = functools.partial(images.read_size, as_stored=stored)
  sizes = {
    path: size
    for path, size in in_background(_reader(measure), paths, threads)
    if size
  }
  predictor.plan(sizes.values())
  order = sorted(sizes, key=lambda path: predictor.bucket(sizes[path]))
  decode = functools.partial(images.as_pixels, info=predictor.info)
  read = in_background(_reader(decode), order, threads)
  pictures: collections.deque[tuple[Path, np.ndarray]] = collections.deque()

  def ready() -> Iterator[np.ndarray]:
    for path, image in read:
      if image is not None:
        pictures.append((path, image))
        yield image

  def segmented() -> Iterator[Any]:
    for found in predictor.map(ready(), probabilities=kind is not None):
      yield (*pictures.popleft(), found if kind else (found, None))

  def write(work: Any) -> tuple[Path, np.ndarray]:
    path, image, (label, scores) = work
    _write(targets[path], image, label, scores, predictor.info, config.predict)
    return path, label

  done = in_background(write, segmented(), writers)
  return logged(done, len(order), 'images')


def _reader(
  function: Callable[[Path], Any],
) -> Callable[[Path], tuple[Path, Any]]:
  """Lets a function that reads return the path too, and None for a failure."""

  def read(path: Path) -> tuple[Path, Any]:
    try:
      return path, function(path)
    except UserError as error:
      log.warning('%s; left out', error)
      return path, None

  return read


def _write(
  target: Path,
  image: np.ndarray,
  label: np.ndarray,
  scores: np.ndarray | None,
  info: DatasetInfo,
  settings: ConfigDict,
) -> None:
  """Writes the results of one image, the mask last."""
  void = info.ignore_label
  if settings.overlay:
    picture = visualize.overlay(
      image, label, info.palette, info.classes, ignore_label=void
    )
    name = f'{target.stem}_overlay.png'
    visualize.save_png(target.with_name(name), picture)
  if scores is not None:
    below = target.parent / 'probabilities'
    if settings.probabilities == 'npz':
      with (
        replacing(below / f'{target.stem}.npz') as temporary,
        open(temporary, 'wb') as file,
      ):
        np.savez(file, probabilities=scores.astype(np.float16))
    else:
      for index, share in enumerate(np.moveaxis(scores, -1, 0)):
        deep = np.rint(share * 65535).astype(np.uint16)
        png = cv2.imencode('.png', deep)[1].tobytes()
        write(below / f'{target.stem}_{index}.png', png)
  write(target, visualize.encode('png', info, label))


def _read_rows(folder: Path) -> dict[str, Row]:
  """Reads what earlier runs in a folder noted, by the name of the mask."""
  rows = {}
  for path in (folder / _TABLE, *sorted(folder.glob('.class_shares_*.csv'))):
    data = path.read_bytes() if path.exists() else b''
    text = data.decode('utf-8', 'surrogateescape')
    lines = text[: text.rfind('\n') + 1]  # without half a line of a killed run
    for row in csv.DictReader(io.StringIO(lines)):
      rows[row['mask']] = row
  return rows


def _merge_rows(folder: Path) -> dict[str, Row]:
  """Joins the notes of all hosts and runs into one table; returns its rows."""
  rows = {k: row for k, row in _read_rows(folder).items() if row['network']}
  columns = list(dict.fromkeys(itertools.chain(*rows.values())))
  writer = csv.DictWriter(table := io.StringIO(newline=''), columns)
  writer.writeheader()
  writer.writerows(rows[mask] for mask in sorted(rows))
  write(folder / _TABLE, table.getvalue().encode('utf-8', 'surrogateescape'))
  # And what killed runs left half written.
  for pattern in ('.class_shares_*.csv', '.*.png.*.tmp'):
    for path in folder.glob(pattern):
      path.unlink()
  return rows


def _class_columns(info: DatasetInfo) -> list[str]:
  """The columns of the classes, apart from the others and from each other."""
  names = info.classes
  taken = [*_COLUMNS, *(name for name in names if names.count(name) > 1)]
  return [f'{n} ({i})' if n in taken else n for i, n in enumerate(names)]


def _table(rows: Sequence[Row], info: DatasetInfo) -> str:
  """Writes a table: the share of each class, and the images that show it."""
  areas = np.array([int(row['height']) * int(row['width']) for row in rows])
  width = max(map(len, ['class', *info.classes]))
  head = f'{"class":<{width}}  {"pixels %":>8}  {"images":>6}'
  lines = [head, '-' * len(head)]
  for name, column in zip(info.classes, _class_columns(info), strict=True):
    shares = np.array([float(row[column]) for row in rows])
    part = 100 * (shares * areas).sum() / max(areas.sum(), 1)
    lines.append(f'{name:<{width}}  {part:>8.2f}  {(shares > 0).sum():>6}')
  return '\n'.join(lines)
