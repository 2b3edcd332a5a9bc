"""Sets that TFDS prepared, read without TensorFlow."""

import sys

import miniature_layouts as mini
import numpy as np
import pytest
import tensorflow_datasets as tfds

from deeplab_jax.data import images, load
from deeplab_jax.runtime.errors import UserError

NAME = 'tfds/mini_pet'


@pytest.fixture(scope='module')
def pet(tmp_path_factory):
  root = mini.mini_pet(tmp_path_factory.mktemp('pet'), {'train': 6, 'test': 3})
  (root / 'mini_pet/4.0.0/classes.txt').write_text('pet\nground\n')
  return root


def opened(root, tmp_path, splits=('train', 'test'), name=NAME, **settings):
  settings = {'label_map': '1:0,2:1,3:void', **settings}
  return load.load_dataset(
    name,
    directory=str(root),
    prepared_dir=str(tmp_path / 'p'),
    splits=splits,
    **settings,
  )


def test_masks_and_images_are_stored_as_they_are(pet, tmp_path):
  data = opened(pet, tmp_path)
  assert data.info.name == 'mini_pet'
  assert data.info.classes == ('pet', 'ground') and data.info.values == (1, 2)
  assert len(data.source('train')) == 6 and len(data.source('test')) == 3
  labels = []
  for record in data.source('test'):
    seed = next(
      seed
      for seed in range(3)
      if np.array_equal(
        images.decode_image(record['image']), mini.scene(seed)[0]
      )
    )
    expected = np.array([1, 0, 255], np.uint8)[mini.scene(seed)[1]]
    labels.append(seed)
    np.testing.assert_array_equal(
      images.decode_label(record['label']), expected
    )
  assert sorted(labels) == [0, 1, 2]
  assert 'tensorflow' not in sys.modules


def test_parts_of_a_split_are_splits_and_share_no_image(pet, tmp_path):
  data = opened(pet, tmp_path, ('train[:4]', 'train[4:]+test'))
  assert data.names('train[:4]') == [f'train_{x:06d}' for x in range(4)]
  rest = ['train_000004', 'train_000005', *(f'test_{x:06d}' for x in range(3))]
  assert data.names('train[4:]+test') == rest
  data = opened(pet, tmp_path, ('train', 'train[50%:]'))
  assert len(data.shared_names('train', 'train[50%:]')) == 3


def test_names_of_a_labeled_image_are_the_classes(tmp_path):
  mask = tfds.features.LabeledImage(labels=list('abcd'), shape=(None, None, 1))
  root = mini.mini_pet(tmp_path / 'tfds', {'train': 2}, mask)
  data = opened(root, tmp_path, ['train'], label_map='')
  assert data.info.classes == ('a', 'b', 'c', 'd')


@pytest.mark.parametrize(
  'change, words',
  [
    ({'name': 'tfds/other'}, ['holds no other', 'tfds build', '--data_dir=']),
    ({'splits': ['val']}, ["no split 'val'", 'known splits: train, test']),
    ({'splits': ['train[:0]']}, ["no split 'train[:0]'", 'train, test']),
    (
      {'options': {'masks': 'label'}},
      ['options.masks', 'image, segmentation_mask'],
    ),
    ({'options': {'images': 'x'}}, ['config.data.options.images']),
    ({'options': {'image': 'x'}}, ['options.image:', 'known: images, masks']),
    ({'root': ''}, ['config.data.dir is empty']),
  ],
)
def test_what_is_wrong_is_one_line_that_names_it(pet, tmp_path, change, words):
  with pytest.raises(UserError) as caught:
    opened(**{'root': pet, 'tmp_path': tmp_path, **change})
  message = str(caught.value)
  assert '\n' not in message and all(word in message for word in words), message


def test_a_damaged_file_of_records_is_named(tmp_path):
  root = mini.mini_pet(tmp_path / 'tfds', {'train': 6})
  (root / 'mini_pet/4.0.0/classes.txt').write_text('pet\nground\n')
  (path,) = root.glob('mini_pet/4.0.0/*.array_record*')
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 255
  path.write_bytes(data)
  with pytest.raises(UserError, match='is damaged'):
    opened(root, tmp_path, ['train'])
