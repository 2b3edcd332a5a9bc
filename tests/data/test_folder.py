import collections
import contextlib
import itertools
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from image_writers import sparse
from PIL import Image

from deeplab_jax.data import folder, folder_files, images, load
from deeplab_jax.runtime import errors

_ROOT = pathlib.Path(__file__).parents[2]
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
    assert data.tally(split).sizes == collections.Counter(sizes)
    assert data.sizes(split) == sizes


def test_prepared_once_and_reused_after(voc_folder, prepared, monkeypatch):
  first = _load(voc_folder, prepared)
  monkeypatch.setattr(
    folder, 'read_pair', None
  )  # a second preparation would fail
  again = _load(voc_folder, prepared)
  assert again.info.classes == first.info.classes
  assert again.tally('val').sizes == first.tally('val').sizes
  assert again.source('val')[0] == first.source('val')[0]


def test_evaluation_alone_reuses_what_training_prepared(
  voc_folder, prepared, monkeypatch
):
  whole = _load(voc_folder, prepared, splits=('train', 'val'))
  monkeypatch.setattr(folder, 'read_pair', None)
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
import os, sys, types
package = types.ModuleType('deeplab_jax')  # without the network, it starts fast
package.__path__ = [sys.argv[4]]
sys.modules['deeplab_jax'] = package
from absl import logging
from deeplab_jax.data import folder, load
logging.set_verbosity('info')
read, calls = folder.read_pair, []
def counted(*args, **named):
  calls.append(args)
  if 0 < int(sys.argv[3]) <= len(calls):
    os.kill(os.getpid(), 9)
  return read(*args, **named)
folder.read_pair = counted
data = load.load_dataset('folder', directory=sys.argv[1],
                         prepared_dir=sys.argv[2])
assert (data.tally('train').num_images, len(data.source('val'))) == (6, 3)
print(len(calls))
"""


def _start(source, prepared, kill_at=0):
  return subprocess.Popen(
    [
      *(sys.executable, '-c', _SCRIPT, str(source), str(prepared)),
      *(str(kill_at), str(_ROOT / 'deeplab_jax')),
    ],
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
  with pytest.raises(errors.UserError, match=r"'voc'.*shapes, folder"):
    load.load_dataset('voc')


@pytest.mark.parametrize(
  'file', ['JPEGImages/val_1.jpg', 'SegmentationClass/val_1.png']
)
def test_listed_file_that_is_missing_is_named(voc_folder, prepared, file):
  (voc_folder / file).unlink()
  for action in ('stop', 'skip'):
    message = _refused(voc_folder, prepared, on_bad_image=action)
    folder, name = file.split('/')
    assert f'{folder}: there is no' in message and name[:5] in message


def test_listed_files_that_are_missing_are_counted(voc_folder, prepared):
  for index in range(6):
    (voc_folder / 'JPEGImages' / f'train_{index}.jpg').unlink()
  message = _refused(voc_folder, prepared)
  assert message == (
    f'{voc_folder}/ImageSets/Segmentation/train.txt: 6 listed ids without '
    'exactly one image and a label (train_0, train_1, train_2, train_3, '
    f'train_4, ...), the first: {voc_folder}/JPEGImages: there is no '
    "image 'train_0'; add it or take 'train_0' off the list"
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
  assert data.tally('train').sizes == {(360, 480): 367}
  assert data.tally('val').sizes == {(360, 480): 101}
  assert data.info.num_classes == 11
  seen = np.zeros(256, np.int64)
  for record in data.source('val'):
    label = images.decode_label(record['label'])
    assert label.shape == (360, 480)
    seen += np.bincount(label.ravel(), minlength=256)
  assert (seen[:11] > 0).all() and not seen[11:255].any()


def _labels(data, split='val'):
  """The stored labels of a split by id."""
  return {
    record['name'].decode(): images.decode_label(record['label'])
    for record in data.source(split)
  }


def _label(source, name='val_0'):
  """The values in a label's file."""
  with Image.open(source / 'SegmentationClass' / f'{name}.png') as file:
    return np.array(file)


def _write_gray(source, change):
  """Stores all labels gray, changed."""
  for path in (source / 'SegmentationClass').iterdir():
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def test_void_in_the_class_range_is_stored_as_if_it_were_255(
  voc_folder, prepared, tmp_path
):
  relabelled = _load(voc_folder, tmp_path / 'usual')
  table = np.array([1, 2, 3, *[0] * 253], np.uint8)
  _write_gray(voc_folder, lambda label: table[label])
  names = 'void\nground\nleft\nright\n'
  (voc_folder / 'classes.txt').write_text(names)
  data = _load(voc_folder, prepared, ignore_label=0)
  assert data.info.classes == ('ground', 'left', 'right')
  assert data.info.ignore_label == 255
  assert data.info.values == (1, 2, 3) and data.info.void_value == 0
  for split in ('train', 'val'):
    tally, usual = data.tally(split), relabelled.tally(split)
    assert tally.to_json() == usual.to_json() and tally.void_pixels
    for name, label in _labels(data, split).items():
      np.testing.assert_array_equal(label, _labels(relabelled, split)[name])
  values, _, void = data.info.in_file_values(_labels(data)['val_0'])
  np.testing.assert_array_equal(values, _label(voc_folder))
  assert void == 0
  # the colors are those of the values
  assert data.info.palette.tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]


def test_255_is_no_void_where_another_label_is(voc_folder, prepared):
  message = _refused(voc_folder, prepared, ignore_label=0)
  assert 'label value 255' in message and 'ignore label 0' in message
  assert 'config.data.label_map' in message


def test_label_map_makes_a_class_of_255(voc_folder, prepared):
  _write_gray(voc_folder, lambda label: np.uint8(label > 0) * np.uint8(255))
  (voc_folder / 'classes.txt').write_text('ground\nbox\n')
  plain = _load(voc_folder, prepared)
  data = _load(voc_folder, prepared, label_map='255:1')
  np.testing.assert_array_equal(
    _labels(data)['val_0'], _label(voc_folder) // 255
  )
  assert data.tally('val').class_pixels[1] == plain.tally('val').void_pixels
  assert not data.tally('val').void_pixels
  assert data.info.values == (0, 255) and data.info.void_value == 254
  with pytest.raises(errors.UserError, match=r'label_map: 255:7 names class 7'):
    _load(voc_folder, prepared, label_map='255:7')
  with pytest.raises(errors.UserError, match='label_map=0:1 is for'):
    load.load_dataset('shapes', label_map='0:1')


@pytest.mark.parametrize('listed', ['./val_0', './/val_0', 'x/../val_0.jpg'])
def test_an_id_has_one_spelling_in_all_lists(voc_folder, prepared, listed):
  path = voc_folder / 'ImageSets' / 'Segmentation' / 'train.txt'
  path.write_text(f'train_0\n{listed}\n')
  data = _load(voc_folder, prepared)
  assert data.shared_names('train', 'val') == ['val_0']
  path.write_text(f'val_0\n{listed}\n')
  assert "'val_0' stands 2 times" in _refused(voc_folder, prepared)


@pytest.mark.parametrize('up', [True, False])
def test_ids_that_lead_out_of_the_folder_are_refused(voc_folder, prepared, up):
  folder = '..' if up else voc_folder
  path = voc_folder / 'ImageSets' / 'Segmentation' / 'train.txt'
  path.write_text(f'{folder}/JPEGImages/train_0.jpg\n')
  message = _refused(voc_folder, prepared)
  assert 'leads out of' in message and message.endswith("as 'train_0'")


def test_an_id_with_a_suffix_says_which_of_two_images(voc_folder, prepared):
  with Image.open(voc_folder / 'JPEGImages' / 'val_0.jpg') as image:
    image.save(voc_folder / 'JPEGImages' / 'val_0.png')
  path = voc_folder / 'ImageSets' / 'Segmentation' / 'val.txt'
  assert 'share the id' in _refused(voc_folder, prepared)
  path.write_text('val_0.png\n')
  (record,) = _load(voc_folder, prepared).source('val')
  assert record['file_name'] == b'val_0.png'


def _write_colored(source, colors):
  """Stores all labels as RGB; values beyond the colors get the last."""
  table = np.array([*colors, *[colors[-1]] * (256 - len(colors))], np.uint8)
  for path in (source / 'SegmentationClass').iterdir():
    Image.fromarray(table[np.array(Image.open(path))]).save(path)


def test_labels_of_colors_are_mapped_once_the_classes_have_colors(
  voc_folder, prepared, tmp_path
):
  expected = _labels(_load(voc_folder, tmp_path / 'usual'))
  _write_colored(voc_folder, [[0, 0, 0], [9, 0, 0], [0, 9, 0], [7, 7, 7]])
  assert 'classes.txt' in _refused(voc_folder, prepared)
  lines = 'ground 0 0 0\nleft 9 0 0\nright 0 9 0\n'
  (voc_folder / 'classes.txt').write_text(lines)
  message = _refused(voc_folder, prepared)
  assert 'the color 7 7 7' in message and 'SegmentationClass' in message
  (voc_folder / 'classes.txt').write_text(lines + 'void 7 7 7\n')
  data = _load(voc_folder, prepared)
  assert data.info.classes == ('ground', 'left', 'right')
  assert data.info.palette.tolist() == [[0, 0, 0], [9, 0, 0], [0, 9, 0]]
  for name, label in _labels(data).items():
    np.testing.assert_array_equal(label, expected[name])


@pytest.mark.parametrize(
  'text', ['a 1 2 3\nb\nc\n', 'a 1 2 3\nb 1 2 3\nc 4 5 6']
)
def test_wrong_colors_of_classes_are_named(voc_folder, prepared, text):
  (voc_folder / 'classes.txt').write_text(text)
  message = _refused(voc_folder, prepared)
  assert message.startswith(f'{voc_folder}/classes.txt: ') and "'b'" in message


def _swap_palette(source, name):
  """Exchanges indices 1 and 2 of a label with their colors: the same look."""
  path = source / 'SegmentationClass' / f'{name}.png'
  table = np.array([0, 2, 1, *range(3, 256)], np.uint8)
  indexed = Image.fromarray(table[np.array(Image.open(path))], 'P')
  indexed.putpalette([10, 20, 30, 0, 200, 0, 200, 0, 0] + [7] * 759)
  indexed.save(path)


@pytest.mark.parametrize('names', [['train_1'], ['val_0', 'val_1', 'val_2']])
def test_palettes_of_another_order_are_refused_also_across_splits(
  voc_folder, prepared, names
):
  for name in names:
    _swap_palette(voc_folder, name)
  with pytest.raises(errors.UserError) as caught:
    _load(voc_folder, prepared)
  message = str(caught.value)
  assert f'SegmentationClass/{names[0]}.png: index 1 has the color 0 200 0' in (
    message
  )
  assert 'SegmentationClass/train_0.png 200 0 0' in message
  assert '\n' not in message


def test_palettes_of_another_order_are_mapped_by_the_colors_of_classes(
  voc_folder, prepared
):
  (voc_folder / 'classes.txt').write_text(
    'ground 10 20 30\nleft 200 0 0\nright 0 200 0\n'
  )
  before = _labels(_load(voc_folder, prepared), 'train')
  _swap_palette(voc_folder, 'train_1')
  after = _labels(_load(voc_folder, prepared), 'train')
  np.testing.assert_array_equal(after['train_1'], before['train_1'])
  assert not np.array_equal(_label(voc_folder, 'train_1'), after['train_1'])


def test_jpeg_in_the_name_of_a_png_is_refused(voc_folder, prepared):
  path = voc_folder / 'SegmentationClass' / 'val_1.png'
  Image.open(path).convert('L').save(path, 'JPEG')
  for action in ('stop', 'skip'):
    message = _refused(voc_folder, prepared, on_bad_image=action)
    assert f'{path}: a label must be lossless, this is a JPEG' in message


@pytest.mark.parametrize(
  'name', ['all', 'train.v2', 'test set', 'train[:10%]', '2024', 'naïve', 'A+b']
)
def test_list_of_any_name_can_be_a_split(voc_folder, prepared, name):
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  decomposed = unicodedata.normalize('NFD', name)
  (lists / 'train.txt').rename(lists / f'{decomposed}.txt')
  data = _load(voc_folder, prepared, splits=(name, 'val'))
  assert len(data.source(name)) == len(data.names(name)) == 6
  assert len(data.sizes(name)) == data.tally(name).num_images == 6
  assert list(data.builders) == [name, 'val']
  assert not data.shared_names(name, 'val')


@pytest.mark.parametrize('name', ['../../classes', 'sub/val', '.', ''])
def test_split_is_no_path(voc_folder, prepared, name):
  assert 'no such split' in _refused(voc_folder, prepared, splits=(name,))


def test_similar_list_is_shown(voc_folder, prepared):
  message = _refused(voc_folder, prepared, splits=('Train',))
  assert (
    "no such split, 'Train'; there is train; known splits: train, val"
    in message
  )


def test_ids_may_have_the_suffix_of_their_image(voc_folder, prepared):
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  (lists / 'val.txt').write_text('val_0.jpg\nval_1.JPG\nval_2\n')
  assert _load(voc_folder, prepared).names('val') == ['val_0', 'val_1', 'val_2']
  (lists / 'val.txt').write_text('val_0.jpg\nval_0\n')
  assert "'val_0' stands 2 times" in _refused(voc_folder, prepared)


def test_id_that_is_a_whole_stem_keeps_its_suffix(voc_folder, prepared):
  for part, suffix in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
    path = voc_folder / part / f'val_0.{suffix}'
    path.rename(path.with_name(f'val_1.jpg.{suffix}'))
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  (lists / 'val.txt').write_text('val_1.jpg\nval_1\n')
  assert _load(voc_folder, prepared).names('val') == ['val_1.jpg', 'val_1']


@pytest.mark.parametrize(
  'new, form',
  [
    ('val_0.PNG', 'PNG'),
    ('val_0.tif', 'TIFF'),
    ('val_0_mask.png', 'PNG'),
    ('val_0_mask.Bmp', 'BMP'),
  ],
)
def test_labels_of_other_names_are_found(
  voc_folder, prepared, tmp_path, new, form
):
  expected = _labels(_load(voc_folder, tmp_path / 'usual'))
  path = voc_folder / 'SegmentationClass' / 'val_0.png'
  with Image.open(path) as image:
    image.save(path.with_name('new'), form)
  path.unlink()
  path.with_name('new').rename(path.with_name(new))
  found = _labels(_load(voc_folder, prepared))
  np.testing.assert_array_equal(found['val_0'], expected['val_0'])


def test_two_labels_of_one_id_are_named_but_an_exact_name_wins(
  voc_folder, prepared
):
  path = voc_folder / 'SegmentationClass' / 'val_0.png'
  shutil.copy(path, path.with_name('val_0_mask.png'))
  _load(voc_folder, prepared)
  shutil.copy(path, path.with_suffix('.tif'))
  message = _refused(voc_folder, prepared)
  assert 'val_0.png and val_0.tif share the id' in message


def test_images_in_jfif_are_found(voc_folder, prepared):
  path = voc_folder / 'JPEGImages' / 'val_0.jpg'
  content = path.read_bytes()
  path.rename(path.with_suffix('.jfif'))
  assert _load(voc_folder, prepared).source('val')[0]['image'] == content


def test_names_compare_in_any_unicode_form(voc_folder, prepared):
  composed, decomposed = 'h\u00fctte', 'hu\u0308tte'
  for part, suffix, name in (
    ('JPEGImages', 'jpg', decomposed),
    ('SegmentationClass', 'png', composed),
  ):
    folder_ = voc_folder / part / decomposed
    folder_.mkdir()
    path = voc_folder / part / f'val_0.{suffix}'
    path.rename(folder_ / f'{name}.{suffix}')
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  for name in (composed, decomposed):
    (lists / 'val.txt').write_text(f'{name}/{name}\n', encoding='utf-8')
    data = _load(voc_folder, prepared)
    assert data.names('val') == [f'{composed}/{composed}']


@pytest.mark.parametrize(
  'file', ['JPEGImages/val_1.jpg', 'SegmentationClass/val_1.png']
)
def test_broken_link_is_named_with_its_target(voc_folder, prepared, file):
  (voc_folder / file).unlink()
  (voc_folder / file).symlink_to('/nowhere/a.png')
  message = _refused(voc_folder, prepared)
  assert f'{file} is a symbolic link to /nowhere/a.png' in message


@pytest.mark.parametrize(
  'file, other, words',
  [
    ('JPEGImages/val_0.jpg', 'Val-0.jpg', 'there is Val-0.jpg;'),
    ('JPEGImages/val_0.jpg', 'val_0.heic', 'there is val_0.heic, but its'),
    ('JPEGImages/val_0.jpg', 'val_0_rgb.jpg', 'there is val_0_rgb.jpg;'),
    ('SegmentationClass/val_0.png', 'val_0.jpg', 'there is val_0.jpg, but'),
    ('SegmentationClass/val_0.png', 'val_0_gt.png', 'there is val_0_gt.png;'),
    ('SegmentationClass', 'SegmentationClasses', 'is SegmentationClasses;'),
    ('classes.txt', 'Classes.TXT', 'there is Classes.TXT;'),
  ],
)
def test_what_is_not_found_is_shown_what_is_there(
  voc_folder, prepared, file, other, words
):
  path = voc_folder / file
  path.rename(path.with_name(other))
  assert words in _refused(voc_folder, prepared)


def test_id_with_a_folder_too_many_is_shown_its_file(voc_folder, prepared):
  lists = voc_folder / 'ImageSets' / 'Segmentation'
  (lists / 'val.txt').write_text('JPEGImages/val_0.jpg\n')
  assert 'there is val_0.jpg;' in _refused(voc_folder, prepared)


def test_folder_of_a_similar_name_is_shown(voc_folder, prepared):
  message = _refused(voc_folder.with_name('Mini'), prepared)
  assert 'no such dataset folder; there is mini;' in message


def _write_turned(source, orientation, size, label_size):
  """A pair of an image with an EXIF orientation and a label without."""
  rng = np.random.default_rng(0)
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
  image.save(source / 'JPEGImages' / 'val_0.jpg', exif=exif)
  label = rng.integers(0, 3, label_size[::-1], np.uint8)
  Image.fromarray(label).save(source / 'SegmentationClass' / 'val_0.png')
  return label


def test_label_drawn_on_the_image_as_shown_stays(voc_folder, prepared):
  label = _write_turned(voc_folder, 6, (50, 40), (40, 50))
  np.testing.assert_array_equal(
    _labels(_load(voc_folder, prepared))['val_0'], label
  )


def test_label_drawn_on_the_image_as_stored_is_turned_with_it(
  voc_folder, prepared
):
  label = _write_turned(voc_folder, 6, (50, 40), (50, 40))
  data = _load(voc_folder, prepared)
  # 6 means: shown a quarter turn clockwise
  np.testing.assert_array_equal(_labels(data)['val_0'], np.rot90(label, -1))
  image = images.decode_image(data.source('val')[0]['image'])
  assert image.shape == (50, 40, 3)


@pytest.mark.parametrize(
  'orientation, size', [(3, (50, 40)), (2, (50, 40)), (6, (40, 40))]
)
def test_label_that_fits_both_ways_up_is_refused(
  voc_folder, prepared, orientation, size
):
  _write_turned(voc_folder, orientation, size, size)
  message = _refused(voc_folder, prepared)
  assert f'val_0.jpg has the EXIF orientation {orientation}' in message
  _write_turned(voc_folder, 1, size, size)
  _load(voc_folder, prepared)


_CASES = _ROOT.parent / 'shared' / 'cases'
_BOXES = ('bg', 'box', 'disc')


@pytest.mark.skipif(not _CASES.is_dir(), reason=f'{_CASES} is not here')
@pytest.mark.parametrize(
  'case, options, classes',
  [
    ('void_is_class_0', {'ignore_label': 0}, _BOXES),
    ('masks_0_and_255', {'label_map': '255:1'}, ('bg', 'box')),
    ('odd_list_names', {'splits': ('all', 'val')}, _BOXES),
    ('odd_list_names', {'splits': ('train.v2', 'test set')}, _BOXES),
    ('odd_list_names', {'splits': ('train-small', '2024')}, _BOXES),
    ('ids_with_suffix', {}, _BOXES),
    ('labels_in_capital_PNG', {}, _BOXES),
    ('images_jfif', {}, _BOXES),
    ('one_class', {}, ('thing',)),
  ],
)
def test_small_case_is_accepted(prepared, case, options, classes):
  data = _load(_CASES / case, prepared, **options)
  assert data.info.classes == classes
  for split in data.builders:
    assert (data.tally(split).class_pixels > 0).all()


@pytest.mark.skipif(not _CASES.is_dir(), reason=f'{_CASES} is not here')
@pytest.mark.parametrize(
  'case, words',
  [
    ('palette_order_differs', 'im1.png: index 0 has the color 220 60 60, but'),
    ('labels_are_jpeg', 'im0.png: a label must be lossless, this is a JPEG'),
    ('float_tiff_images', 'im0.tif: float pixels (mode F) from 0.21'),
    ('labels_are_colors', 'im0.png: a label must be a palette or gray PNG'),
  ],
)
def test_small_case_is_refused_by_name(prepared, case, words):
  assert words in _refused(_CASES / case, prepared)


@pytest.mark.skipif(not _CASES.is_dir(), reason=f'{_CASES} is not here')
@pytest.mark.parametrize('case', ['labels_are_colors', 'palette_order_differs'])
def test_small_case_of_colors_is_mapped_by_them(tmp_path, prepared, case):
  source = tmp_path / case
  shutil.copytree(_CASES / case, source)
  colors = {
    tuple(color)
    for path in (source / 'SegmentationClass').iterdir()
    for color in np.unique(
      np.array(Image.open(path).convert('RGB')).reshape(-1, 3), axis=0
    ).tolist()
  }
  assert len(colors) == 3
  lines = [
    f'c{index} {" ".join(map(str, color))}'
    for index, color in enumerate(sorted(colors))
  ]
  (source / 'classes.txt').chmod(0o644)
  (source / 'classes.txt').write_text('\n'.join(lines))
  data = _load(source, prepared)
  for name, label in _labels(data, 'train').items():
    path = source / 'SegmentationClass' / f'{name}.png'
    np.testing.assert_array_equal(
      np.array(sorted(colors))[label], np.array(Image.open(path).convert('RGB'))
    )


def test_links_that_lead_out_of_the_folder_are_refused(voc_folder, tmp_path):
  image, outside = voc_folder / 'JPEGImages' / 'val_1.jpg', tmp_path / 'out'
  outside.mkdir()
  inside = voc_folder / 'originals'
  inside.mkdir()
  image.rename(inside / 'x.jpg')
  image.symlink_to(inside / 'x.jpg')
  gone = voc_folder / 'JPEGImages' / 'gone.jpg'
  gone.symlink_to(outside / 'nothing')
  (tmp_path / 'linked').symlink_to(voc_folder)
  for root in (voc_folder, tmp_path / 'linked'):
    folder_files.check_inside(str(root))
  for link in (
    image,
    voc_folder / 'classes.txt',
    voc_folder / 'ImageSets' / 'Segmentation' / 'val.txt',
    voc_folder / 'SegmentationClass',
  ):
    kept = link.rename(tmp_path / 'kept')
    target = outside / link.name
    target.mkdir() if link.suffix == '' else target.touch()
    link.symlink_to(target)
    with pytest.raises(errors.UserError) as caught:
      folder_files.check_inside(str(tmp_path / 'linked'))
    assert str(caught.value) == (
      f'{link} leads out of {voc_folder}, to {target}; if that is meant, set'
      ' config.data.allow_outside=True'
    )
    link.unlink()
    kept.rename(link)


@pytest.mark.parametrize(
  'text',
  [
    'x' * 10**6,
    'ground\na' + ' ' * 300 + '1\n',
    'a\n' * 100_000,
    *('ground\nleft\x1b[2J\n', 'le\x00ft\n', 'left\x9b31m\n'),
  ],
  ids=itertools.count(),
)
def test_class_names_that_are_none_are_refused_at_once(
  voc_folder, prepared, text
):
  (voc_folder / 'classes.txt').write_text(text)
  start = time.monotonic()
  message = _refused(voc_folder, prepared)
  assert time.monotonic() - start < 5
  assert message.startswith(f'{voc_folder}/classes.txt: ')
  assert len(message) < 500 and message.isprintable()


@pytest.mark.parametrize(
  'name', ['classes.txt', 'ImageSets/Segmentation/val.txt']
)
@pytest.mark.parametrize(
  ('spoil', 'words'),
  [
    (os.mkfifo, 'not a regular file'),
    (lambda path: path.symlink_to('/dev/zero'), 'not a regular file'),
    (lambda path: path.symlink_to(path), ''),
    (pathlib.Path.mkdir, ''),
    (lambda path: sparse(path, 2**40), 'too many'),
  ],
  ids=itertools.count(),
)
def test_lists_that_have_no_end_are_refused(
  voc_folder, prepared, name, spoil, words
):
  (voc_folder / name).unlink()
  spoil(voc_folder / name)
  message = _refused(voc_folder, prepared)
  assert name in message and (words in message or 'no such file' in message)


def _large(root, height=150, width=230):
  """Makes val_0 a large image of which only one corner has a label."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (height, width, 3), np.uint8)
  label = np.full((height, width), 255, np.uint8)
  label[:70, 100:], label[10, 100] = 1, 2
  (root / 'JPEGImages' / 'val_0.jpg').unlink()
  Image.fromarray(image).save(root / 'JPEGImages' / 'val_0.png')
  Image.fromarray(label).save(root / 'SegmentationClass' / 'val_0.png')
  return image, label


@pytest.mark.parametrize('large', [2**24, 1])
def test_large_images_are_cut_into_tiles(
  voc_folder, prepared, monkeypatch, large
):
  monkeypatch.setattr(folder, '_LARGE', large)
  image, label = _large(voc_folder)
  whole = _load(voc_folder, prepared)
  tiled = _load(voc_folder, prepared, tile=80)
  assert list(tiled.source('train')) == list(whole.source('train'))
  found = {r['name'].decode(): r for r in tiled.source('val')}
  assert tiled.names('val') == list(found)
  # 150 is cut in two and 230 in three; the tiles of void are left out
  assert list(found) == ['val_0@0,1', 'val_0@0,2', 'val_1', 'val_2']
  for name, left, right in (('val_0@0,1', 76, 153), ('val_0@0,2', 153, 230)):
    tile = found[name]
    assert tile['file_name'] == b'val_0.png'
    assert (tile['height'], tile['width']) == (75, 77)
    np.testing.assert_array_equal(
      images.decode_image(tile['image']), image[:75, left:right]
    )
    np.testing.assert_array_equal(
      images.decode_label(tile['label']), label[:75, left:right]
    )
  assert tiled.tally('val').class_pixels.sum() == sum(
    whole.tally('val').class_pixels
  )
  assert tiled.tally('val').num_images == 4


def test_an_image_of_a_tile_is_stored_as_it_is(voc_folder, prepared):
  whole = _load(voc_folder, prepared)
  tiled = _load(voc_folder, prepared, tile=70)
  assert list(tiled.source('val')) == list(whole.source('val'))


def test_an_unreadable_large_image_stops_or_is_skipped(
  voc_folder, prepared, monkeypatch
):
  monkeypatch.setattr(folder, '_LARGE', 1)
  _large(voc_folder)
  path = voc_folder / 'JPEGImages' / 'val_0.png'
  path.write_bytes(path.read_bytes()[:20_000])
  assert str(path) in _refused(voc_folder, prepared, tile=80)
  data = _load(voc_folder, prepared, tile=80, on_bad_image='skip')
  assert data.tally('val').num_images == 2


def test_tiles_of_void_alone_are_refused(voc_folder, prepared):
  for path in (voc_folder / 'SegmentationClass').glob('val_*'):
    Image.fromarray(np.full_like(Image.open(path), 255)).save(path)
  assert 'no tile of val' in _refused(voc_folder, prepared, tile=32)


def test_a_refusal_of_labels_ends_with_what_prepare_proposes(
  voc_folder, prepared
):
  for path in (voc_folder / 'SegmentationClass').iterdir():
    label = np.array(Image.open(path))
    Image.fromarray(np.where(label == 255, 0, label + 1)).save(path)
  message = _refused(voc_folder, prepared)
  assert 'label value 3' in message and 'neither one of the 3' in message
  proposal = '0:void,1-3:0-2'
  assert message.endswith(
    f'; all labels are 0 to 3; counted from 1, so 0 is '
    f'taken for void: --config.data.label_map={proposal}'
  )
  data = _load(voc_folder, prepared, label_map=proposal)
  assert data.tally('train').class_pixels.all()
