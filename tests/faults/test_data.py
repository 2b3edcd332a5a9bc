"""Damaged images and records: one line that names the file, or no harm."""

import contextlib
import io
import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
from faults import kit
from miniature import make_config, write_voc_folder
from PIL import Image

from deeplab_jax import build
from deeplab_jax.configure import from_json
from deeplab_jax.data.pipeline import load_example
from deeplab_jax.predict_files import predict
from deeplab_jax.prepare import prepare

slow = pytest.mark.slow
FORMATS = 'JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP'


def wrong_format(data, rng):
  """The picture in a format that its suffix does not say."""
  with Image.open(io.BytesIO(data)) as image:
    image.convert('RGB').save(file := io.BytesIO(), rng.choice(FORMATS))
  return file.getvalue()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A folder with images of two formats, and its preparation."""
  root = tmp_path_factory.mktemp('data')
  folder = write_voc_folder(root / 'mini', {'train': 3, 'val': 2})
  for path in (folder / 'JPEGImages').glob('*_1.jpg'):
    Image.open(path).save(path.with_suffix('.png'))
    path.unlink()
  return folder


def config_of(folder, prepared, **changes):
  settings = {'data.name': 'folder', 'data.dir': str(folder)}
  return make_config(
    {**settings, 'data.prepared_dir': str(prepared)}, **changes
  )


def read_all(config):
  """Everything that a run takes from the prepared data."""
  dataset = build.open_dataset(config, 'train', 'val')
  found = [dataset.info.to_json()]
  for split in ('train', 'val'):
    found.append(json.dumps(dataset.tally(split).to_json()))
    found.append(dataset.names(split))
    found.append(dataset.sizes(split))
    for record in dataset.source(split):
      found += [x.tobytes() for x in load_example(record)]
  return found


@contextlib.contextmanager
def quiet():
  """Pillow warns of much that is odd; the command does not show it."""
  with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter('ignore')
    yield


def check_prepare(source, tmp_path, capsys, counts, cases):
  files = kit.files_below(source)
  kinds = {**kit.DAMAGE, 'wrong format': wrong_format}
  for case in range(cases):
    rng = kit.generator(1, case)
    kind, path = list(kinds)[case % len(kinds)], files[rng.integers(len(files))]
    if kind == 'wrong format' and path.suffix == '.txt':
      kind = 'noise'
    prepared = tmp_path / 'prepared'
    config = config_of(
      source, prepared, data__on_bad_image=('stop', 'skip')[case // 7 % 2]
    )
    with kit.restored(source), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Pillow's, of odd files
      path.write_bytes(kinds[kind](path.read_bytes(), rng))
      line = kit.refusal(lambda config=config: prepare(config, None))
      if line is None:
        read_all(config)
    shown = capsys.readouterr()
    # A list or classes.txt may be taken at its word.
    name = source.name if path.suffix == '.txt' else path.name
    assert line is None or name in line + shown.out, line
    assert 'Traceback' not in shown.err
    assert not list(prepared.rglob('incomplete.*'))
    kit.count(counts, f'prepare, {kind}', 'refused' if line else 'prepared')
    shutil.rmtree(prepared, ignore_errors=True)


def test_a_damaged_image_or_label_is_named_by_prepare(
  source, tmp_path, capsys, counts
):
  check_prepare(source, tmp_path, capsys, counts, 14)


@slow
def test_270_damaged_files_are_named_by_prepare(
  source, tmp_path, capsys, counts
):
  check_prepare(source, tmp_path, capsys, counts, 270)


def check_records(source, tmp_path, counts, cases):
  prepared = tmp_path / 'prepared'
  config = config_of(source, prepared)
  with quiet():
    expected = read_all(config)
  files = [p.relative_to(prepared) for p in kit.files_below(prepared)]
  files = [path for path in files if not path.name.endswith('.lock')]
  kinds, wrong = [*kit.DAMAGE, 'deletion'], []
  for case in range(cases):
    rng = kit.generator(2, case)
    kind, path = kinds[case % len(kinds)], files[rng.integers(len(files))]
    found, end = [], 'refused'
    with kit.restored(prepared), quiet():
      kit.damage(prepared / path, kind, rng)
      try:
        line = kit.refusal(lambda found=found: found.extend(read_all(config)))
      except Exception as error:
        end = line = f'{type(error).__name__}: {str(error)[:200]!r}'
    if line is None:
      end = 'same' if found == expected else 'silently wrong'
    elif end == 'refused' and str(prepared) not in line:
      end = 'refused without its path'
    if end not in ('refused', 'same'):
      wrong.append(f'{kind} of {path.name}: {end} {line}')
    kit.count(counts, f'{path.name.partition(".")[0]}, {kind}', end[:40])
  assert not wrong, '\n'.join(wrong)


def test_damaged_prepared_records_are_named(source, tmp_path, counts):
  check_records(source, tmp_path, counts, 14)


@slow
def test_100_damages_of_prepared_records_are_named(source, tmp_path, counts):
  check_records(source, tmp_path, counts, 100)


OLD = Path(__file__).parents[1] / 'old_workdir'


def check_predict(source, tmp_path, caplog, counts, cases):
  workdir = shutil.copytree(OLD, tmp_path / 'workdir')
  folder, ends = tmp_path / 'in', {}
  kinds = {**kit.DAMAGE, 'wrong format': wrong_format}
  whole = kit.files_below(source / 'JPEGImages')
  folder.mkdir()
  for case in range(cases):
    rng = kit.generator(7, case)
    kind, path = list(kinds)[case % len(kinds)], whole[case % len(whole)]
    target = folder / f'{case}{path.suffix}'
    target.write_bytes(kinds[kind](path.read_bytes(), rng))
    ends[target] = kind
  for path in whole:
    shutil.copy(path, folder)
  config = from_json(workdir / 'config.json')
  with quiet(), caplog.at_level(logging.WARNING):
    line = kit.refusal(lambda: predict(config, workdir, [str(folder)]), 300)
  unread = int(re.match(r'(\d+) of', line)[1])
  for path, kind in ends.items():
    said = sum(str(path) in m for m in caplog.messages)
    mask = workdir / 'predictions' / f'{path.stem}.png'
    assert said == 1 - mask.exists(), path
    unread -= said
    kit.count(counts, f'predict, {kind}', 'left out' if said else 'segmented')
  assert unread == 0
  for path in whole:
    assert (workdir / 'predictions' / f'{path.stem}.png').exists()


@pytest.mark.compiles
def test_predict_names_damaged_images_and_segments_the_others(
  source, tmp_path, caplog, counts
):
  check_predict(source, tmp_path, caplog, counts, 14)


@slow
def test_predict_names_200_damaged_images(source, tmp_path, caplog, counts):
  check_predict(source, tmp_path, caplog, counts, 200)
