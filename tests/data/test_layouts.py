"""Where layouts find files, and what they say where they do not."""

import os

import miniature_layouts as mini
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import images, layouts, load, records, survey
from deeplab_jax.data.records import Listing
from deeplab_jax.runtime.errors import UserError

COUNTS = {'train': 4, 'val': 2}


def found(root, split, layout=layouts.images_masks, **options):
  """The names of both files by id."""
  listing = layout(root, split, **options)
  return {
    key: (item.image.name, item.label.name)
    for key, item in listing.found.items()
    if isinstance(item, records.Item) or pytest.fail(str(item))
  }


def refused(root, split='train', layout=layouts.images_masks, **options):
  """The one line that says why a layout, or one of its ids, is refused."""
  with pytest.raises(UserError) as caught:
    for item in layout(root, split, **options).found.values():
      if isinstance(item, UserError):
        raise item
  assert '\n' not in str(caught.value)
  return str(caught.value)


def write(root, *names):
  for name in names:
    mini.save(root / name, mini.scene(len(name))[1])


@pytest.mark.parametrize(
  'image, mask',
  [
    ('{}', '{}'),
    ('img_{}', 'mask_{}'),
    ('{}', '{}_mask'),
    ('img_{}', '{}'),
    ('a_{}_rgb', 'gt_{}_labels'),
    ('frame{}', 'frame{}.seg'),
  ],
)
@pytest.mark.parametrize(
  'names', [['001', '002', '010'], ['cat', 'bat'], ['7']]
)
def test_names_are_matched_but_for_what_all_have(image, mask, names, tmp_path):
  for name in names:
    write(tmp_path, f'images/{image.format(name)}.png')
    write(tmp_path, f'masks/{mask.format(name)}.png')
  write(tmp_path, f'masks/{mask.format("extra")}.png')
  (tmp_path / 'train.txt').write_text('\n'.join(map(image.format, names)))
  pairs = [(f'{image.format(x)}.png', f'{mask.format(x)}.png') for x in names]
  assert [*found(tmp_path, 'train').values()] == pairs


@pytest.mark.parametrize('form', ['{part}/{split}', '{split}/{part}'])
def test_splits_are_folders_in_either_order(form, tmp_path):
  for split, count in COUNTS.items():
    for part in ('images', 'masks'):
      place = form.format(part=part, split=split)
      write(tmp_path, *(f'{place}/{index}.png' for index in range(count)))
  for split, count in COUNTS.items():
    ids = [f'{split}/{index}' for index in range(count)]  # not those of others
    assert [*found(tmp_path, split)] == ids
  message = refused(tmp_path, 'valid')
  assert "no such split, 'valid'" in message
  assert message.endswith('known splits: train, val')


def test_arrays_are_images_where_there_are_no_others(tmp_path):
  write(tmp_path, 'images/b.png', *(f'masks/{x}.png' for x in 'ab'))
  for name in 'ab':
    np.save(tmp_path / f'images/{name}.npy', np.zeros((40, 48, 4), np.uint16))
  (tmp_path / 'train.txt').write_text('a\nb\n')
  pairs = {'a': ('a.npy', 'a.png'), 'b': ('b.png', 'b.png')}
  assert found(tmp_path, 'train') == pairs


def test_other_texts_beside_the_folders_are_no_lists(tmp_path):
  for place in ('images', 'masks'):
    write(tmp_path, *(f'{place}/{index}.png' for index in range(4)))
  (tmp_path / 'README.txt').write_text('by hand')
  splits = [found(tmp_path, split, holdout=0.5) for split in ('train', 'val')]
  assert sorted(map(len, splits)) == [2, 2]
  (tmp_path / 'val.txt').write_text('3\n')
  assert list(found(tmp_path, 'val')) == ['3']


def test_globs_name_the_split_and_what_tells_files_apart(tmp_path):
  for split in COUNTS:
    for city in 'ab':
      write(tmp_path, f'{split}_set/{city}/rgb/1.png')
      write(tmp_path, f'{split}_set/{city}/gt/1_id.png')
      write(tmp_path, f'{split}_set/{city}/gt/1_color.png')
  options = {
    'images': '{split}_set/*/rgb/*.png',
    'masks': '{split}_set/*/gt/*_id.png',
  }
  pairs = found(tmp_path, 'val', **options)
  assert pairs == {f'{x}/1': ('1.png', '1_id.png') for x in 'ab'}


def test_a_share_is_held_out_by_name_alone(tmp_path, caplog):
  names = [f'{index:03d}' for index in range(20)]
  write(
    tmp_path,
    *(f'{part}/{x}.png' for x in names for part in ('images', 'masks')),
  )
  with caplog.at_level('INFO', 'deeplab_jax'):
    val = found(tmp_path, 'val')
  assert '4 of 20 images' in caplog.text and 'holdout=0.2' in caplog.text
  train = found(tmp_path, 'train')
  assert len(val) == 4 and len(train) == 16 and not train.keys() & val.keys()
  assert len(found(tmp_path, 'val', holdout=0.5)) == 10
  assert val.keys() < found(tmp_path, 'val', holdout=0.5).keys()
  assert 'known splits: train, val' in refused(tmp_path, 'test')
  for share in (1.5, -1.0):
    assert 'options.holdout' in refused(tmp_path, holdout=share)
  assert 'is empty' in refused(tmp_path, 'val', holdout=0.01)


def test_lists_choose_ids_with_or_without_suffix(tmp_path):
  write(
    tmp_path, 'images/a/1.png', 'images/2.png', 'masks/a/1.png', 'masks/2.png'
  )
  (tmp_path / 'train.txt').write_text('a/1\n2.png\n')
  (tmp_path / 'classes.txt').write_text('a\nb\n')
  assert found(tmp_path, 'train').keys() == {'a/1', '2.png'}
  assert 'known splits: train' in refused(tmp_path, 'val')
  for text, words in {
    '../1\n': 'leads out of',
    '3\n': "there is no image '3'",
    '\n': 'the split is empty',
    '2\n2\n': 'stands 2 times',
  }.items():
    (tmp_path / 'train.txt').write_text(text)
    message = refused(tmp_path)
    assert words in message
  (tmp_path / 'train.txt').write_text('2\n2.png\n')
  with pytest.raises(UserError, match="'2' stands 2 times"):
    load.load_dataset('images_masks', directory=str(tmp_path), splits=['train'])


def remove_mask(root):
  (root / 'masks/mask_002.png').unlink()


def two_images(root):
  write(root, 'images/img_002.png')


def two_masks(root):
  mini.save(root / 'masks/mask_002.tif', mini.scene(0)[1])


def dangling(root):
  remove_mask(root)
  (root / 'masks/mask_002.png').symlink_to('gone.png')


def other_names(root):
  for index, file in enumerate(sorted((root / 'masks').iterdir())):
    file.rename(file.with_name('abcdef'[index] + '.png'))


def no_masks(root):
  os.rename(root / 'masks', root / 'Masks')


def no_suffix(root):
  for file in (root / 'images').iterdir():
    file.rename(file.with_suffix('.xyz'))


@pytest.mark.parametrize(
  'damage, words',
  [
    (remove_mask, ['/masks: there is no mask', "'mask_002'", "'img_002'"]),
    (two_images, ['img_002.jpg', 'img_002.png', 'keep one']),
    (two_masks, ['mask_002.png', 'mask_002.tif', 'keep one']),
    (dangling, ['mask_002.png', 'a symbolic link to gone.png']),
    (other_names, ['/masks: no name there', "'a'", "'img_000'", 'rename']),
    (no_masks, ['/masks: no such folder; there is Masks', 'options.images']),
    (no_suffix, ['/images: no image there', '.jpg']),
  ],
)
def test_a_pair_that_is_none_is_one_line_with_a_remedy(damage, words, tmp_path):
  root = mini.images_masks(tmp_path, {'train': 5})
  damage(root)
  message = refused(root)
  assert all(word in message for word in words), message


def test_what_lacks_a_mask_is_a_finding_of_the_survey(tmp_path):
  root = mini.images_masks(tmp_path, {'train': 10})
  (root / 'masks/mask_002.png').unlink()
  layout = load.find_layout('images_masks', {})
  survey_ = survey.survey_folder(root, ('train', 'val'), layout=layout)
  (finding,) = (x for x in survey_.findings if x.fatal)
  assert finding.title.startswith('listed ids without') and finding.count == 1


def test_without_classes_txt_prepare_says_how_many_lines(tmp_path):
  root = mini.images_masks(tmp_path, {'train': 10})
  (root / 'classes.txt').unlink()
  layout = load.find_layout('images_masks', {})
  survey_ = survey.survey_folder(root, ('train', 'val'), layout=layout)
  assert f'write {root}/classes.txt: 3 lines' in survey_.text
  assert any('classes.txt: no such file' in x.line for x in survey_.findings)


def test_an_unknown_option_is_refused_with_the_known_ones():
  with pytest.raises(UserError, match='known: images, masks, holdout'):
    load.load_dataset('images_masks', directory='.', options={'image': 'x'})
  with pytest.raises(UserError, match='known: none'):
    load.find_layout('cityscapes', {'images': 'x'})


def stored(name, root, prepared, **options):
  return load.load_dataset(
    name, directory=str(root), prepared_dir=str(prepared), **options
  )


@pytest.mark.parametrize('kind', ['labelIds', 'labelTrainIds'])
def test_cityscapes_means_the_published_classes(kind, tmp_path):
  values = (7, 26, 24) if kind == 'labelIds' else (0, 13, 11)
  root = mini.cityscapes(tmp_path / 'c', COUNTS, kind, values)
  data = stored('cityscapes', root, tmp_path / 'p')
  info = data.info
  assert info.num_classes == 19 and info.palette[13].tolist() == [0, 0, 142]
  assert [info.classes[x] for x in (0, 13, 11)] == ['road', 'car', 'person']
  label = images.decode_label(data.source('val')[1]['label'])
  expected = np.array([0, 13, 11], np.uint8)[mini.scene(1)[1]]
  expected[:4] = 255
  np.testing.assert_array_equal(label, expected)
  # Predictions have the values of the set's own files.
  assert info.values[13] == values[1]


def test_every_id_of_cityscapes_is_mapped_as_published(tmp_path):
  root = mini.cityscapes(tmp_path / 'c', COUNTS)
  label = np.resize(np.arange(34, dtype=np.uint8), mini.SIZE)
  (path,) = root.glob('gtFine/val/*/*_000000_*labelIds.png')
  Image.fromarray(label).save(path)
  data = stored('cityscapes', root, tmp_path / 'p', splits=['val'])
  found_ = images.decode_label(data.source('val')[0]['label'])
  # The column trainId of `labels.py` in cityscapesScripts.
  column = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7]
  column += [*range(8, 16), 255, 255, 16, 17, 18]
  assert len(column) == 34
  np.testing.assert_array_equal(found_, np.array(column, np.uint8)[label])


def test_ade20k_has_150_classes_beside_void(tmp_path):
  root = mini.ade20k(tmp_path / 'a', COUNTS)
  data = stored('ade20k', root, tmp_path / 'p')
  info = data.info
  assert info.num_classes == 150 and info.values == (*range(1, 151),)
  assert info.classes[0] == 'thing 1a' and info.classes[149] == 'thing 150a'
  label = images.decode_label(data.source('val')[0]['label'])
  expected = np.array([255, 0, 149], np.uint8)[mini.scene(0)[1]]
  np.testing.assert_array_equal(label, expected)
  (root / 'objectInfo150.txt').unlink()
  assert stored('ade20k', root, tmp_path / 'p').info.classes[4] == 'class 5'
  message = refused(root, 'test', layouts.ade20k)
  assert message.endswith('known splits: training, validation')


@pytest.mark.parametrize(
  'name, part',
  [
    ('cityscapes', 'gtFine'),
    ('ade20k', 'annotations'),
    ('folder', 'JPEGImages'),
    ('images_masks', 'images'),
  ],
)
def test_a_missing_part_is_named_once(name, part, tmp_path):
  root = getattr(mini, name)(tmp_path / name, COUNTS)
  (root / part).rename(root / 'elsewhere')
  layout = load.find_layout(name, {})
  with pytest.raises(UserError) as caught:
    survey.survey_folder(root, ('train', 'val'), layout=layout)
  assert str(caught.value).startswith(f'{root / part}: no such folder')


def test_a_changed_mask_is_prepared_again(tmp_path):
  root = mini.images_masks(tmp_path / 'm', {'train': 5})
  stored('images_masks', root, tmp_path / 'p')
  image = Image.fromarray(mini.scene(0)[1] * 0 + 1)
  for file in (root / 'masks').iterdir():
    image.save(file)
  data = stored('images_masks', root, tmp_path / 'p')
  assert data.tally('train').class_pixels.tolist() == [0, 4 * 40 * 48, 0]


def side_by_side(root, split, *, ending='.png'):
  """A layout as a user adds it: masks beside their images."""
  found_ = {
    file.stem: records.Item(file.stem, file, file.with_suffix(ending))
    for file in sorted((root / split).glob('*.jpg'))
  }
  names = ['ground', 'left', 'right']
  return Listing(origin=root / split, found=found_, classes=names)


def test_a_layout_is_added_by_one_function_and_one_line(tmp_path, monkeypatch):
  for split, count in COUNTS.items():
    pair = f'{split}/{split}{{}}.jpg', f'{split}/{split}{{}}.png'
    mini.write_pairs(tmp_path / 'd', *pair, range(count))
  monkeypatch.setitem(load.LOADERS, 'side_by_side', side_by_side)
  for name in ('side_by_side', side_by_side):
    data = stored(name, tmp_path / 'd', tmp_path / 'p')
    assert data.info.classes == ('ground', 'left', 'right')
    assert data.names('val') == ['val0', 'val1']
    layout = load.find_layout(name, {'ending': '.png'})
    found_ = survey.survey_folder(tmp_path / 'd', (*COUNTS,), layout=layout)
    assert not any(x.fatal for x in found_.findings)
  with pytest.raises(UserError, match='side_by_side has no such option; known'):
    stored('side_by_side', tmp_path / 'd', tmp_path / 'p', options={'x': 1})
