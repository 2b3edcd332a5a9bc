import re

import numpy as np
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


def test_tally_counts_a_hand_made_split():
  tally = records.Tally(3, 255)
  tally.add(np.array([[0, 0, 1], [255, 0, 1]], np.uint8))
  tally.add(np.array([[0, 255]], np.uint8))
  for copy in (tally, records.Tally.from_json(tally.to_json())):
    assert copy.num_images == 2 and copy.void_pixels == 2
    assert copy.sizes == {(2, 3): 1, (1, 2): 1}
    assert copy.max_size == (2, 3)
    assert copy.class_pixels.tolist() == [4, 2, 0]
    assert copy.class_images.tolist() == [2, 1, 0]
    assert copy.class_image_pixels.tolist() == [6, 5, 0]


def test_ignore_label_among_the_classes_is_void():
  tally = records.Tally(3, 0)
  tally.add(np.array([[0, 1, 2, 2]], np.uint8))
  assert tally.class_pixels.tolist() == [0, 1, 2]
  assert tally.void_pixels == 1


def test_max_size_need_not_be_one_image():
  tally = records.Tally(1, 255)
  tally.add(np.zeros((5, 2), np.uint8))
  tally.add(np.zeros((3, 4), np.uint8))
  assert tally.max_size == (5, 4)


def test_set_larger_than_tfds_shuffles_in_memory_is_prepared_in_order(
  voc_folder, tmp_path, monkeypatch
):
  # beyond it, TFDS needs TensorFlow
  monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1000)
  monkeypatch.setattr(records, '_SHARD', 4)
  monkeypatch.setattr(records, '_CHUNK', 3)
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
