"""Every problem of a folder is found, counted and named at once."""

import numpy as np
import pytest
from miniature import write_voc_folder
from PIL import Image

from deeplab_jax.data import datasets, survey
from deeplab_jax.runtime import errors

SPLITS = ('train', 'val')


def label_path(root, name):
  return root / 'SegmentationClass' / f'{name}.png'


def image_path(root, name):
  return root / 'JPEGImages' / f'{name}.jpg'


def write_label(root, name, change):
  """Changes a label in place, and stores it gray."""
  label = np.array(Image.open(label_path(root, name)))
  change(label)
  Image.fromarray(label).save(label_path(root, name))


def write_list(root, split, names):
  path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
  path.write_text('\n'.join(names))


def findings(root, fatal=None, **options):
  """Findings by title but for sizes, which all miniatures are too small in."""
  found = survey.survey_folder(root, SPLITS, **options).findings
  return {
    finding.title: finding
    for finding in found
    if not finding.title.startswith('tiny')
    and (fatal is None or finding.fatal == fatal)
  }


def test_sound_folder_has_no_findings_and_its_own_classes(voc_folder):
  found = survey.survey_folder(voc_folder, SPLITS)
  assert not findings(voc_folder)
  assert found.text == (
    'num_classes: 3 (the labels hold 0 to 2 and void, 255; as classes.txt has'
    ' names)'
  )


def test_all_problems_are_found_at_once(voc_folder):
  image_path(voc_folder, 'train_0').unlink()
  label_path(voc_folder, 'train_1').unlink()
  for name in ('train_2', 'val_0'):
    image_path(voc_folder, name).write_bytes(b'broken')
  path = label_path(voc_folder, 'train_3')
  path.write_bytes(path.read_bytes()[:100])
  Image.new('L', (9, 7)).save(label_path(voc_folder, 'train_4'))
  Image.new('RGB', (9, 7), 'red').save(label_path(voc_folder, 'train_5'))

  def stray(label):
    label[20, 20:23] = 7

  write_label(voc_folder, 'val_1', stray)
  write_label(voc_folder, 'val_2', stray)
  found = findings(voc_folder, fatal=True)
  assert {title: finding.count for title, finding in found.items()} == {
    'listed ids without exactly one image and a label': 2,
    'unreadable files': 3,
    'labels of another size than their image': 1,
    'labels that hold no class indices': 1,
    'label values that are neither a class nor the ignore label': 1,
  }
  (value,) = found[
    'label values that are neither a class nor the ignore label'
  ].examples
  first = label_path(voc_folder, 'val_1')
  assert value == f'7: 6 pixels in 2 files, first {first}'
  unreadable = '\n'.join(found['unreadable files'].examples)
  for name in ('train_2.jpg', 'val_0.jpg', 'train_3.png'):
    assert name in unreadable
  (missing_image, missing_label) = found[
    'listed ids without exactly one image and a label'
  ].examples
  assert 'train_0' in missing_image and 'train_1' in missing_label


def test_first_five_of_many_are_named(tmp_path):
  root = write_voc_folder(tmp_path / 'many', {'train': 9, 'val': 1})
  for index in range(8):
    image_path(root, f'train_{index}').unlink()
  ((_, finding),) = findings(root).items()
  assert finding.count == 8 and len(finding.examples) == 5
  lines = str(finding).splitlines()
  assert lines[0] == (
    'error: listed ids without exactly one image and a label: 8'
  )
  assert [f"'train_{i}'" in line for i, line in enumerate(lines[1:6])] == [
    True
  ] * 5
  assert lines[6:] == ['  and 3 more']


def test_unreadable_files_that_are_skipped_are_a_warning(voc_folder):
  image_path(voc_folder, 'train_2').write_bytes(b'broken')
  # of a record that is skipped, the label does not count
  write_label(voc_folder, 'train_2', lambda label: label.fill(9))
  assert findings(voc_folder, fatal=True).keys() == {'unreadable files'}
  found = findings(voc_folder, on_bad_image='skip')
  assert [str(finding).splitlines()[0] for finding in found.values()] == [
    'warning: unreadable files: 1'
  ]


@pytest.mark.parametrize(
  'text, value, count, words',
  [
    (None, 2, 3, 'the labels hold 0 to 2 and void, 255; write '),
    (None, 6, 7, 'the labels hold 0 to 2, 6 and void, 255; write '),
    ('a\n\nb\n', 2, 3, 'classes.txt: 3 lines, one class name each)'),
    ('a\nb\nc\n', 3, 4, 'the labels hold 0 to 3 and void, 255; but '),
    ('a\nb\n', 2, 3, 'classes.txt has 2 names)'),
    ('a\nb\nc\nd\n', 2, 4, 'as classes.txt has names'),
  ],
)
def test_number_of_classes_is_proposed(voc_folder, text, value, count, words):
  if text is None:
    (voc_folder / 'classes.txt').unlink()
  else:
    (voc_folder / 'classes.txt').write_text(text)

  def put(label):
    label[20, 20] = value

  write_label(voc_folder, 'val_1', put)
  found = survey.survey_folder(voc_folder, SPLITS)
  assert found.text.startswith(f'num_classes: {count} (')
  assert words in found.text
  assert any(finding.fatal for finding in found.findings) == (
    text is None or '\n\n' in text or count > len(text.split())
  )


def test_another_ignore_label_is_no_class(voc_folder):
  found = survey.survey_folder(voc_folder, SPLITS, ignore_label=2)
  assert found.text.startswith('num_classes: 255 (')  # 0 to 255, without 2
  assert 'the labels hold 0 to 1, 255 and void, 2' in found.text
  assert found.text.endswith('; line 3 is void and no class)')


def test_classes_without_pixels_are_named_by_split(voc_folder):
  def drop(label):
    label[label == 2] = 0

  for index in range(3):
    write_label(voc_folder, f'val_{index}', drop)
  with (voc_folder / 'classes.txt').open('a') as file:
    file.write('absent\n')
  ((title, finding),) = findings(voc_folder).items()
  assert title == 'classes without a pixel' and not finding.fatal
  assert finding.examples == (
    'absent in train (if 255 marks a class, set --config.data.label_map=255:3)',
    'right in val',
    'absent in val',
  )


def test_split_of_void_alone_is_one_finding(voc_folder):
  for index in range(3):
    write_label(voc_folder, f'val_{index}', lambda label: label.fill(255))
  (finding,) = findings(voc_folder).values()
  assert finding.examples == ('all 3 in val',)


def test_masks_of_0_and_255_are_suspect(voc_folder):
  def binary(label):
    label[label > 0] = 255

  for path in (voc_folder / 'SegmentationClass').iterdir():
    write_label(voc_folder, path.stem, binary)
  (voc_folder / 'classes.txt').write_text('ground\n')
  ((title, finding),) = findings(voc_folder).items()
  assert title == 'labels that tell nothing apart' and finding.fatal
  assert finding.examples == (
    '0 (ground) is the only value besides void, 255, in train; if 255 marks a '
    'class, set --config.data.label_map=255:1 and give it a line in '
    'classes.txt',
  )
  (voc_folder / 'classes.txt').write_text('ground\nbox\n')
  found = findings(voc_folder, fatal=True)
  assert '--config.data.label_map=255:1' in str(*found.values())
  assert not findings(voc_folder, label_map='255:1')


def test_unknown_values_are_not_said_to_be_absent(voc_folder):
  def spread(label):
    label[:] = np.uint8([0, 128, 255])[label % 255]

  for path in (voc_folder / 'SegmentationClass').iterdir():
    write_label(voc_folder, path.stem, spread)
  found = survey.survey_folder(voc_folder, SPLITS)
  assert 'tell nothing apart' not in str(found.findings)
  assert found.proposal.label_map == '128:1,255:2'


def test_training_split_of_void_alone_is_refused(voc_folder):
  for index in range(6):
    write_label(voc_folder, f'train_{index}', lambda label: label.fill(255))
  ((title, finding),) = findings(voc_folder).items()
  assert title == 'no pixel of a class to train on' and finding.fatal
  assert finding.examples == ('every pixel in train is void, 255',)


def test_one_class_without_void_is_a_warning(voc_folder):
  for path in (voc_folder / 'SegmentationClass').iterdir():
    write_label(voc_folder, path.stem, lambda label: label.fill(1))
  found = findings(voc_folder)
  same = found.pop('labels that tell nothing apart')
  assert not same.fatal and found.keys() == {'classes without a pixel'}
  assert same.examples == (
    '1 (left) is the only value in train, so there is nothing to learn',
  )


def test_void_in_the_class_range_is_no_class(voc_folder):
  def shift(label):
    label[:] = np.where(label == 255, 0, label + 1)

  for path in (voc_folder / 'SegmentationClass').iterdir():
    write_label(voc_folder, path.stem, shift)
  (voc_folder / 'classes.txt').write_text('void\nground\nleft\nright\n')
  found = survey.survey_folder(voc_folder, SPLITS, ignore_label=0)
  assert not findings(voc_folder, ignore_label=0)
  assert found.text == (
    'num_classes: 3 (the labels hold 1 to 3 and void, 0; as classes.txt has'
    ' names; line 1 is void and no class)'
  )


def test_void_alone_in_the_class_range_is_told_of_the_other_setting(voc_folder):
  for path in (voc_folder / 'SegmentationClass').iterdir():
    write_label(
      voc_folder, path.stem, lambda label: np.minimum(label, 1, out=label)
    )
  (voc_folder / 'classes.txt').write_text('ground\nbox\n')
  found = findings(voc_folder, ignore_label=0)
  same = found['labels that tell nothing apart']
  assert same.fatal
  assert same.examples == (
    '1 (box) is the only value besides void, 0, in train; if 0 marks a class,'
    ' set --config.data.ignore_label=255',
  )


def test_other_problems_are_filed_by_kind(voc_folder):
  Image.fromarray(np.float32([[0.5]])).save(
    image_path(voc_folder, 'train_0'), 'TIFF'
  )
  Image.new('L', (9, 7)).save(label_path(voc_folder, 'train_1'), 'JPEG')
  with Image.open(label_path(voc_folder, 'train_3')) as indexed:
    indexed.putpalette([10, 20, 30, 5, 5, 5, 0, 200, 0] + [7] * 759)
    indexed.save(label_path(voc_folder, 'train_3'))
  image_path(voc_folder, 'val_0').unlink()
  image_path(voc_folder, 'val_0').symlink_to('gone.jpg')
  found = findings(voc_folder, fatal=True)
  assert {title: finding.count for title, finding in found.items()} == {
    'images that cannot be read as what they show': 1,
    'labels that hold no class indices': 1,
    'palettes that give one index several colors': 1,
    'listed ids without exactly one image and a label': 1,
  }
  (palette,) = found['palettes that give one index several colors'].examples
  assert 'train_3.png: index 1 has the color 5 5 5' in palette
  (link,) = found['listed ids without exactly one image and a label'].examples
  assert 'a symbolic link to gone.jpg' in link


def info(*classes, **options):
  palette = np.zeros((len(classes), 3), np.uint8)
  return datasets.DatasetInfo('mini', classes, palette, **options)


def tally(*pixels, void=0):
  found = datasets.Tally(len(pixels), 255)
  found.class_pixels[:], found.void_pixels = pixels, void
  return found


def test_training_looks_at_tallies_in_the_words_of_the_survey():
  tallies = {'train': tally(5, 0, void=3), 'val': tally(2, 0, void=1)}
  with pytest.raises(errors.UserError) as caught:
    survey.check_tallies(info('bg', 'box'), tallies, 'train')
  assert str(caught.value) == (
    'config.data.train_split=train of mini: labels that tell nothing apart: 0'
    ' (bg) is the only value besides void, 255, in train; if 255 marks a class,'
    ' set --config.data.label_map=255:1'
  )
  tallies['train'] = tally(0, 0, void=3)
  with pytest.raises(errors.UserError, match='every pixel in train is void'):
    survey.check_tallies(info('bg', 'box'), tallies, 'train')


@pytest.mark.parametrize(
  'train, val, lines',
  [
    (tally(5, 1, void=3), tally(2, 1), []),
    (tally(5, 1), tally(2, 0), ['classes without a pixel: box in val']),
    (
      tally(5, 1),
      tally(0, 0, void=2),
      ['classes without a pixel: all 2 in val'],
    ),
    (
      tally(0, 5),
      tally(1, 1),
      [
        'labels that tell nothing apart: 1 (box) is the only value in train,'
        ' so there is nothing to learn',
        'classes without a pixel: bg in train',
      ],
    ),
  ],
)
def test_training_is_told_what_is_suspect(train, val, lines):
  tallies = {'train': train, 'val': val}
  found = survey.check_tallies(info('bg', 'box'), tallies, 'train')
  assert [finding.line for finding in found] == lines


@pytest.mark.parametrize(
  'size, kind',
  [
    ((63, 80), 'tiny'),
    ((64, 64), None),
    ((4096, 64), None),
    ((4097, 64), 'huge'),
    ((64, 4097), 'huge'),
  ],
)
def test_tiny_and_huge_images_are_named(voc_folder, size, kind):
  width, height = size
  write_list(voc_folder, 'train', ['train_0'])
  write_list(voc_folder, 'val', ['val_0'])
  for name in ('train_0', 'val_0'):
    Image.new('RGB', size).save(image_path(voc_folder, name))
    Image.new('L', size).save(label_path(voc_folder, name))
  found = survey.survey_folder(voc_folder, SPLITS).findings
  found = [f for f in found if f.title.startswith(('tiny', 'huge'))]
  if kind is None:
    assert not found
  else:
    (finding,) = found
    assert finding.title.startswith(kind) and not finding.fatal
    assert finding.count == 2
    assert finding.examples[0].endswith(f'train_0.jpg: {width}x{height}')


def test_ids_in_both_lists_are_counted(voc_folder):
  write_list(voc_folder, 'val', ['val_0', 'train_4', 'train_1'])
  ((title, finding),) = findings(voc_folder).items()
  assert title.startswith('ids in two lists') and finding.fatal
  assert finding.examples == (
    'train_1 in train and val',
    'train_4 in train and val',
  )


def test_ids_shared_in_another_spelling_are_found(voc_folder):
  write_list(voc_folder, 'val', ['val_0', 'train_4.jpg'])
  ((title, finding),) = findings(voc_folder).items()
  assert title.startswith('ids in two lists') and finding.fatal
  assert finding.examples == ('train_4 in train and val',)


def test_id_that_stands_twice_in_two_spellings_is_found(voc_folder):
  write_list(voc_folder, 'val', ['val_0', 'val_0.jpg'])
  (finding,) = findings(voc_folder).values()
  assert finding.examples == (
    "'val_0' stands twice in val, as 'val_0.jpg' too",
  )


def test_every_list_that_fails_is_named(voc_folder):
  (voc_folder / 'ImageSets' / 'Segmentation' / 'train.txt').unlink()
  write_list(voc_folder, 'val', ['val_0', 'val_0'])
  (finding,) = findings(voc_folder).values()
  assert finding.fatal and finding.count == 2
  assert 'train.txt: no such split' in finding.examples[0]
  assert "'val_0' stands 2 times" in finding.examples[1]


@pytest.mark.parametrize('part', ['', 'JPEGImages', 'SegmentationClass'])
def test_missing_part_of_the_folder_is_refused(voc_folder, part):
  path = voc_folder / part
  path.rename(path.with_name('elsewhere'))
  with pytest.raises(errors.UserError, match=f'^{path}'):
    survey.survey_folder(voc_folder, SPLITS)


def test_void_in_the_place_of_a_class_is_hinted_at():
  hint = '(if 255 marks a class, set --config.data.label_map=255:1)'
  third = {'train': tally(9, 0, 5, void=7), 'val': tally(9, 0, 5, void=7)}
  (found,) = survey.label_findings(info('a', 'b', 'c'), third, 'train')
  assert found.examples == (f'b in train {hint}', f'b in val {hint}')
  other = {'train': tally(9, 5), 'val': tally(9, 0, void=12)}
  (found,) = survey.label_findings(info('a', 'b'), other, 'train')
  assert found.examples == (f'b in val {hint}',) and not found.fatal
  other['train'] = tally(9, 5, void=1)  # there it means void
  (found,) = survey.label_findings(info('a', 'b'), other, 'train')
  assert found.examples == ('b in val',)


def test_void_that_is_a_class_in_some_files_is_hinted_at(voc_folder):
  others = 'train_0', 'train_2', 'train_4', 'train_5', 'val_0', 'val_1', 'val_2'
  for name in others:
    write_label(voc_folder, name, lambda x: np.place(x, x == 255, 0))
  for name in ('train_1', 'train_3'):
    write_label(voc_folder, name, lambda x: np.place(x, x > 0, 255))
  found = findings(voc_folder)[survey._HIDDEN]
  assert not found.fatal
  assert [name.rpartition('/')[2] for name in found.examples] == [
    'train_1.png',
    'train_3.png',
  ]
