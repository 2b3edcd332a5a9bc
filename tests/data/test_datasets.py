import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deeplab_jax.data import datasets


def test_voc_palette_has_the_devkit_colours():
  palette = datasets.voc_palette(256)
  # from the devkit's documentation: aeroplane, bicycle, person, tv, void
  assert palette[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
  assert palette[15].tolist() == [192, 128, 128]
  assert palette[20].tolist() == [0, 64, 128]
  assert palette[255].tolist() == [224, 224, 192]
  assert len(np.unique(palette, axis=0)) == 256


def test_info_survives_json():
  info = datasets.DATASETS['voc2012']
  again = datasets.DatasetInfo.from_json(json.loads(json.dumps(info.to_json())))
  assert again.name == 'voc2012'
  assert again.classes == info.classes
  assert again.ignore_label == 255
  assert again.palette.dtype == np.uint8
  np.testing.assert_array_equal(again.palette, info.palette)


def test_known_data_sets_have_their_class_counts():
  assert datasets.DATASETS['voc2012'].num_classes == 21
  assert datasets.DATASETS['shapes'].num_classes == 6


def test_palette_of_another_length_is_refused():
  with pytest.raises(ValueError, match=r'\[2, 3\].*\(3, 3\)'):
    datasets.DatasetInfo('x', ('a', 'b'), np.zeros((3, 3), np.uint8))


def test_light_modules_import_neither_grain_nor_tfds():
  script = (
    'import sys\n'
    'from deeplab_jax.data import datasets, images, transforms\n'
    "heavy = {'tensorflow_datasets', 'tensorflow', 'torch', 'grain'}\n"
    'print(sorted(heavy & set(sys.modules)))'
  )
  out = subprocess.run(
    [sys.executable, '-c', script],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout == '[]\n'


def test_ignore_label_among_the_classes_is_refused():
  with pytest.raises(ValueError, match=r'must be no class, 0 to 1, .*, got 1'):
    datasets.DatasetInfo('x', ('a', 'b'), np.zeros((2, 3)), ignore_label=1)
  datasets.DatasetInfo('x', ('a', 'b'), np.zeros((2, 3)), ignore_label=2)


def test_info_of_an_older_version_has_the_indices_as_values():
  values = datasets.DATASETS['shapes'].to_json()
  del values['values'], values['void_value']
  info = datasets.DatasetInfo.from_json(values)
  assert info.values == (0, 1, 2, 3, 4, 5) and info.void_value == 255


def test_predictions_get_the_values_of_the_files():
  palette = np.array([[1, 1, 1], [2, 2, 2]], np.uint8)
  info = datasets.DatasetInfo(
    'x', ('a', 'b'), palette, values=(1, 255), void_value=0
  )
  info = datasets.DatasetInfo.from_json(json.loads(json.dumps(info.to_json())))
  label = np.array([[0, 1, 255, 0]])
  values, colors, void = info.in_file_values(label)
  assert values.tolist() == [[1, 255, 0, 1]] and void == 0
  assert colors[1].tolist() == [1, 1, 1] and colors[255].tolist() == [2, 2, 2]


def test_tally_counts_a_hand_made_split():
  tally = datasets.Tally(3, 255)
  tally.add(np.array([[0, 0, 1], [255, 0, 1]], np.uint8))
  tally.add(np.array([[0, 255]], np.uint8))
  for copy in (tally, datasets.Tally.from_json(tally.to_json())):
    assert copy.num_images == 2 and copy.void_pixels == 2
    assert copy.sizes == {(2, 3): 1, (1, 2): 1}
    assert copy.class_pixels.tolist() == [4, 2, 0]
    assert copy.class_images.tolist() == [2, 1, 0]
    assert copy.class_image_pixels.tolist() == [6, 5, 0]


def test_ignore_label_among_the_classes_is_void():
  tally = datasets.Tally(3, 0)
  tally.add(np.array([[0, 1, 2, 2]], np.uint8))
  assert tally.class_pixels.tolist() == [0, 1, 2]
  assert tally.void_pixels == 1


@pytest.mark.parametrize(
  'name', ['x' * 10**6, 'a\x1b[31m', 'a\nb', 'a\u2028b', 'a\x00', 7, None]
)
def test_class_names_that_a_terminal_cannot_show_are_refused(name):
  with pytest.raises(ValueError, match='must be short and printable') as error:
    datasets.DatasetInfo('x', ('a', name), np.zeros((2, 3)))
  assert len(str(error.value)) < 200 and str(error.value).isprintable()
  datasets.DatasetInfo('x', ('सड़क', 'خیابان‌ها'), np.zeros((2, 3)))
