import re

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from deeplab_jax.data import load, records


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
