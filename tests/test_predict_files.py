"""Pictures in, label maps and overlays out."""

import csv
import logging
import os
import shutil

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from miniature import make_config, share_programs
from PIL import Image

from deeplab_jax import build
from deeplab_jax.data import images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.evaluation import evaluator
from deeplab_jax.predict import Predictor
from deeplab_jax.predict_files import _class_columns, _identity, _write, predict
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.checkpoints import Checkpoints

pytestmark = pytest.mark.compiles


@pytest.fixture(scope='module', autouse=True)
def programs():
  """Each program of these predictions is traced once."""
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    yield


@pytest.fixture
def segment(trained, tmp_path):
  """Function (*inputs) -> what `predict` returns, into tmp_path / 'out'."""

  def run(*inputs, buckets=4, **changes):
    config = make_config(
      trained.settings,
      predict__output_dir=str(tmp_path / 'out' / 'deep'),
      eval__buckets=buckets,
      **changes,
    )
    return predict(config, trained.workdir, [str(text) for text in inputs])

  return run


def write_image(path, height=40, width=60, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(height)
  values = rng.integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(values).save(path, **options)
  return path


def test_results_are_the_most_likely_classes_at_the_original_size(
  trained, segment, tmp_path
):
  paths = [
    write_image(tmp_path / f'in/{i}.png', 30 + i, 64 - i) for i in range(3)
  ]
  written = segment(tmp_path / 'in', buckets=9)
  assert [path.name for path in written] == [path.name for path in paths]
  model = build.make_model(trained.config, 4)
  with Checkpoints(trained.workdir) as saved:
    variables = saved.open('best').variables
  apply = jax.jit(lambda x: model.apply(variables, x, train=False))
  for path, result in zip(paths, written, strict=True):
    image = images.read_image(path)
    height, width = image.shape[:2]
    expected = np.asarray(apply(image[None]))[0].argmax(-1)
    with Image.open(result) as picture:
      assert picture.mode == 'P'
      assert picture.getpalette()[:9] == [10, 20, 30, 200, 0, 0, 0, 200, 0]
      label = np.asarray(picture)
    assert label.shape == expected.shape
    assert (label != expected).mean() < 2e-3  # ties, rounded otherwise
    with Image.open(result.with_name(f'{path.stem}_overlay.png')) as picture:
      assert picture.mode == 'RGB'
      assert picture.height > height and picture.width >= width


def test_a_table_holds_the_share_of_each_class_in_each_image(
  segment, tmp_path, capsys
):
  paths = [write_image(tmp_path / f'in/{h}.png', h) for h in (40, 44)]
  written = segment(tmp_path / 'in')
  names = ['ground', 'left', 'right', 'absent']
  labels = [np.asarray(Image.open(result)) for result in written]
  with (written[0].parent / 'class_shares.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['image'] for row in rows] == [str(path) for path in paths]
  for row, result, label in zip(rows, written, labels, strict=True):
    assert row['mask'] == result.name
    assert (int(row['height']), int(row['width'])) == label.shape
    for index, name in enumerate(names):
      share = (label == index).mean()
      assert float(row[name]) == pytest.approx(share, abs=1e-6)
  printed = capsys.readouterr().out.splitlines()
  assert printed[-1].startswith('2 images segmented by step ')
  pixels = np.concatenate([label.ravel() for label in labels])
  for index, name in enumerate(names):
    (line,) = (line for line in printed if line.startswith(name))
    _, share, count = line.split()
    assert float(share) == pytest.approx(
      100 * (pixels == index).mean(), abs=0.006
    )
    assert int(count) == sum((label == index).any() for label in labels)


def test_files_folders_and_globs_are_taken_each_image_once(segment, tmp_path):
  write_image(tmp_path / 'in/deep/a.jpg')
  write_image(tmp_path / 'in/b.jpg')
  write_image(tmp_path / 'c.png')
  written = segment(tmp_path / 'c.png', tmp_path / 'in', tmp_path / '*/b.*')
  assert sorted(path.name for path in written) == ['a.png', 'b.png', 'c.png']


def test_images_of_one_name_get_results_of_two(segment, tmp_path):
  write_image(tmp_path / 'a/x.jpg', 40)
  write_image(tmp_path / 'b/x.png', 50)
  write_image(tmp_path / 'b/x_overlay.png', 60)
  written = segment(tmp_path / 'a', tmp_path / 'b', buckets=1)
  heights = {path.name: len(np.asarray(Image.open(path))) for path in written}
  assert heights == {'x.png': 40, 'x_2.png': 50, 'x_overlay_2.png': 60}
  pictures = list((tmp_path / 'out' / 'deep').glob('*.png'))
  assert len(pictures) == 6


def test_images_of_differing_sizes_are_segmented_in_their_order(
  segment, tmp_path
):
  sizes = [(40, 60), (40, 61), (70, 60), (40, 62), (64, 64)]
  paths = [
    write_image(tmp_path / f'{i}.png', *size) for i, size in enumerate(sizes)
  ]
  written = segment(*paths, buckets=2)
  assert [np.asarray(Image.open(p)).shape for p in written] == sizes
  assert [p.stem for p in written] == [p.stem for p in paths]


def test_rotated_photo_is_segmented_as_a_viewer_shows_it(segment, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  path = write_image(tmp_path / 'in.jpg', 40, 60, exif=exif)
  (result,) = segment(path)
  assert np.asarray(Image.open(result)).shape == (60, 40)


def test_many_sizes_become_as_few_as_asked(segment, tmp_path, monkeypatch):
  shapes = []

  def pmapped(*_, probabilities):
    def step(variables, batch):
      shapes.append(batch['image'].shape[2:4])
      return np.zeros(batch['image'].shape[:-1], np.uint8), None

    return step

  monkeypatch.setattr(evaluator, 'pmap_predict_step', pmapped)
  for i in range(6):
    write_image(tmp_path / f'in/{i}.png', 40 + 9 * i, 40 + 20 * (i % 3))
  assert len(segment(tmp_path / 'in', buckets=2)) == 6
  # Those of one size follow each other, and fill the devices.
  assert len(shapes) == len(set(shapes)) == 2


@pytest.mark.parametrize('broken', ['b', 'bc'])
def test_unreadable_images_are_named_and_the_rest_is_done(
  segment, tmp_path, caplog, capsys, broken
):
  folder = tmp_path / 'in'
  for name in 'abcd':
    write_image(folder / f'{name}.png')
  # One says at once that it is no picture, one only when it is decoded.
  folder.joinpath('b.png').write_bytes(b'no picture')
  if 'c' in broken:
    data = folder.joinpath('c.png').read_bytes()
    folder.joinpath('c.png').write_bytes(data[:-2000])
  of = f'{len(broken)} of 4 images could not be read, see above'
  with (
    caplog.at_level(logging.WARNING, 'deeplab_jax'),
    pytest.raises(UserError, match=of),
  ):
    segment(folder)
  done = sorted(p.name for p in (tmp_path / 'out' / 'deep').glob('?.png'))
  assert done == [f'{name}.png' for name in 'abcd' if name not in broken]
  assert len(caplog.messages) == len(broken)
  for name, message in zip(broken, caplog.messages, strict=True):
    assert f'{name}.png' in message and message.endswith('left out')
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith(f'{4 - len(broken)} images segmented by step ')


def test_no_readable_image_at_all_is_an_error(segment, tmp_path):
  path = tmp_path / 'a.png'
  path.write_bytes(b'no picture')
  with pytest.raises(UserError, match=r'1 of 1 images could not be read'):
    segment(path)


def test_what_is_done_is_not_done_again(segment, tmp_path, caplog):
  first, second = (write_image(tmp_path / f'{n}.png') for n in 'ab')
  (result,) = segment(first)
  before = result.stat().st_mtime_ns
  with caplog.at_level(logging.INFO, 'deeplab_jax'):
    segment(first, second)
  assert '1 images are done already' in caplog.messages
  assert result.stat().st_mtime_ns == before
  # A lost mask, and an image that changed, are segmented again.
  result.unlink()
  write_image(second, 50)
  caplog.clear()
  with caplog.at_level(logging.INFO, 'deeplab_jax'):
    _, other = segment(first, second)
  folder = tmp_path / 'out' / 'deep'
  assert caplog.messages == [f'1 earlier predictions in {folder} are replaced']
  assert result.exists() and np.asarray(Image.open(other)).shape == (50, 60)
  assert [p.name for p in folder.iterdir() if p.name[0] == '.'] == []


def test_other_settings_and_weights_replace_what_was_done(
  segment, trained, tmp_path, caplog
):
  path = write_image(tmp_path / 'a.png')
  segment(path)
  folder = tmp_path / 'out' / 'deep'
  message = f'1 earlier predictions in {folder} are replaced'
  with caplog.at_level(logging.WARNING, 'deeplab_jax'):
    segment(path, eval__flip=True)
    assert caplog.messages == [message]
    # The same step, trained otherwise.
    shutil.copytree(trained.workdir, tmp_path / 'other')
    with Checkpoints(tmp_path / 'other') as saved:
      variables = saved.open(6).variables
    predictor = Predictor.from_workdir(tmp_path / 'other')
    names = [
      _identity(predictor, trained.config),
      _identity(Predictor.from_workdir(trained.workdir), trained.config),
    ]
    assert names[0] == names[1]
    predictor.variables = jax.tree.map(lambda x: x + 1, variables)
    assert _identity(predictor, trained.config) != names[0]


def test_masks_of_a_killed_run_of_other_weights_are_not_taken(
  segment, tmp_path
):
  path = write_image(tmp_path / 'a.png')
  (result,) = segment(path)
  expected = result.read_bytes()
  row = (result.parent / 'class_shares.csv').read_text().splitlines()
  # Killed after the mask, before its row: the row above holds no more.
  void = f'{row[0]}\na.png{"," * row[0].count(",")}\n'
  (result.parent / '.class_shares_1_0.csv').write_text(void)
  result.write_bytes(b'of other weights')
  segment(path)
  assert result.read_bytes() == expected


def test_results_inside_a_folder_that_is_read_are_refused(trained, tmp_path):
  write_image(tmp_path / 'in/a.png')
  config = make_config(
    trained.settings, predict__output_dir=str(tmp_path / 'in/masks')
  )
  with pytest.raises(UserError, match=r'in/masks is inside .*in, which'):
    predict(config, trained.workdir, [str(tmp_path / 'in')])


def test_classes_named_as_columns_keep_columns_of_their_own():
  palette = np.zeros((4, 3), np.uint8)
  info = DatasetInfo('x', ('bg', 'mask', 'twin', 'twin'), palette)
  names = ['bg', 'mask (1)', 'twin (2)', 'twin (3)']
  assert _class_columns(info) == names


def test_names_that_are_no_text_and_links_to_nothing_do_not_stop_a_run(
  segment, tmp_path, caplog
):
  folder = tmp_path / 'in'
  write_image(folder / 'a.png')
  os.rename(folder / 'a.png', os.fsencode(folder) + b'/Stra\xdfe.png')
  (folder / 'gone.png').symlink_to('nowhere')
  with pytest.raises(UserError, match='1 of 2 images could not be read'):
    segment(folder)
  assert any('gone.png' in message for message in caplog.messages)
  with pytest.raises(UserError, match='1 of 2 images could not be read'):
    segment(folder)
  masks = list((tmp_path / 'out' / 'deep').glob('Stra*e.png'))
  assert len(masks) == 1


def test_a_run_that_was_killed_goes_on(segment, tmp_path):
  for i in range(4):
    write_image(tmp_path / f'in/{i}.png', 40 + i)
  written = segment(tmp_path / 'in')
  folder = written[0].parent
  table = (folder / 'class_shares.csv').read_text().splitlines()
  # As a run leaves it that was killed with two rows and a half.
  (folder / 'class_shares.csv').unlink()
  half = '\n'.join([*table[:3], table[3][:-4]])
  (folder / '.class_shares_1_0.csv').write_text(half)
  (folder / '.3.png.7.tmp').write_bytes(b'half')
  written[3].unlink()
  before = [path.stat().st_mtime_ns for path in written[:3]]
  segment(tmp_path / 'in')
  after = [path.stat().st_mtime_ns for path in written[:3]]
  assert after[:2] == before[:2] and after[2] > before[2]
  assert (folder / 'class_shares.csv').read_text().splitlines() == table
  assert written[3].exists()
  assert not [path for path in folder.iterdir() if path.name[0] == '.']


def test_images_are_divided_among_the_hosts(segment, tmp_path, monkeypatch):
  for i in range(5):
    write_image(tmp_path / f'in/{i}.png')
  real = Predictor.from_config

  def opened(*arguments):  # as the second of two hosts, from here on
    predictor = real(*arguments)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    return predictor

  monkeypatch.setattr(Predictor, 'from_config', opened)
  monkeypatch.setattr(
    multihost_utils, 'process_allgather', lambda x: np.array([x, 0])
  )
  segment(tmp_path / 'in')
  found = sorted(p.name for p in (tmp_path / 'out' / 'deep').glob('?.png'))
  assert found == ['1.png', '3.png']


@pytest.mark.parametrize('kind', ['npz', 'png'])
def test_probabilities_are_written_on_request(segment, tmp_path, kind):
  path = write_image(tmp_path / 'a.png')
  (result,) = segment(path, predict__probabilities=kind, predict__overlay=False)
  folder = result.parent
  assert not folder.joinpath('a_overlay.png').exists()
  below = folder / 'probabilities'
  if kind == 'npz':
    with np.load(below / 'a.npz') as file:
      found = file['probabilities']
    assert found.dtype == np.float16
  else:
    names = [f'a_{index}.png' for index in range(4)]
    assert sorted(p.name for p in below.iterdir()) == names
    pictures = [np.asarray(Image.open(below / name)) for name in names]
    found = np.stack(pictures, -1) / 65535
  assert found.shape == (40, 60, 4)
  np.testing.assert_allclose(found.sum(-1), 1, atol=2e-3)
  label = np.asarray(Image.open(result))
  assert (found.astype(float).argmax(-1) != label).mean() < 0.01


def test_missing_inputs_are_named(segment, tmp_path):
  with pytest.raises(UserError, match='no image given'):
    segment()
  with pytest.raises(UserError, match=r'nope\.jpg: no such file'):
    segment(tmp_path / 'nope.jpg')
  with pytest.raises(UserError, match='no image found'):
    segment(tmp_path / '*.jpg')


def test_workdir_without_checkpoint_is_named(trained, tmp_path):
  path = write_image(tmp_path / 'in.png')
  with pytest.raises(UserError, match=f'no checkpoint in {tmp_path}'):
    predict(trained.config, tmp_path, [str(path)])


def test_results_beside_the_images_replace_none(trained, tmp_path):
  path = write_image(tmp_path / 'x.png')
  before = path.read_bytes()
  config = make_config(trained.settings, predict__output_dir=str(tmp_path))
  assert predict(config, trained.workdir, [str(path)]) == [tmp_path / 'x_2.png']
  assert path.read_bytes() == before


def test_results_that_cannot_be_written_are_named(trained, tmp_path):
  path = write_image(tmp_path / 'in.png')
  config = make_config(trained.settings, predict__output_dir=str(path))
  with pytest.raises(UserError, match=r'predict\.output_dir=.*in\.png'):
    predict(config, trained.workdir, [str(path)])


def test_label_map_has_the_values_of_the_files_trained_on(tmp_path):
  palette = np.array([[9, 0, 0], [0, 9, 0]], np.uint8)
  info = DatasetInfo('x', ('bg', 'box'), palette, values=(0, 255), void_value=7)
  label = np.array([[0, 1, 1, 1]], np.uint8)
  image, settings = np.zeros((1, 4, 3), np.uint8), make_config({}).predict
  _write(tmp_path / 'a.png', image, label, None, info, settings)
  with Image.open(tmp_path / 'a.png') as written:
    assert np.array(written).tolist() == [[0, 255, 255, 255]]
    assert np.array(written.convert('RGB'))[0, 1].tolist() == [0, 9, 0]
