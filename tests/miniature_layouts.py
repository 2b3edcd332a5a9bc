"""Miniatures of data sets in the exact layouts in which they are published."""

import contextlib
import io
import json

import numpy as np
import tensorflow_datasets as tfds
from miniature import write_voc_folder
from PIL import Image

from deeplab_jax.data import images

# Where a box of class 1 and one of class 2 lie, as (left, top, right, bottom).
BOXES = {1: (4, 6, 20, 30), 2: (24, 10, 40, 34)}
SIZE = 40, 48  # height, width


def scene(seed, values=(0, 1, 2)):
  """An image and its label, whose ground and boxes have these values."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
  label = np.full(SIZE, values[0], np.uint8)
  for index, (left, top, right, bottom) in BOXES.items():
    label[top:bottom, left:right] = values[index]
  return image, label


def save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def write_pairs(root, image, mask, names, values=(0, 1, 2)):
  """Writes a scene for each name, which stands for {} in both paths."""
  for seed, name in enumerate(names):
    pixels, label = scene(seed, values)
    save(root / image.format(name), pixels)
    save(root / mask.format(name), label)


def folder(root, counts):
  return write_voc_folder(root, counts)


def images_masks(root, counts):
  """Flat folders: the split is a share by hash."""
  names = range(sum(counts.values()))
  write_pairs(root, 'images/img_{:03d}.jpg', 'masks/mask_{:03d}.png', names)
  (root / 'classes.txt').write_text('ground\nleft\nright\n')
  return root


def polygon(left, top, right, bottom):
  return [left, top, right, top, right, bottom, left, bottom]


def runs(mask):
  """The runs of a mask down its columns, the first of 0."""
  flat = mask.T.ravel()
  edges = np.flatnonzero(np.diff(flat)) + 1
  lengths = np.diff([0, *edges, flat.size]).tolist()
  return [0, *lengths] if flat[0] else lengths


def coco_content(names, seed=0):
  """The JSON of instances whose categories are 7 and 3, of names and BOXES."""
  images = [
    {'id': 100 + i, 'file_name': f'{name}.jpg', 'height': 40, 'width': 48}
    for i, name in enumerate(names)
  ]
  annotations = []
  for image in images:
    for category, index in ((3, 1), (7, 2)):
      left, top, right, bottom = box = BOXES[index]
      shape = [polygon(*box)]
      if category == 7:
        shape = {'size': [*SIZE], 'counts': runs(scene(0)[1] == 2)}
      annotations.append(
        {
          'id': len(annotations) + 1,
          'image_id': image['id'],
          'category_id': category,
          'iscrowd': 0,
          'bbox': [left, top, right - left, bottom - top],
          'area': (right - left) * (bottom - top),
          'segmentation': shape,
        }
      )
  categories = [
    {'id': 7, 'name': 'right', 'supercategory': 'box'},
    {'id': 3, 'name': 'left', 'supercategory': 'box'},
  ]
  return {
    'info': {},
    'licenses': [],
    'images': images,
    'annotations': annotations,
    'categories': categories,
  }


def coco(root, counts):
  for split, count in counts.items():
    names = [f'{split}{index:012d}' for index in range(count)]
    for seed, name in enumerate(names):
      save(root / f'{split}2017' / f'{name}.jpg', scene(seed)[0])
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco_content(names)))
  return root


def cityscapes(root, counts, kind='labelIds', values=(7, 26, 24)):
  """Road, a car and a person; what is above row 4 was out of the image."""
  for split, count in counts.items():
    for seed in range(count):
      name = f'{split}burg/{split}burg_{seed:06d}_000019'
      image, label = scene(seed, values)
      label[:4] = 3 if kind == 'labelIds' else 255
      save(root / 'leftImg8bit' / split / f'{name}_leftImg8bit.png', image)
      save(root / 'gtFine' / split / f'{name}_gtFine_{kind}.png', label)
      for other in ('color', 'instanceIds'):
        save(root / 'gtFine' / split / f'{name}_gtFine_{other}.png', image)
  return root


def ade20k(root, counts):
  for split, count in counts.items():
    part = {'train': 'training', 'val': 'validation'}[split]
    image = f'images/{part}/ADE_{split}_{{:08d}}.jpg'
    mask = f'annotations/{part}/ADE_{split}_{{:08d}}.png'
    write_pairs(root, image, mask, range(1, count + 1), (0, 1, 150))
  lines = ['Idx\tRatio\tTrain\tVal\tName']
  for index in range(1, 151):
    lines.append(f'{index} \t0.1\t9\t1\tthing {index}a, other name ')
  (root / 'objectInfo150.txt').write_text('\n'.join(lines) + '\n')
  return root


def mini_pet(root, counts, mask=None):
  """What TFDS prepares of `oxford_iiit_pet`, by its features and values."""
  features = {
    'image': tfds.features.Image(shape=(None, None, 3)),
    'label': tfds.features.ClassLabel(num_classes=37),
    'file_name': tfds.features.Text(),
    'segmentation_mask': mask
    or tfds.features.Image(shape=(None, None, 1), use_colormap=True),
  }

  def examples(count):
    for seed in range(count):
      image, label = scene(seed, (2, 1, 3))
      image = io.BytesIO(images.encode_image(image))
      label = io.BytesIO(images.encode_label(label))
      values = image, 0, f'{seed}.jpg', label
      yield seed, dict(zip(features, values, strict=True))

  with tfds.core.registered.skip_registration():

    class MiniPet(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('4.0.0')
      code_path = None

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {split: examples(count) for split, count in counts.items()}

      _generate_examples = None

  with contextlib.redirect_stdout(io.StringIO()):
    MiniPet(data_dir=root, file_format='array_record').download_and_prepare()
  return root
