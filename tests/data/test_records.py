import os
import random
import re
import shutil

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from deeplab_jax.data import load, records
from deeplab_jax.runtime.errors import UserError


def test_records_are_what_tfds_itself_reads(voc_folder, tmp_path):
  data = load.load_dataset(
    'folder', directory=str(voc_folder), prepared_dir=str(tmp_path)
  )
  skip = tfds.decode.SkipDecoding()
  theirs = data.builders['train'].as_data_source(
    'train', decoders={'image': skip, 'label': skip}
  )
  assert list(data.source('train')) == list(theirs)


def test_set_larger_than_tfds_shuffles_in_memory_is_prepared_in_order(
  voc_folder, tmp_path, monkeypatch
):
  # beyond it, TFDS needs TensorFlow
  monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1000)
  monkeypatch.setattr(records, '_SHARD', 4)
  data = load.load_dataset(
    'folder', directory=str(voc_folder), prepared_dir=str(tmp_path / 'prepared')
  )
  listed = [f'train_{index}' for index in range(6)]
  assert [r['name'].decode() for r in data.source('train')] == listed
  assert data.names('train') == listed
  assert len(list((tmp_path / 'prepared').rglob('*train*array_record*'))) == 2


@pytest.mark.parametrize('split', ['train', 'val', 'trainval', 'val_fold1'])
def test_plain_splits_keep_their_names(split):
  assert records.split_key(split) == split


def test_other_splits_get_names_that_tfds_takes_and_that_differ():
  odd = ['all', 'train.v2', 'train v2', 'test set', 'train[:10%]', '2024']
  odd += ['Train', 'Übung', 'a' * 200, 'val+train', 'train-small', '']
  keys = [records.split_key(split) for split in odd]
  assert len({key.lower() for key in keys}) == len(odd)
  for key in keys:
    assert re.fullmatch('list_[a-z0-9_]{1,40}', key)


def damage(path, kind, rng):
  """Deletes a file, cuts it off, or turns a bit over."""
  data = bytearray(path.read_bytes())
  if kind == 'deletion':
    path.unlink()
  elif kind == 'truncation':
    path.write_bytes(data[: rng.randrange(len(data))])
  else:
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize(
  'count', [12, pytest.param(300, marks=pytest.mark.slow)]
)
def test_damaged_sets_are_prepared_again_or_refused(
  voc_folder, tmp_path, count
):
  def read(prepared):
    data = load.load_dataset(
      'folder', directory=str(voc_folder), prepared_dir=str(prepared)
    )
    return repr(
      [
        [list(data.source(s)), data.names(s), data.tally(s).to_json()]
        for s in ('train', 'val')
      ]
      + [data.info.to_json()]
    )

  good = tmp_path / 'good'
  expected, rng = read(good), random.Random(count)
  paths = [
    p for p in sorted(good.rglob('*')) if p.is_file() and p.stat().st_size
  ]
  kinds, refused = ('deletion', 'truncation', 'flip', 'flip', 'flip'), 0
  for number in range(count):
    prepared = tmp_path / f'copy{number}'
    shutil.copytree(good, prepared)
    path = paths[number % len(paths)].relative_to(good)
    damage(prepared / path, rng.choice(kinds), rng)
    try:
      assert read(prepared) == expected
    except UserError as error:
      assert 'array_record' in path.name  # a flip, seen when it is read
      assert '\n' not in str(error) and str(error).startswith(str(prepared))
      assert 'prepare it again' in str(error)
      refused += 1
    assert not list(prepared.rglob('incomplete*'))
    shutil.rmtree(prepared)
  assert refused < count / 5


def test_a_damaged_set_without_its_source_stays(voc_folder, tmp_path):
  def read():
    return load.load_dataset(
      'folder',
      directory=str(voc_folder),
      prepared_dir=str(tmp_path / 'prepared'),
      splits=('train',),
    )

  read()
  (path,) = (tmp_path / 'prepared').rglob('metadata.json')
  path.write_text(path.read_text().replace('left', 'lift'))
  image = voc_folder / 'JPEGImages' / 'train_3.jpg'
  state, data = image.stat(), image.read_bytes()
  image.write_bytes(bytes(len(data)))
  os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
  with pytest.raises(UserError, match=r'train_3\.jpg'):
    read()
  assert path.exists()
  image.write_bytes(data)
  os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
  assert read().info.classes == ('ground', 'left', 'right')


def test_a_set_of_an_older_version_without_a_state_is_read(
  voc_folder, tmp_path
):
  options = {'directory': str(voc_folder), 'prepared_dir': str(tmp_path / 'p')}
  names = load.load_dataset('folder', **options).names('train')
  for path in (tmp_path / 'p').rglob('state.json'):
    path.unlink()
  assert load.load_dataset('folder', **options).names('train') == names
  assert not list((tmp_path / 'p').rglob('state.json'))
