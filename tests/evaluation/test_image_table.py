"""The CSV of all images, written and read."""

import csv

import numpy as np
import pytest

from deeplab_jax.evaluation import image_table
from deeplab_jax.evaluation.image_table import ImageTable
from deeplab_jax.runtime.errors import UserError

CLASSES = 'road', 'tree, "old"\nor: new'


def table(kinds=3):
  counts = np.arange(3 * kinds * 2).reshape(3, kinds, 2) * 10**10
  counts[2] = 0
  return ImageTable(['a/b.png', 'ö,', 'c'], CLASSES, counts)


@pytest.mark.parametrize('kinds', [3, 5])
def test_what_is_written_is_read(tmp_path, kinds):
  path = tmp_path / 'val_images.csv'
  image_table.write(path, table(kinds))
  found = image_table.read(path)
  assert found.names == list(table().names)
  assert found.classes == list(CLASSES)
  assert found.counts.dtype == np.int64
  np.testing.assert_array_equal(found.counts, table(kinds).counts)


def test_columns_say_what_they_hold(tmp_path):
  path = tmp_path / 'val_images.csv'
  image_table.write(path, table())
  with path.open(newline='', encoding='utf-8') as file:
    first, second, void = csv.DictReader(file)
  assert list(first)[:7] == [
    *('image', 'valid_pixels', 'per_image_miou', 'per_image_pixel_accuracy'),
    *('tp:road', 'fp:road', 'fn:road'),
  ]
  assert int(second['fn:road']) == table().counts[1, 2, 0]
  assert int(first['valid_pixels']) == (0 + 1 + 4 + 5) * 10**10
  # By class, IoU 0 / (0 + 2 + 4) and 1 / (1 + 3 + 5).
  assert float(first['per_image_miou']) == pytest.approx(1 / 18)
  assert float(first['per_image_pixel_accuracy']) == pytest.approx(1 / 10)
  assert void['valid_pixels'] == '0'
  assert void['per_image_miou'] == void['per_image_pixel_accuracy'] == ''


@pytest.mark.parametrize(
  'change',
  [
    lambda text: '',
    lambda text: '\x00' + text,
    lambda text: text.replace('fn:road', 'fnroad'),
    lambda text: text.replace('ö,', 'c'),
    lambda text: text.replace('40000000000', 'x', 1),
    lambda text: text.replace('40000000000', '4.5', 1),
    lambda text: text.replace('40000000000', '9' * 30, 1),
    lambda text: text + '\n',
    lambda text: text + 'd,0\n',
    lambda text: text[: text.index('a/b.png')],
    lambda text: text[:-3],
    lambda text: 'image,valid_pixels\n',
  ],
)
def test_another_file_is_named_and_refused(tmp_path, change):
  path = tmp_path / 'val_images.csv'
  image_table.write(path, table())
  text = change(path.read_bytes().decode())
  path.write_bytes(text.encode())
  with pytest.raises(UserError, match='--mode=eval writes it again') as error:
    image_table.read(path)
  assert str(error.value).startswith(f'{path}: ')
  assert '\n' not in str(error.value)
