"""VOC and SBD in miniature: downloaded, prepared, and refused."""

import gzip
import hashlib
import io
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import types

import miniature_voc as mini
import numpy as np
import pytest
import scipy.io
from miniature import SETTINGS, make_config, write_voc_folder
from web_server import serving, without_proxies

from deeplab_jax import evaluate, train
from deeplab_jax.data import images, label_files, load, voc, voc_sources
from deeplab_jax.runtime import errors

_ROOT = pathlib.Path(__file__).parents[2]
_VOC_TAR = 'VOCtrainval_11-May-2012.tar'


@pytest.fixture(scope='session')
def archives(tmp_path_factory):
  """The archives as files, by name."""
  folder = tmp_path_factory.mktemp('archives')
  return {
    _VOC_TAR: mini.write_voc_tar(folder / _VOC_TAR),
    'benchmark.tgz': mini.write_sbd_tgz(folder / 'benchmark.tgz'),
    'VOC2012test.tar': mini.write_voc_test_tar(folder / 'VOC2012test.tar'),
  }


@pytest.fixture
def web(archives, monkeypatch):
  """Serves the archives at the addresses of the source table."""
  without_proxies(monkeypatch)
  voc_tar, sbd = (
    archives[name].read_bytes() for name in (_VOC_TAR, 'benchmark.tgz')
  )
  files = {'sbd/benchmark.tgz': sbd}
  files |= {f'{host}/{_VOC_TAR}': voc_tar for host in 'oab'}
  with serving(files) as state:
    urls = [f'{state.address}/{path}' for path in files]
    sources = {
      'voc': voc_sources.Source(
        tuple(urls[1:]),
        len(voc_tar),
        f'sha256:{hashlib.sha256(voc_tar).hexdigest()}',
      ),
      'sbd': voc_sources.Source(
        (urls[0],), len(sbd), f'md5:{hashlib.md5(sbd).hexdigest()}'
      ),
    }
    monkeypatch.setattr(voc_sources, 'SOURCES', sources)
    yield state


@pytest.fixture
def prepared(tmp_path):
  return tmp_path / 'prepared'


@pytest.fixture(scope='session')
def unpacked(tmp_path_factory):
  folder = tmp_path_factory.mktemp('unpacked')
  mini.write_voc_devkit(folder)
  mini.write_sbd(folder)
  return folder


@pytest.fixture
def disk(tmp_path, unpacked):
  """A folder with VOC and SBD unpacked."""
  return shutil.copytree(unpacked, tmp_path / 'disk')


def _devkit(disk):
  return disk / 'VOCdevkit' / 'VOC2012'


def _load(variant, prepared, directory='', **options):
  name = 'voc2012_segmentation' + (f'/{variant}' if variant else '')
  own = {key: options.pop(key) for key in ('list', 'holdout') if key in options}
  return load.load_dataset(
    name,
    directory=str(directory),
    prepared_dir=str(prepared),
    options=own,
    **options,
  )


def _refused(variant, prepared, directory='', **options):
  """Returns the one line of the error; nothing half prepared is left."""
  with pytest.raises(errors.UserError) as caught:
    _load(variant, prepared, directory, **options)
  message = str(caught.value)
  assert '\n' not in message
  assert not list(prepared.glob('voc2012_segmentation/*/1.*'))
  assert not list(prepared.rglob('incomplete.*'))
  return message


def _check_stored(data, split, names, *, sbd=()):
  """Compares a split with the scenes, byte for byte and pixel for pixel.

  Args:
    data: the data set.
    split: its name.
    names: the ids it must hold, and no others.
    sbd: of those the ones whose masks are SBD's.
  """
  records = list(data.source(split))
  assert sorted(data.names(split)) == sorted(names)
  assert [r['name'].decode() for r in records] == data.names(split)
  for record in records:
    name = record['name'].decode()
    scene = mini.scenes()[name]
    label = images.decode_label(record['label'])
    expected = scene.sbd_label if name in sbd else scene.voc_label
    np.testing.assert_array_equal(label, expected)
    assert record['image'] == scene.image
    assert record['file_name'].decode() == f'{name}.jpg'
    assert (record['height'], record['width']) == expected.shape
  assert data.tally(split).num_images == len(names)


def _of_sbd(names):
  return set(names).difference(mini.VOC_TRAIN, mini.VOC_VAL)


def _ids(tmp_path, *lines):
  path = tmp_path / 'ids.txt'
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def test_trainaug_comes_through_cuts_a_dead_address_and_rubbish(web, prepared):
  official, first, second = (f'{host}/{_VOC_TAR}' for host in 'oab')
  web.files[first] = web.files[second][:-1] + b'x'  # of the right size
  web.limits = [100_000, 0, 0, 0, None, None, 150_000, None, 50_000]
  data = _load('trainaug', prepared)
  assert web.requests == [
    (official, None),
    *[(official, 'bytes=100000-')] * 3,  # it gives nothing any more
    (first, 'bytes=100000-'),  # the wrong hash, as if the part were to blame
    (first, None),  # the wrong hash
    (second, None),
    (second, 'bytes=150000-'),
    ('sbd/benchmark.tgz', None),
    ('sbd/benchmark.tgz', 'bytes=50000-'),
  ]
  wanted = {*mini.SBD_TRAIN, *mini.SBD_VAL, *mini.VOC_TRAIN} - {*mini.VOC_VAL}
  assert len(wanted) == 20
  _check_stored(data, 'train', wanted, sbd=_of_sbd(wanted))
  _check_stored(data, 'val', mini.VOC_VAL)
  assert set(data.builders) == {'train', 'val'}
  downloads = prepared / 'downloads' / 'voc2012_segmentation'
  assert {path.name for path in downloads.glob('[!.]*')} == {
    _VOC_TAR,
    'benchmark.tgz',
  }


def test_prepared_set_needs_neither_the_web_nor_the_archives(
  web, prepared, monkeypatch
):
  first = _load('trainaug', prepared)
  shutil.rmtree(prepared / 'downloads')
  web.requests.clear()
  monkeypatch.setattr(voc, '_read', None)
  again = _load('trainaug', prepared)
  assert list(again.source('train')) == list(first.source('train'))
  assert not web.requests


def test_voc2012_needs_no_sbd(web, prepared):
  data = _load('', prepared)
  _check_stored(data, 'train', mini.VOC_TRAIN)
  _check_stored(data, 'val', mini.VOC_VAL)
  _check_stored(data, 'trainval', mini.VOC_TRAIN + mini.VOC_VAL)
  assert list(data.builders) == ['train', 'val', 'trainval']
  assert [path for path, _ in web.requests] == [f'o/{_VOC_TAR}']
  same = _load('voc2012', prepared)
  assert same.builders['val'].data_path == data.builders['val'].data_path
  assert data.info.classes[15] == 'person' and data.info.num_classes == 21


def _tars(disk, archives):
  shutil.rmtree(disk / 'VOCdevkit')
  shutil.rmtree(disk / 'benchmark_RELEASE')
  for path in archives.values():
    shutil.copy(path, disk)
  return disk


def _devkit_below(disk, archives):
  return disk


def _devkit_itself(disk, archives):
  shutil.rmtree(disk / 'benchmark_RELEASE')
  shutil.copy(archives['benchmark.tgz'], disk / 'VOCdevkit')
  return disk / 'VOCdevkit'


def _voc2012_itself(disk, archives):
  (disk / 'benchmark_RELEASE').rename(_devkit(disk) / 'benchmark_RELEASE')
  return _devkit(disk)


def _png_masks(disk, archives):
  shutil.rmtree(disk / 'benchmark_RELEASE')
  mini.write_segmentation_class_aug(_devkit(disk))
  return disk


def _png_masks_beside(disk, archives):
  mini.write_segmentation_class_aug(disk)
  # a list of the images to train on goes before the rule
  mini.write_list(_devkit(disk), 'trainaug', sorted(mini.TRAINAUG))
  shutil.rmtree(disk / 'benchmark_RELEASE')
  return disk


@pytest.mark.parametrize(
  'place',
  [
    _tars,
    _devkit_below,
    _devkit_itself,
    _voc2012_itself,
    _png_masks,
    _png_masks_beside,
  ],
)
def test_trainaug_is_the_same_from_wherever_it_lies(
  disk, archives, prepared, place
):
  data = _load('trainaug', prepared, place(disk, archives))
  _check_stored(data, 'train', mini.TRAINAUG, sbd=_of_sbd(mini.TRAINAUG))
  _check_stored(data, 'val', mini.VOC_VAL)
  assert not list((prepared / 'downloads').rglob('*.t*'))


@pytest.mark.parametrize('tar', [False, True])
def test_image_of_sbd_alone_is_used(disk, archives, prepared, tar):
  if tar:
    shutil.rmtree(disk / 'benchmark_RELEASE')
    shutil.copy(archives['benchmark.tgz'], disk)
  for name in _of_sbd(mini.TRAINAUG):
    (_devkit(disk) / 'JPEGImages' / f'{name}.jpg').unlink()
  data = _load('trainaug', prepared, disk)
  _check_stored(data, 'train', mini.TRAINAUG, sbd=_of_sbd(mini.TRAINAUG))


@pytest.mark.parametrize('tar', [False, True])
def test_test_images_have_no_labels(tmp_path, archives, prepared, tar):
  disk = tmp_path / 'disk'
  if tar:
    disk.mkdir()
    for name in (_VOC_TAR, 'VOC2012test.tar'):
      shutil.copy(archives[name], disk)
  else:
    mini.write_voc_devkit(disk, test=True)
  data = _load('', prepared, disk, splits=('test',))
  assert data.names('test') == list(mini.VOC_TEST)
  for record in data.source('test'):
    label = images.decode_label(record['label'])
    name = record['name'].decode()
    assert record['image'] == mini.scenes()[name].image
    assert label.shape == mini.scenes()[name].voc_label.shape
    assert (label == 255).all()


def test_archives_of_2007_beside_those_of_2012_are_passed_over(
  archives, prepared, tmp_path
):
  disk = tmp_path / 'disk'
  disk.mkdir()
  shutil.copy(archives[_VOC_TAR], disk)
  for name in ('VOCtrainval_06-Nov-2007.tar', 'VOCtest_06-Nov-2007.tar'):
    (disk / name).write_bytes(b'')
  assert 'test' not in _load('', prepared, disk).builders


def test_absent_test_images_are_explained(disk, prepared):
  mini.write_list(_devkit(disk), 'test', mini.VOC_TEST)  # but no images
  with pytest.raises(errors.UserError, match=r'VOC2012test\.tar'):
    _load('', prepared, disk, splits=('test',))
  assert 'test' not in _load('', prepared, disk).builders


def test_list_is_parted_and_val_stays(disk, prepared, tmp_path):
  ids = [*mini.VOC_TRAIN[:4], *mini.SBD_TRAIN[6:12]]
  lines = [
    ids[0],
    f'JPEGImages/{ids[1]}.jpg SegmentationClassAug/{ids[1]}.png',
    f'/JPEGImages/{ids[2]}.jpg\t/SegmentationClassAug/{ids[2]}.png',
    '',
    f'JPEGImages\\{ids[3]}.jpg',
    *(f'{name}.png' for name in ids[4:]),
    ids[4],
  ]
  path = _ids(tmp_path, *lines)
  data = _load('list', prepared, disk, list=path, holdout=0.2)
  held = set(sorted(ids, key=lambda x: hashlib.sha256(x.encode()).digest())[:2])
  _check_stored(data, 'holdout', held, sbd=_of_sbd(held))
  _check_stored(data, 'train', set(ids) - held, sbd=_of_sbd(ids))
  _check_stored(data, 'val', mini.VOC_VAL)


def test_held_out_ids_do_not_depend_on_their_order():
  ids = [f'{index:04d}' for index in range(8252)]
  trained, held = voc_sources.hold_out(ids, 0.1)
  assert len(held) == 825 and sorted(trained + held) == ids
  assert set(voc_sources.hold_out(ids[::-1], 0.1)[1]) == set(held)
  # one more line moves one id at most
  assert len(set(voc_sources.hold_out([*ids, 'x'], 0.1)[1]) ^ set(held)) <= 1
  assert voc_sources.hold_out(ids, 0.0) == (ids, [])


def test_list_of_voc_images_needs_no_sbd(web, prepared, tmp_path):
  path = _ids(tmp_path, *mini.VOC_TRAIN)
  data = _load('list', prepared, list=path, holdout=0.0)
  _check_stored(data, 'train', mini.VOC_TRAIN)
  assert list(data.builders) == ['train', 'val']
  assert [path for path, _ in web.requests] == [f'o/{_VOC_TAR}']


def _change_list(disk, options):
  path = pathlib.Path(options['list'])
  path.write_text(path.read_text() + f'{mini.SBD_TRAIN[-1]}\n')


def _change_share(disk, options):
  options['holdout'] = 0.5


def _change_mask(disk, options):
  os.utime(disk / 'benchmark_RELEASE/dataset/cls' / f'{mini.NAMES[14]}.mat')


def _change_val(disk, options):
  mini.write_list(_devkit(disk), 'val', mini.VOC_VAL[:-1])


@pytest.mark.parametrize(
  'change', [_change_list, _change_share, _change_mask, _change_val]
)
def test_changed_source_is_prepared_again(
  disk, prepared, tmp_path, change, caplog
):
  options = {'list': _ids(tmp_path, *mini.NAMES[:8]), 'holdout': 0.25}
  first = _load('list', prepared, disk, **options)
  change(disk, options)
  with caplog.at_level(logging.INFO, 'deeplab_jax'):
    again = _load('list', prepared, disk, **options)
  assert again.builders['val'].data_path != first.builders['val'].data_path
  assert 'remove it if it is not needed' in caplog.text
  assert len(again.names('train')) == {
    _change_list: 7, _change_share: 4,
  }.get(change, 6)  # fmt: skip


def test_failed_preparation_is_not_reported_as_an_older_one(
  disk, prepared, caplog
):
  mask = _devkit(disk) / 'SegmentationClass' / f'{mini.VOC_TRAIN[0]}.png'
  content = mask.read_bytes()
  mask.write_bytes(content[:-50])
  _refused('', prepared, disk)
  mask.write_bytes(content)
  with caplog.at_level(logging.INFO, 'deeplab_jax'):
    _load('', prepared, disk)
  assert 'remove it if it is not needed' not in caplog.text


def test_counts_that_differ_from_the_published_are_reported(
  disk, prepared, caplog
):
  _load('', prepared, disk)
  assert 'train has 8 images, not 1464' in caplog.text
  assert 'val has 6 images, not 1449' in caplog.text
  assert 'trainval has 14 images, not 2913' in caplog.text


def test_no_address_left_is_one_line_that_helps(web, prepared, archives):
  web.statuses = dict.fromkeys(web.files, 503)
  message = _refused('trainaug', prepared)
  folder = prepared / 'downloads' / 'voc2012_segmentation'
  assert message.count('Service Unavailable') == 3
  assert f'put it into {folder}' in message and 'config.data.dir' in message
  for name in (_VOC_TAR, 'benchmark.tgz'):
    shutil.copy(archives[name], folder)
  _check_stored(_load('trainaug', prepared), 'val', mini.VOC_VAL)


def test_file_supplied_by_hand_must_be_the_right_one(web, prepared):
  web.statuses = dict.fromkeys(web.files, 503)
  folder = prepared / 'downloads' / 'voc2012_segmentation'
  folder.mkdir(parents=True)
  (folder / _VOC_TAR).write_bytes(b'another file')
  assert f'{_VOC_TAR} cannot be downloaded' in _refused('', prepared)


def test_small_disk_is_reported_before_the_first_request(
  web, prepared, monkeypatch
):
  sources = voc_sources.SOURCES
  sizes = sources['voc'].size + sources['sbd'].size
  free = types.SimpleNamespace(free=sizes)  # but none for the records
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
  message = _refused('trainaug', prepared)
  needed = sizes + (10582 + 1449) * sources['voc'].size // 17125
  assert f'PASCAL VOC 2012 needs {needed / 1e6:.1f} MB of disk' in message
  assert f'{sizes / 1e6:.1f} MB are free' in message
  assert 'config.data.prepared_dir' in message
  assert not web.requests


def test_small_disk_is_reported_before_records_are_written(
  disk, prepared, monkeypatch
):
  free = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
  assert 'the prepared set needs 0.' in _refused('', prepared, disk)


@pytest.mark.parametrize('name', [_VOC_TAR, 'benchmark.tgz'])
@pytest.mark.parametrize('share', [0.0, 0.3, 0.9])
def test_truncated_archive_is_named(disk, archives, prepared, name, share):
  _tars(disk, archives)
  path = disk / name
  path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
  message = _refused('trainaug', prepared, disk)
  assert message.startswith(f'{path}: truncated or damaged archive')


def test_tar_cut_between_two_files_is_no_whole_one(disk, archives, prepared):
  _tars(disk, archives)
  path = disk / _VOC_TAR
  content = path.read_bytes()
  for cut in range(512, len(content) - 10240, 7 * 512):
    path.write_bytes(content[:cut])
    assert 'truncated' in _refused('', prepared, disk)


@pytest.mark.parametrize('name', [_VOC_TAR, 'benchmark.tgz'])
def test_damaged_header_in_an_archive_is_not_its_end(
  disk, archives, prepared, name
):
  _tars(disk, archives)
  path = disk / name
  with tarfile.open(path) as tar:
    header = tar.getmembers()[20].offset
  pack, unpack = bytes, bytes
  if name.endswith('.tgz'):
    pack, unpack = gzip.compress, gzip.decompress
  content = bytearray(unpack(path.read_bytes()))
  content[header : header + 8] = b'damaged!'
  path.write_bytes(pack(content))
  message = _refused('trainaug', prepared, disk)
  assert f'{path}: truncated or damaged archive' in message
  assert f'no header at byte {header}' in message


def test_ids_without_files_are_counted_and_the_first_named(
  disk, prepared, tmp_path
):
  sbd = sorted(_of_sbd(mini.TRAINAUG))
  (_devkit(disk) / 'JPEGImages' / f'{sbd[0]}.jpg').unlink()
  (disk / 'benchmark_RELEASE/dataset/img' / f'{sbd[0]}.jpg').unlink()
  path = _ids(tmp_path, *mini.VOC_TRAIN, *mini.UNLABELLED, *sbd[:2], *'abcdefg')
  message = _refused('list', prepared, disk, list=path, holdout=0.0)
  assert message == (
    f'{path}: 9 of 18 ids have no image or no mask: {mini.UNLABELLED[0]} (no '
    f'mask), {sbd[0]} (no image), a (no image), b (no image), c (no image), '
    '...; add the files or take the ids off the list'
  )


def test_listed_ids_that_need_absent_sbd_are_counted(disk, prepared, tmp_path):
  shutil.rmtree(disk / 'benchmark_RELEASE')
  path = _ids(tmp_path, *mini.VOC_TRAIN, 'a', 'b')
  message = _refused('list', prepared, disk, list=path)
  assert 'neither benchmark.tgz nor' in message
  assert f'the 2 of 10 ids in {path} that VOC has no mask of: a, b;' in message


def test_val_mask_of_sbd_does_not_stand_in_for_voc(disk, prepared):
  name = mini.VOC_VAL[0]
  assert name in mini.SBD_TRAIN
  (_devkit(disk) / 'SegmentationClass' / f'{name}.png').unlink()
  message = _refused('trainaug', prepared, disk)
  assert 'val.txt: 1 of 6 ids' in message and f'{name} (no mask)' in message


def test_val_images_in_a_training_list_are_refused(disk, prepared, tmp_path):
  path = _ids(tmp_path, *mini.VOC_TRAIN, *mini.VOC_VAL[:2])
  message = _refused('list', prepared, disk, list=path)
  assert message.startswith(f'{path}: 2 of 10 ids are images of VOC val')
  assert 'worthless' in message and mini.VOC_VAL[0] in message
  mini.write_list(_devkit(disk), 'trainaug', [*mini.TRAINAUG, mini.VOC_VAL[1]])
  message = _refused('trainaug', prepared, disk)
  assert 'trainaug.txt: 1 of 21 ids are images of VOC val' in message
  mini.write_list(_devkit(disk), 'train', mini.VOC_TRAIN + mini.VOC_VAL[:1])
  assert 'train.txt: 1 of 9 ids' in _refused('', prepared, disk)


@pytest.mark.parametrize('of_sbd', [False, True])
def test_mask_value_that_means_nothing_is_named(disk, prepared, of_sbd):
  name = mini.NAMES[14] if of_sbd else mini.NAMES[0]
  label = mini.scenes()[name].voc_label.copy()
  label[5, 5:8] = 21
  if of_sbd:
    path = disk / 'benchmark_RELEASE/dataset/cls' / f'{name}.mat'
    mini.write_mat(path, label)
  else:
    path = _devkit(disk) / 'SegmentationClass' / f'{name}.png'
    mini.write_mask(_devkit(disk), name, label)
  message = _refused('trainaug', prepared, disk)
  assert message.startswith(f'{path}: label value 21 (3 pixels) is neither')


def test_mask_of_colors_is_named(archives, prepared, tmp_path):
  root = mini.write_voc_devkit(tmp_path / 'disk')
  path = root / 'SegmentationClass' / f'{mini.NAMES[0]}.png'
  with mini.Image.open(path) as image:
    image.convert('RGB').save(path)
  tar = mini.write_voc_tar(tmp_path / 'tar' / _VOC_TAR, root)
  message = _refused('', prepared, tar.parent)
  assert message.startswith(f'{tar}/VOCdevkit/VOC2012/SegmentationClass/')
  assert 'its mode is RGB' in message


_MASK = np.zeros((9, 9), np.uint8)


@pytest.mark.parametrize(
  'values',
  [
    {'other': 1},
    {'GTcls': 1},
    {'GTcls': {'Boundaries': 1}},
    {'GTcls': {'Segmentation': 'text'}},
    {'GTcls': {'Segmentation': _MASK[None, None]}},
    {'GTcls': {'Segmentation': _MASK + 0.5}},
    {'GTcls': {'Segmentation': _MASK.astype(np.int16) - 1}},
    {'GTcls': {'Segmentation': {'deeper': _MASK}}},
  ],
  ids=str,
)
def test_mat_of_another_structure_is_named(disk, prepared, values):
  path = disk / 'benchmark_RELEASE/dataset/cls' / f'{mini.NAMES[14]}.mat'
  scipy.io.savemat(path, values)
  message = _refused('trainaug', prepared, disk)
  assert message.startswith(f'{path}: ')
  assert 'must hold GTcls.Segmentation' in message


def test_mat_in_doubles_is_read():
  file = io.BytesIO()
  scipy.io.savemat(file, {'GTcls': {'Segmentation': _MASK + 7.0}})
  label = label_files.read_mat_label('x.mat', file.getvalue())
  assert label.dtype == np.uint8 and (label == 7).all()


def test_damaged_mat_stops_or_is_skipped(disk, prepared, caplog):
  name = mini.NAMES[14]
  path = disk / 'benchmark_RELEASE/dataset/cls' / f'{name}.mat'
  content = path.read_bytes()
  for cut in (0, 10, 130, 200, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:cut])
    message = _refused('trainaug', prepared, disk)
    assert message.startswith(f'{path}: '), message
  path.write_bytes(b'x' * len(content))
  assert "or set config.data.on_bad_image='skip'" in _refused(
    'trainaug', prepared, disk
  )
  data = _load('trainaug', prepared, disk, on_bad_image='skip')
  assert f'Skipped {name!r}' in caplog.text
  assert set(data.names('train')) == set(mini.TRAINAUG) - {name}


@pytest.mark.parametrize(
  ('variant', 'removed', 'named'),
  [
    ('trainaug', 'benchmark_RELEASE', 'neither benchmark.tgz nor'),
    ('', 'VOCdevkit', f'neither {_VOC_TAR} nor'),
    ('', 'VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt', 'no val.txt'),
    ('trainaug', 'benchmark_RELEASE/dataset/val.txt', 'no val.txt'),
    ('', '.', 'no such dataset folder'),
  ],
)
def test_what_is_not_on_the_disk_is_named(
  disk, prepared, variant, removed, named
):
  path = disk / removed
  path.unlink() if path.is_file() else shutil.rmtree(path)
  message = _refused(variant, prepared, disk)
  assert named in message and str(disk) in message


def test_bad_settings_are_named(disk, prepared, tmp_path):
  def refused(variant='list', **options):
    return _refused(variant, prepared, disk, **options)

  assert 'config.data.options.list is empty' in refused()
  missing = str(tmp_path / 'missing.txt')
  assert f'config.data.options.list={missing}' in refused(list=missing)
  empty = _ids(tmp_path, '', ' ')
  assert f'{empty}: no id in it' in refused(list=empty)
  two = _ids(tmp_path, *mini.VOC_TRAIN[:2])
  message = refused(list=two, holdout=0.9)
  assert 'config.data.options.holdout: 0.9 leaves none of 2 ids' in message
  message = refused(list=two, holdout=1.0)
  assert 'config.data.options.holdout: must be in [0, 1), got 1.0' in message
  assert 'config.data.options.list' in refused('trainaug', list=two)
  assert 'config.data.ignore_label' in refused('', ignore_label=0)
  assert 'voc2012_segmentation/trainaug' in refused('trainag')


_SCRIPT = """
import os, sys
from deeplab_jax.data import folder, load
read, calls = folder.read_pair, []
def counted(*args):
  calls.append(args)
  if len(calls) >= int(sys.argv[3]):
    os.kill(os.getpid(), 9)
  return read(*args)
folder.read_pair = counted
load.load_dataset('voc2012_segmentation/trainaug', directory=sys.argv[1],
                  prepared_dir=sys.argv[2])
"""


@pytest.mark.parametrize('kill_at', [3, 22])  # in train, in val
def test_killed_preparation_leaves_nothing_in_use(
  disk, archives, prepared, kill_at
):
  _tars(disk, archives)
  killed = subprocess.run(
    [sys.executable, '-c', _SCRIPT, str(disk), str(prepared), str(kill_at)],
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert list(prepared.rglob('incomplete.*'))
  assert not list(prepared.glob('voc2012_segmentation/*/1.*'))
  data = _load('trainaug', prepared, disk)
  _check_stored(data, 'train', mini.TRAINAUG, sbd=_of_sbd(mini.TRAINAUG))
  _check_stored(data, 'val', mini.VOC_VAL)
  assert not list(prepared.rglob('incomplete.*'))


def test_download_cut_off_for_good_goes_on_in_the_next_run(web, prepared):
  web.statuses = {path: 503 for path in web.files if path[0] in 'ab'}
  web.limits = [100_000, 0, 0, 0]
  assert 'after 0.1 MB, which are kept' in _refused('', prepared)
  web.statuses = {}
  web.requests.clear()
  _check_stored(_load('', prepared), 'train', mini.VOC_TRAIN)
  assert web.requests == [(f'o/{_VOC_TAR}', 'bytes=100000-')]


def test_scoring_images_that_are_trained_on_is_refused(
  disk, prepared, tmp_path
):
  config = make_config(
    {
      **SETTINGS,
      'data.name': 'voc2012_segmentation',
      'data.dir': str(disk),
      'data.prepared_dir': str(prepared),
      'data.train_split': 'trainval',
    }
  )
  with pytest.raises(errors.UserError) as caught:
    train.train_and_evaluate(config, tmp_path / 'workdir')
  assert str(caught.value).startswith(
    'config.data.train_split=trainval and config.data.eval_split=val share 6 '
  )
  assert "config.data.eval_split=''" in str(caught.value)


def test_lists_of_a_folder_that_overlap_are_refused(tmp_path, prepared, caplog):
  source = write_voc_folder(tmp_path / 'mini', {'train': 6, 'val': 3})
  lists = source / 'ImageSets' / 'Segmentation'
  (lists / 'both.txt').write_text('val_0\nval_1\ntrain_5\n')
  splits = ('train', 'val', 'both')
  data = load.load_dataset(
    'folder', directory=str(source), prepared_dir=str(prepared), splits=splits
  )
  with pytest.raises(errors.UserError, match=r'share 1 images \(train_5'):
    evaluate.check_data(data, 'train', 'both')
  evaluate.check_data(data, 'train', 'val')
  evaluate.check_data(data, 'train', '')
  evaluate.check_splits(data, 'train', 'val')
  assert not caplog.text
  evaluate.check_splits(data, 'train', 'both')
  assert '1 images of config.data.eval_split=both' in caplog.text
  caplog.clear()
  evaluate.check_data(data, 'train', 'train')
  assert '6 images of config.data.eval_split=train' in caplog.text
