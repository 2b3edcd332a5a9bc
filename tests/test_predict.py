"""Pictures in, label maps and overlays out."""

import logging
import re

import jax
import numpy as np
import pytest
from miniature import make_config, share_programs
from PIL import Image

from deeplab_jax import build
from deeplab_jax.benchmark.timing import compilations
from deeplab_jax.data import images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.evaluation import evaluator
from deeplab_jax.predict import _write, predict
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

  def run(*inputs, buckets=4):
    config = make_config(
      trained.settings,
      predict__output_dir=str(tmp_path / 'out' / 'deep'),
      eval__buckets=buckets,
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
    variables = saved.restore_variables(saved.step_named('best'))
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


def test_class_shares_are_printed_for_each_image(segment, tmp_path, capsys):
  path = write_image(tmp_path / 'in.png')
  (result,) = segment(path)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith(f'{path}: ')
  assert lines[-1].startswith('1 images segmented by step ')
  label = np.asarray(Image.open(result))
  shares = dict(
    re.findall(r'(\w+) ([\d.]+)%', lines[0].removeprefix(str(path)))
  )
  names = ['ground', 'left', 'right', 'absent']
  expected = {
    name: f'{100 * (label == index).mean():.1f}'
    for index, name in enumerate(names)
    if (label == index).any()
  }
  assert shares == expected


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
  assert len(list((tmp_path / 'out' / 'deep').iterdir())) == 6


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


def test_many_sizes_are_compiled_as_few_times_as_asked(
  segment, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    'deeplab_jax.predict.pmap_predict_step', evaluator.pmap_predict_step
  )
  for i in range(6):
    write_image(tmp_path / f'in/{i}.png', 40 + 9 * i, 40 + 20 * (i % 3))
  with compilations() as compiled:
    written = segment(tmp_path / 'in', buckets=2)
  assert len(written) == 6
  assert len(compiled) == 2


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
  of = f'{len(broken)} of 4 images could not be read, first .*b.png'
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
  with pytest.raises(UserError, match=r'1 of 1 images could not be .*a\.png'):
    segment(path)


def test_earlier_predictions_are_not_replaced_silently(
  segment, tmp_path, caplog
):
  first, second = (write_image(tmp_path / f'{n}.png') for n in 'ab')
  with caplog.at_level(logging.WARNING, 'deeplab_jax'):
    segment(first)
    assert not caplog.messages
    segment(first, second)
  folder = tmp_path / 'out' / 'deep'
  assert caplog.messages == [f'1 earlier predictions in {folder} are replaced']


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


def test_label_map_has_the_values_of_the_files_trained_on(tmp_path, capsys):
  palette = np.array([[9, 0, 0], [0, 9, 0]], np.uint8)
  info = DatasetInfo('x', ('bg', 'box'), palette, values=(0, 255), void_value=7)
  label = np.array([[0, 1, 1, 1]], np.uint8)
  image = np.zeros((1, 4, 3), np.uint8)
  _write(tmp_path / 'a.png', 'in.png', image, label, info)
  with Image.open(tmp_path / 'a.png') as written:
    assert np.array(written).tolist() == [[0, 255, 255, 255]]
    assert np.array(written.convert('RGB'))[0, 1].tolist() == [0, 9, 0]
  assert capsys.readouterr().out == 'in.png: box 75.0%, bg 25.0%\n'
