"""PASCAL VOC 2012 and SBD in miniature, in the files that people download.

Thirty drawn scenes take the names, the classes and the places of VOC's images:
some are in VOC only, some in SBD only, some in both with different masks, and
some of VOC val are in SBD.
"""

import dataclasses
import functools
import io
import pathlib
import tarfile

import cv2
import numpy as np
import scipy.io
import scipy.sparse
from PIL import Image

from deeplab_jax.data import datasets

NAMES = tuple(f'{2007 + i % 5}_{1000 + 37 * i:06d}' for i in range(30))
VOC_TRAIN = NAMES[:8]
VOC_VAL = NAMES[8:14]
SBD_TRAIN = (*NAMES[4:10], *NAMES[14:22])
SBD_VAL = (*NAMES[2:4], *NAMES[10:12], *NAMES[22:26])
UNLABELLED = NAMES[26:27]  # VOC has thousands of images without a mask
VOC_TEST = NAMES[27:30]
# (SBD train + SBD val + VOC train) minus VOC val
TRAINAUG = (*NAMES[:8], *NAMES[14:26])


@dataclasses.dataclass(frozen=True)
class Scene:
  """An image as JPEG bytes, and its masks uint8 [H, W]; SBD's has no void."""

  image: bytes
  voc_label: np.ndarray
  sbd_label: np.ndarray


@functools.cache
def scenes():
  """All scenes by name; 70 to 110 pixels high, 90 to 140 wide."""
  rng = np.random.default_rng(0)
  return {name: _scene(index, rng) for index, name in enumerate(NAMES)}


def _scene(index, rng):
  height, width = rng.integers((70, 90), (110, 140))
  image, label = _drawn(rng)
  image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
  label = cv2.resize(
    label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT
  )
  # One to one in a scene, and each class occurs in some scene.
  shifted = 1 + (label + 5 * index) % 20
  voc = np.where((label == 0) | (label == 255), label, shifted).astype(np.uint8)
  voc[0, :5] = 255
  sbd = np.where(voc == 255, 0, voc)
  sbd[-1, :5] = 1 + index % 20
  data = io.BytesIO()
  Image.fromarray(image).save(data, 'JPEG', quality=90)
  return Scene(data.getvalue(), voc, sbd)


def _drawn(rng):
  label = np.zeros((120, 160), np.uint8)
  for value in rng.choice(np.arange(1, 11), 4, replace=False).tolist():
    center, radius = (
      rng.integers((20, 20), (140, 100)),
      int(rng.integers(9, 30)),
    )
    cv2.circle(label, center.tolist(), radius + 2, 255, -1)
    cv2.circle(label, center.tolist(), radius, value, -1)
  colors = rng.integers(0, 256, (256, 3), np.uint8)
  noise = rng.integers(0, 30, (120, 160, 3), np.uint8)
  return np.minimum(colors[label], 225) + noise, label


def write_voc_devkit(folder, test=False):
  """Writes FOLDER/VOCdevkit/VOC2012 and returns that path.

  Args:
    folder: made if it is not there.
    test: whether to add the images and the list of test.
  """
  root = pathlib.Path(folder) / 'VOCdevkit' / 'VOC2012'
  lists = {
    'train': VOC_TRAIN,
    'val': VOC_VAL,
    'trainval': sorted(VOC_TRAIN + VOC_VAL),
  }
  _write_images(root / 'JPEGImages', NAMES[:27])
  for name in lists['trainval']:
    write_mask(root, name, scenes()[name].voc_label)
  for split, names in lists.items():
    write_list(root, split, names)
  if test:
    _write_test(root)
  return root


def _write_test(root):
  _write_images(root / 'JPEGImages', VOC_TEST)
  write_list(root, 'test', VOC_TEST)


def _write_images(folder, names):
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    (folder / f'{name}.jpg').write_bytes(scenes()[name].image)


def write_list(root, split, names):
  """Writes ImageSets/Segmentation/SPLIT.txt below a VOC2012 folder."""
  path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{name}\n' for name in names))


def write_mask(root, name, label, part='SegmentationClass'):
  """Writes uint8 [H, W] as a PNG in the VOC palette below ROOT/PART."""
  path = root / part / f'{name}.png'
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(label, 'P')
  image.putpalette(datasets.voc_palette(256).tobytes())
  image.save(path)


def write_sbd(folder):
  """Writes FOLDER/benchmark_RELEASE/dataset and returns that path."""
  root = pathlib.Path(folder) / 'benchmark_RELEASE' / 'dataset'
  _write_images(root / 'img', SBD_TRAIN + SBD_VAL)
  (root / 'cls').mkdir()
  for name in SBD_TRAIN + SBD_VAL:
    write_mat(root / 'cls' / f'{name}.mat', scenes()[name].sbd_label)
  for split, names in (('train', SBD_TRAIN), ('val', SBD_VAL)):
    (root / f'{split}.txt').write_text(''.join(f'{name}\n' for name in names))
  return root


def write_mat(path, label):
  """Writes a mask uint8 [H, W] with the structure of SBD's files."""
  boundaries = np.empty((20, 1), object)
  for index in range(20):
    boundaries[index, 0] = scipy.sparse.csc_matrix(label == index + 1)
  values = {
    'Boundaries': boundaries,
    'Segmentation': label,
    'CategoriesPresent': np.unique(label[label > 0]).reshape(-1, 1),
  }
  scipy.io.savemat(path, {'GTcls': values}, do_compression=True)


def write_voc_tar(path, devkit=None):
  """Packs VOCtrainval: a new miniature, or a changed `write_voc_devkit`.

  Args:
    path: of the tar.
    devkit: the folder VOC2012.
  """
  if devkit is None:
    devkit = write_voc_devkit(_beside(path))
  return _pack(path, devkit.parent, 'VOCdevkit', 'w')


def write_voc_test_tar(path):
  """Packs VOC2012test: the images and the list of test."""
  root = _beside(path) / 'VOCdevkit' / 'VOC2012'
  _write_test(root)
  return _pack(path, root.parent, 'VOCdevkit', 'w')


def write_sbd_tgz(path):
  """Packs SBD."""
  dataset = write_sbd(_beside(path))
  return _pack(path, dataset.parent, 'benchmark_RELEASE', 'w:gz')


def _beside(path):
  return pathlib.Path(path).with_name(f'{pathlib.Path(path).name}.source')


def _pack(path, folder, name, mode):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as archive:
    archive.add(folder, name)
  return path


def write_segmentation_class_aug(root):
  """Writes ROOT/SegmentationClassAug, PNG masks as people share them.

  They are VOC's masks, and SBD's where VOC has none, of trainaug and val.
  """
  for name in TRAINAUG + VOC_VAL:
    scene = scenes()[name]
    voc = name in VOC_TRAIN + VOC_VAL
    label = scene.voc_label if voc else scene.sbd_label
    path = root / 'SegmentationClassAug' / f'{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path)  # gray, as people share them
