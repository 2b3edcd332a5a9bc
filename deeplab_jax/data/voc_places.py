"""Where PASCAL VOC 2012 and SBD lie: on the web, and on this disk."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from deeplab_jax.runtime import errors
from deeplab_jax.runtime.files import near_file


@dataclasses.dataclass(frozen=True)
class Source:
  """A file on the web.

  Attributes:
    urls: the official address, then mirrors.
    size: in bytes.
    digest: as `download.download` takes it.
  """

  urls: tuple[str, ...]
  size: int
  digest: str

  @property
  def name(self) -> str:
    """The name of the file."""
    return self.urls[0].rpartition('/')[2]


SOURCES = {
  'voc': Source(
    (
      'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
      'https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar',
      'https://dataset.bj.bcebos.com/voc/VOCtrainval_11-May-2012.tar',
    ),
    1_999_639_040,
    'sha256:e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb',
  ),
  'sbd': Source(
    (
      'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/'
      'semantic_contours/benchmark.tgz',
    ),
    1_419_539_633,
    'md5:82b4d87ceb2ed10f6038a1cba92111cb',
  ),
}

# The folders that count, and the suffix of their files.
VOC_PARTS = {
  'JPEGImages': '.jpg',
  'SegmentationClass': '.png',
  'ImageSets/Segmentation': '.txt',
}
SBD_PARTS = {'img': '.jpg', 'cls': '.mat', '.': '.txt'}
AUG_PARTS = {'.': '.png'}


@dataclasses.dataclass(frozen=True)
class Places:
  """Where the data lie on this disk: folders and archives.

  Attributes:
    root: the folder that holds them.
    voc: the folder VOC2012, or its archive.
    test: the archive of the test images.
    aug: a folder of PNG masks for more images, in place of SBD.
    sbd: SBD's folder `dataset`, or its archive.
  """

  root: pathlib.Path
  voc: pathlib.Path
  test: pathlib.Path | None
  aug: pathlib.Path | None
  sbd: pathlib.Path | None


def find_places(directory: str, more_masks: bool) -> Places:
  """Looks what a folder holds: archives, or what they unpack to.

  Args:
    directory: the folder; may be VOCdevkit or VOC2012 itself.
    more_masks: whether to look for `aug` and `sbd`.

  Raises:
    UserError: if it is not there, or VOC is not in it.
  """
  root = pathlib.Path(directory).expanduser().resolve()
  if not root.is_dir():
    raise errors.UserError(
      f'{directory}: no such folder{near_file(root)}; set config.data.dir'
    )
  voc = _first_with(
    'JPEGImages', root / 'VOCdevkit' / 'VOC2012', root / 'VOC2012', root
  ) or _first_file(root, 'VOCtrainval*2012*.tar')
  if voc is None:
    raise errors.UserError(
      f'{root}: neither {SOURCES["voc"].name} nor VOCdevkit/VOC2012/JPEGImages '
      'is there; put one of them in, or leave config.data.dir empty to download'
    )
  test = _first_file(root, 'VOC2012test*.tar', 'VOCtest*2012*.tar')
  if not more_masks:
    return Places(root, voc, test, None, None)
  aug = _first_with('SegmentationClassAug', root, voc)
  sbd = _first_with(
    'cls',
    root / 'benchmark_RELEASE' / 'dataset',
    root / 'dataset',
    root,
    voc / 'benchmark_RELEASE' / 'dataset',
  ) or _first_file(root, 'benchmark*.tgz', 'benchmark*.tar.gz')
  return Places(root, voc, test, aug and aug / 'SegmentationClassAug', sbd)


def _first_with(part: str, *folders: pathlib.Path) -> pathlib.Path | None:
  return next((path for path in folders if (path / part).is_dir()), None)


def _first_file(root: pathlib.Path, *patterns: str) -> pathlib.Path | None:
  found = (path for name in patterns for path in sorted(root.glob(name)))
  return next(found, None)


def find_part(path: str, parts: Mapping[str, str]) -> tuple[str, str] | None:
  """Tells by the end of a path in which part the file lies, and its id.

  Args:
    path: in a folder or an archive.
    parts: for each folder the suffix of its files; '.' is any folder.
  """
  folder, _, file = f'/{path}'.rpartition('/')
  for part, suffix in parts.items():
    if file.endswith(suffix) and (part == '.' or folder.endswith(f'/{part}')):
      return part, file.removesuffix(suffix)
  return None
