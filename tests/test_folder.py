import contextlib
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import errors
from deeplab_jax.data import folder, images, load

_ROOT = pathlib.Path(__file__).parents[1]
_CAMVID = _ROOT.parent / 'shared' / 'data' / 'camvid'


def _load(source, prepared, **options):
  return load.load_dataset(
    'folder', directory=str(source), prepared_dir=str(prepared), **options
  )


def _prepared(prepared):
  return sorted(
    path.parent for path in (prepared / 'folder_segmentation').glob('*/1.*')
  )


@pytest.fixture
def prepared(tmp_path):
  return tmp_path / 'prepared'


def _refused(source, prepared, **options):
  """Returns the one line of the error, which a second try gives again."""
  messages = []
  for _ in range(2):
    with pytest.raises(errors.UserError) as caught:
      _load(source, prepared, **options)
    messages.append(str(caught.value))
  assert messages[0] == messages[1] and '\n' not in messages[0]
  assert not list(prepared.rglob('incomplete.*'))
  return messages[0]


def test_folder_is_stored_as_it_lies(voc_folder, prepared):
  data = _load(voc_folder, prepared)
  assert data.info.name == 'mini'
  assert data.info.classes == ('ground', 'left', 'right')
  assert data.info.palette.tolist() == [[10, 20, 30], [200, 0, 0], [0, 200, 0]]
  for split, count in (('train', 6), ('val', 3)):
    records = list(data.source(split))
    assert data.tally(split).num_images == len(records) == count
    sizes = []
    for record in records:
      name = record['name'].decode()
      label = images.decode_label(record['label'])
      with Image.open(voc_folder / f'SegmentationClass/{name}.png') as file:
        np.testing.assert_array_equal(label, np.array(file))
      file = voc_folder / 'JPEGImages' / f'{name}.jpg'
      assert record['image'] == file.read_bytes()
      sizes.append(label.shape)
    assert {r['name'].decode() for r in records} == {
      f'{split}_{index}' for index in range(count)
    }
    assert data.tally(split).max_size == tuple(np.max(sizes, axis=0))


def test_prepared_once_and_reused_after(voc_folder, prepared, monkeypatch):
  first = _load(voc_folder, prepared)
  monkeypatch.setattr(folder, '_read', None)  # a second preparation would fail
  again = _load(voc_folder, prepared)
  assert again.info.classes == first.info.classes
  assert again.tally('val').max_size == first.tally('val').max_size
  assert again.source('val')[0] == first.source('val')[0]


def test_evaluation_alone_reuses_what_training_prepared(
  voc_folder, prepared, monkeypatch
):
  whole = _load(voc_folder, prepared, splits=('train', 'val'))
  monkeypatch.setattr(folder, '_read', None)
  alone = _load(voc_folder, prepared, splits=('val',))
  assert list(alone.source('val')) == list(whole.source('val'))


def _change_image(source):
  path = source / 'JPEGImages' / 'val_0.jpg'
  with Image.open(path) as image:
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=60)


def _touch_label(source):
  os.utime(source / 'SegmentationClass' / 'train_3.png', ns=(1, 1))


def _rename_class(source):
  (source / 'classes.txt').write_text('ground\nleft\nother\n')


def _shorten_list(source):
  path = source / 'ImageSets' / 'Segmentation' / 'val.txt'
  path.write_text('val_0\nval_1\n')


@pytest.mark.parametrize(
  'change', [_change_image, _touch_label, _rename_class, _shorten_list]
)
def test_changed_source_is_prepared_again(voc_folder, prepared, change):
  _load(voc_folder, prepared)
  change(voc_folder)
  with _log() as lines:
    data = _load(voc_folder, prepared)
  changed = 2 if change is _rename_class else 1
  assert len(_prepared(prepared)) == 2 + changed
  assert sum('remove it' in line for line in lines) == changed
  if change is _rename_class:
    assert data.info.classes[2] == 'other'
  if change is _shorten_list:
    assert data.tally('val').num_images == 2
  if change is _change_image:
    stored = {r['name']: r['image'] for r in data.source('val')}
    file = voc_folder / 'JPEGImages' / 'val_0.jpg'
    assert stored[b'val_0'] == file.read_bytes()


@contextlib.contextmanager
def _log():
  """Collects the lines that the package logs."""
  lines = []
  logger = logging.getLogger('deeplab_jax')
  handler = logging.Handler(logging.INFO)
  handler.emit = lambda record: lines.append(record.getMessage())
  level = logger.level
  logger.setLevel(logging.INFO)
  logger.addHandler(handler)
  try:
    yield lines
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)


_SCRIPT = """
import os, sys
from absl import logging
from deeplab_jax.data import folder, load
logging.set_verbosity('info')
read, calls = folder._read, []
def counted(*args):
  calls.append(args)
  if 0 < int(sys.argv[3]) <= len(calls):
    os.kill(os.getpid(), 9)
  return read(*args)
folder._read = counted
data = load.load_dataset('folder', directory=sys.argv[1],
                         prepared_dir=sys.argv[2])
assert (data.tally('train').num_images, len(data.source('val'))) == (6, 3)
print(len(calls))
"""


def _start(source, prepared, kill_at=0):
  return subprocess.Popen(
    [sys.executable, '-c', _SCRIPT, str(source), str(prepared), str(kill_at)],
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_two_processes_together_prepare_once(voc_folder, prepared):
  processes = [_start(voc_folder, prepared) for _ in range(2)]
  results = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], results
  assert sum(int(out) for out, _ in results) == 9
  assert len(_prepared(prepared)) == 2


def test_killed_preparation_leaves_nothing_in_use(voc_folder, prepared):
  killed = _start(voc_folder, prepared, kill_at=5)
  killed.communicate(timeout=60)
  assert killed.returncode == -signal.SIGKILL
  leftovers = list(prepared.rglob('incomplete.*'))
  assert leftovers and not _prepared(prepared)
  data = _load(voc_folder, prepared)
  assert data.tally('train').num_images == 6 and len(_prepared(prepared)) == 2
  assert not list(prepared.rglob('incomplete.*'))


def test_lists_may_have_blanks_and_windows_line_ends(voc_folder, prepared):
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  (lists / 'val.txt').write_bytes(b'\xef\xbb\xbf val_0 \r\n\r\nval_2\r\n\r\n')
  (voc_folder / 'classes.txt').write_bytes(b'ground\r\nleft\r\nright\r\n\r\n')
  data = _load(voc_folder, prepared)
  assert data.tally('val').num_images == 2
  assert data.info.classes == ('ground', 'left', 'right')


def test_ids_may_name_subfolders_and_other_image_formats(voc_folder, prepared):
  for part, suffix in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
    (voc_folder / part / 'deep').mkdir()
    path = voc_folder / part / f'val_0.{suffix}'
    path.rename(voc_folder / part / 'deep' / path.name)
  path = voc_folder / 'JPEGImages' / 'deep' / 'val_0.jpg'
  Image.open(path).save(path.with_suffix('.BMP'))
  path.unlink()
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  (lists / 'val.txt').write_text('deep/val_0\n')
  record = _load(voc_folder, prepared).source('val')[0]
  assert record['name'] == b'deep/val_0'
  expected = images.read_image(path.with_suffix('.BMP'))
  np.testing.assert_array_equal(images.decode_image(record['image']), expected)


def test_gray_labels_take_the_voc_palette(voc_folder, prepared):
  for path in (voc_folder / 'SegmentationClass').iterdir():
    Image.fromarray(np.array(Image.open(path))).save(path)
  palette = _load(voc_folder, prepared).info.palette
  assert palette.tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


def test_only_the_splits_asked_for_are_prepared(voc_folder, prepared):
  (voc_folder / 'JPEGImages' / 'val_0.jpg').unlink()
  data = _load(voc_folder, prepared, splits=('train', 'train'))
  assert data.tally('train').num_images == 6
  with pytest.raises(errors.UserError, match=r"'val'.*train"):
    data.source('val')


@pytest.mark.parametrize(
  'part',
  ['', 'JPEGImages', 'SegmentationClass', 'ImageSets', 'classes.txt'],
)
def test_missing_part_of_the_folder_is_named(voc_folder, prepared, part):
  path = voc_folder / part if part else voc_folder
  path.rename(path.with_name('elsewhere'))
  message = _refused(voc_folder, prepared)
  assert message.startswith(f'{path}')


def test_no_directory_and_unknown_names_are_refused(voc_folder, prepared):
  assert 'config.data.dir' in _refused('', prepared)
  message = _refused(voc_folder, prepared, splits=('train', 'test'))
  assert 'test.txt' in message and 'train, val' in message
  message = _refused(voc_folder, prepared, on_bad_image='maybe')
  assert 'on_bad_image' in message and 'maybe' in message
  assert '300' in _refused(voc_folder, prepared, ignore_label=300)
  with pytest.raises(errors.UserError, match=r"'coco'.*shapes, folder"):
    load.load_dataset('coco')


@pytest.mark.parametrize(
  'file', ['JPEGImages/val_1.jpg', 'SegmentationClass/val_1.png']
)
def test_listed_file_that_is_missing_is_named(voc_folder, prepared, file):
  (voc_folder / file).unlink()
  for action in ('stop', 'skip'):
    message = _refused(voc_folder, prepared, on_bad_image=action)
    assert file.removesuffix('.jpg') in message


def test_listed_files_that_are_missing_are_counted(voc_folder, prepared):
  for index in range(6):
    (voc_folder / 'JPEGImages' / f'train_{index}.jpg').unlink()
  message = _refused(voc_folder, prepared)
  assert message == (
    f'{voc_folder}/ImageSets/Segmentation/train.txt: 6 listed ids without '
    'exactly one image and a label (train_0, train_1, train_2, train_3, '
    'train_4, ...); add them or take them off the list'
  )


def test_empty_split_is_named(voc_folder, prepared):
  path = voc_folder / 'ImageSets' / 'Segmentation' / 'val.txt'
  path.write_text('\n  \n')
  assert f'{path}: the split is empty' in _refused(voc_folder, prepared)


def test_id_listed_twice_is_named(voc_folder, prepared):
  path = voc_folder / 'ImageSets' / 'Segmentation' / 'val.txt'
  path.write_text('val_0\nval_1\nval_0\n')
  message = _refused(voc_folder, prepared)
  assert "val.txt: 'val_0' stands 2 times" in message


def test_two_images_of_one_id_are_named(voc_folder, prepared):
  source = voc_folder / 'JPEGImages'
  shutil.copy(source / 'val_0.jpg', source / 'val_0.jpeg')
  message = _refused(voc_folder, prepared)
  assert 'val_0.jpeg' in message and 'val_0.jpg' in message


@pytest.mark.parametrize('text', ['', 'a\n\nb\n', 'a\nb\na\n'])
def test_wrong_class_list_is_named(voc_folder, prepared, text):
  (voc_folder / 'classes.txt').write_text(text)
  assert 'classes.txt' in _refused(voc_folder, prepared)


@pytest.mark.parametrize(
  'file', ['JPEGImages/train_2.jpg', 'SegmentationClass/train_2.png']
)
def test_truncated_file_stops_or_is_skipped(voc_folder, prepared, file):
  path = voc_folder / file
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  message = _refused(voc_folder, prepared)
  assert message.startswith(f'{path}: unreadable')
  assert "on_bad_image='skip'" in message
  with _log() as lines:
    data = _load(voc_folder, prepared, on_bad_image='skip')
  assert any(str(path) in line and 'Skipped' in line for line in lines)
  assert data.tally('train').num_images == len(data.source('train')) == 5
  names = {record['name'] for record in data.source('train')}
  assert b'train_2' not in names


def test_split_of_unreadable_files_alone_is_refused(voc_folder, prepared):
  for path in (voc_folder / 'JPEGImages').glob('val_*'):
    path.write_bytes(b'broken')
  message = _refused(voc_folder, prepared, on_bad_image='skip')
  assert 'val.txt' in message and 'unreadable' in message


def test_label_of_another_size_is_named(voc_folder, prepared):
  path = voc_folder / 'SegmentationClass' / 'val_1.png'
  Image.new('L', (9, 7)).save(path)
  for action in ('stop', 'skip'):
    message = _refused(voc_folder, prepared, on_bad_image=action)
    assert 'val_1.png: label is 9x7' in message and 'val_1.jpg' in message


def test_label_value_that_means_nothing_is_named(voc_folder, prepared):
  path = voc_folder / 'SegmentationClass' / 'val_1.png'
  label = np.array(Image.open(path))
  label[20, 20] = 7
  Image.fromarray(label).save(path)
  for action in ('stop', 'skip'):
    message = _refused(voc_folder, prepared, on_bad_image=action)
    assert f'{path}: label value 7 (1 pixels)' in message
    assert 'classes.txt' in message
    assert 'config.data.ignore_label' in message
  message = _refused(voc_folder, prepared, ignore_label=7)
  assert 'label value 255' in message


def test_place_that_cannot_be_written_is_named(voc_folder, tmp_path):
  (tmp_path / 'file').touch()
  message = _refused(voc_folder, tmp_path / 'file' / 'below')
  assert 'file/below' in message and 'config.data.prepared_dir' in message


@pytest.mark.skipif(not _CAMVID.is_dir(), reason=f'{_CAMVID} is not here')
def test_camvid_is_prepared_whole(prepared):
  data = _load(_CAMVID, prepared)
  assert data.tally('train').num_images == len(data.source('train')) == 367
  assert data.tally('val').num_images == len(data.source('val')) == 101
  assert (
    data.tally('train').max_size == data.tally('val').max_size == (360, 480)
  )
  assert data.info.num_classes == 11
  seen = np.zeros(256, np.int64)
  for record in data.source('val'):
    label = images.decode_label(record['label'])
    assert label.shape == (360, 480)
    seen += np.bincount(label.ravel(), minlength=256)
  assert (seen[:11] > 0).all() and not seen[11:255].any()
