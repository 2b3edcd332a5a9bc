import colorsys

import numpy as np
import pytest

from deeplab_jax.data import images, load, shapes
from deeplab_jax.runtime import errors


def _scenes(count, size=(96, 128)):
  return [
    shapes.generate_scene(np.random.default_rng(seed), size)
    for seed in range(count)
  ]


def test_scene_is_a_pure_function_of_the_generator():
  first, again = _scenes(3), _scenes(3)
  for (image, label), (image_again, label_again) in zip(
    first, again, strict=True
  ):
    np.testing.assert_array_equal(image, image_again)
    np.testing.assert_array_equal(label, label_again)
  assert (first[0][0] != first[1][0]).any()


def test_scenes_have_all_classes_and_a_thin_void_border():
  scenes = _scenes(60)
  shares = np.bincount(
    np.concatenate([label.ravel() for _, label in scenes]), minlength=256
  ) / (60 * 96 * 128)
  assert shares[6:255].sum() == 0
  assert shares[1:6].min() > 0.01 and 0.4 < shares[0] < 0.85
  assert 0.03 < shares[255] < 0.15


def test_every_object_is_parted_from_the_rest_by_void():
  for _, label in _scenes(20):
    for one, other in (
      (label[1:], label[:-1]),
      (label[:, 1:], label[:, :-1]),
    ):
      differ = one != other
      assert ((one == 255) | (other == 255))[differ].all()


def test_each_class_strays_about_its_own_hue():
  hues = {shape: [] for shape in range(1, 6)}
  for image, label in _scenes(150):
    for shape, seen in hues.items():
      if (label == shape).sum() > 200:
        red, green, blue = image[label == shape].mean(axis=0) / 255
        seen.append(2 * np.pi * colorsys.rgb_to_hsv(red, green, blue)[0])
  for shape, seen in hues.items():
    turned = np.exp(1j * (np.array(seen) - 2 * np.pi * shape / 5))
    assert abs(np.angle(turned.mean(), deg=True)) < 20
    assert 3 < np.std(np.angle(turned, deg=True)) < 36


def test_scene_of_any_size_fills_its_frame():
  image, label = shapes.generate_scene(np.random.default_rng(0), (65, 33))
  assert image.shape == (65, 33, 3) and image.dtype == np.uint8
  assert label.shape == (65, 33) and label.dtype == np.uint8
  with pytest.raises(ValueError, match=r'\(16, 64\)'):
    shapes.generate_scene(np.random.default_rng(0), (16, 64))


def test_data_set_is_prepared_as_generated(tmp_path, monkeypatch):
  small = shapes.ShapesConfig(train=3, val=2)
  assert '144x192' in small.name and 'train3_val2' in small.name
  monkeypatch.setattr(shapes, 'ShapesConfig', lambda: small)
  data = load.load_dataset('shapes', prepared_dir=str(tmp_path))
  assert data.info.name == 'shapes' and data.info.num_classes == 6
  assert data.tally('train').num_images == len(data.source('train')) == 3
  assert data.tally('val').num_images == len(data.source('val')) == 2
  assert data.tally('val').sizes == {(144, 192): 2}
  records = {record['name']: record for record in data.source('val')}
  assert set(records) == {b'val_00000', b'val_00001'}
  image, label = shapes.generate_scene(np.random.default_rng((0, 1, 1)))
  record = records[b'val_00001']
  np.testing.assert_array_equal(images.decode_image(record['image']), image)
  np.testing.assert_array_equal(images.decode_label(record['label']), label)


def test_other_ignore_label_or_split_is_refused(tmp_path, monkeypatch):
  small = shapes.ShapesConfig(train=1, val=1)
  monkeypatch.setattr(shapes, 'ShapesConfig', lambda: small)
  with pytest.raises(errors.UserError, match=r'ignore_label.*255, got 0'):
    load.load_dataset('shapes', prepared_dir=str(tmp_path), ignore_label=0)
  with pytest.raises(errors.UserError, match=r"'test'.*train, val"):
    load.load_dataset('shapes', prepared_dir=str(tmp_path), splits=('test',))
