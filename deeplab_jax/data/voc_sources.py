"""The files of PASCAL VOC 2012 and SBD: downloads, folders, archives, lists.

Archives are read in place. Unpacked, they would need their size again on the
disk, and half of an archive could pass for the whole.
"""

import hashlib
import io
import tarfile
from collections.abc import Container, Sequence
from os.path import basename, dirname, relpath
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from deeplab_jax.data.folder_files import find_root
from deeplab_jax.data.image_files import Made
from deeplab_jax.runtime import download, errors, files


class Source(NamedTuple):
  """An archive on the web; the size is in bytes."""

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

# Where each source may be below the user's folder, in order: what its folder
# contains, then archives. 'test' has VOC's test images; 'aug' has PNG masks
# instead of SBD's.
_DEVKITS = ('VOCdevkit/VOC2012/', 'VOC2012/', '')
_DATASETS = ('benchmark_RELEASE/dataset/', 'dataset/', '')
_LOCATIONS = {
  'voc': [*(f'{x}JPEGImages' for x in _DEVKITS), 'VOCtrainval*2012*.tar'],
  'test': ['VOC2012test*.tar', 'VOCtest*2012*.tar'],
  'aug': [f'{x}SegmentationClassAug' for x in reversed(_DEVKITS)],
  'sbd': [
    *(f'{x}cls' for x in _DATASETS),
    *(f'{x}benchmark_RELEASE/dataset/cls' for x in _DEVKITS),
    *('benchmark*.tgz', 'benchmark*.tar.gz'),
  ],
}

# The files that matter in each source.
_VOC_PARTS = {
  'image': 'JPEGImages/*.jpg',
  'mask': 'SegmentationClass/*.png',
  'list': 'ImageSets/Segmentation/*.txt',
}
_PARTS = {
  'voc': _VOC_PARTS,
  'test': _VOC_PARTS,
  'aug': {'mask': '*.png'},
  'sbd': {'image': 'img/*.jpg', 'mask': 'cls/*.mat', 'sbd list': '*.txt'},
}


def _made(
  location: str, source: Path | bytes, size: int, offset: int = 0, time: int = 0
) -> Made:
  """Stands for a file: so many bytes of another one, or `source` itself."""

  def read() -> bytes:
    if isinstance(source, bytes):
      return source
    try:
      with source.open('rb') as file:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
      raise errors.UnreadableError(
        f'{location}: cannot be read ({error.strerror}); replace the file'
      ) from error

  return Made(location, basename(location), (size, time), read)


Files = dict[tuple[str, str], Made]  # by part and id


def find_places(directory: str, more: bool) -> dict[str, Path]:
  """Finds 'voc' and 'test' in a folder, and if `more` 'aug' and 'sbd'.

  Raises `UserError` if the folder or VOC is missing.
  """
  root = find_root(directory)
  places = {'root': root}
  for source in _PARTS if more else ('voc', 'test'):
    found = [x for name in _LOCATIONS[source] for x in sorted(root.glob(name))]
    if found:
      inside = found[0].name in ('JPEGImages', 'cls')
      places[source] = found[0].parent if inside else found[0]
  if 'voc' not in places:
    raise errors.UserError(
      f'{root}: neither {SOURCES["voc"].name} nor VOCdevkit/VOC2012/JPEGImages '
      'is there; put one of them in, or leave config.data.dir empty to download'
    )
  return places


def state_of(places: dict[str, Path]) -> list[Any]:
  """Returns names, sizes and times of the files, which change if they do."""
  state: list[Any] = []
  for source, place in places.items():
    if place.is_file():
      stat = place.stat()
      state.append((place.name, stat.st_size, stat.st_mtime_ns))
    elif source != 'root':
      state += sorted(
        (relpath(dirname(file.origin), place), name, *file.state)
        for (_, name), file in find_files(source, place).items()
      )
  return state


def fetch(source: str, folder: Path) -> Path:
  """Downloads the archive of 'voc' or 'sbd', and returns its path."""
  urls, size, digest = SOURCES[source]
  advice = (
    f'try again, or get {SOURCES[source].name} elsewhere and put it into '
    f'{folder}, or into another folder and set config.data.dir to that'
  )
  return download.download(
    urls, digest=digest, size=size, directory=folder, advice=advice
  )


def find_files(
  source: str, place: Path, skip: Container[tuple[str, str]] = ()
) -> Files:
  """Finds the files of a source in a folder or a tar archive.

  Those of a compressed archive are kept in memory, except what is to `skip`.
  Raises `UserError` if the archive is truncated or damaged.
  """
  found: Files = {}
  if place.is_dir():
    for part, pattern in _PARTS[source].items():
      for path in filter(Path.is_file, place.glob(pattern)):
        size, time = path.stat().st_size, path.stat().st_mtime_ns
        found[part, path.stem] = _made(str(path), path, size, 0, time)
    return found
  with files.reading_archive(place), tarfile.open(place) as tar:
    compressed = not isinstance(tar.fileobj, io.BufferedReader)
    for member in filter(tarfile.TarInfo.isfile, tar):
      name = PurePosixPath(member.name)
      for part, pattern in _PARTS[source].items():
        if name.match(pattern) and (part, name.stem) not in skip:
          offset, size = member.offset_data, member.size
          file = tar.extractfile(member) if compressed else None
          data = file.read() if file else place
          found[part, name.stem] = _made(f'{place}/{name}', data, size, offset)
    # tarfile takes a damaged header for the end, which is a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise tarfile.ReadError(f'no header at byte {tar.offset}')
    while tar.fileobj.read(1 << 20):  # The checksum is at the end.
      pass
  return found


def read_list_file(list_file: str) -> list[str]:
  """Reads the ids; raises `UserError` if the file has none."""
  if not list_file:
    raise errors.UserError(
      "config.data.options.list is empty; 'voc2012_segmentation/list' needs a "
      'text file of the ids to train on'
    )
  try:
    data = files.read_bytes(Path(list_file).expanduser(), 2**28)
  except OSError as error:
    raise errors.UserError(
      f'config.data.options.list={list_file}: cannot be read ({error.strerror})'
    ) from error
  if not (ids := parse_ids(data)):
    raise errors.UserError(f'{list_file}: no id in it; list one a line')
  return ids


def parse_ids(data: bytes) -> list[str]:
  """Reads the first word of each line, without folder and suffix, each once."""
  text = data.decode('utf-8-sig', errors='replace').replace('\\', '/')
  words = [line.split()[0] for line in text.splitlines() if line.strip()]
  names = [word.rpartition('/')[2].partition('.')[0] for word in words]
  return list(dict.fromkeys(names))


def hold_out(ids: Sequence[str], share: float) -> tuple[list[str], list[str]]:
  """Splits a list in two: ids to train on, and the `share` to hold out.

  The latter are those with the lowest SHA-256, whatever the order of the ids.
  """
  errors.require(0 <= share < 1, 'must be in [0, 1)', share)
  ranked = sorted(ids, key=lambda x: hashlib.sha256(x.encode()).hexdigest())
  held = set(ranked[: round(share * len(ids))])
  if len(held) == len(ids):
    raise ValueError(f'{share} leaves none of {len(ids)} ids to train on')
  return [x for x in ids if x not in held], [x for x in ids if x in held]
