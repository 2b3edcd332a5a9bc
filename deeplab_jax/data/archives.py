"""Files of a data set where they lie, in folders or in archives.

Archives are not unpacked: what is unpacked by half could pass for whole.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator

from deeplab_jax.runtime import errors

# What reading a truncated or damaged archive raises.
_BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError)
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ')


@dataclasses.dataclass(frozen=True)
class File:
  """A file in a folder or in an archive.

  Attributes:
    location: its place, as messages name it.
    size: in bytes.
    modified: when, in nanoseconds; of an archive's file 0.
    contents: reads it; may raise OSError.
  """

  location: str
  size: int
  modified: int
  contents: Callable[[], bytes] = dataclasses.field(repr=False)

  def __str__(self) -> str:
    return self.location

  @property
  def name(self) -> str:
    """The name without its folder."""
    return self.location.rpartition('/')[2]

  def read(self) -> bytes:
    """Returns the contents.

    Raises:
      UnreadableError: if they cannot be read.
    """
    try:
      return self.contents()
    except OSError as error:
      raise errors.UnreadableError(
        f'{self}: cannot be read ({error.strerror}); replace the file'
      ) from error


def files_in_folder(
  root: pathlib.Path,
  folders: Iterable[str],
  key: Callable[[str], Hashable | None],
) -> dict[Hashable, File]:
  """Finds the files in some folders below `root`.

  Args:
    root: a folder.
    folders: paths below it, '.' for itself; those not there hold nothing.
    key: of a file by its path below `root`, None if it is not wanted.

  Returns:
    The files by key.
  """
  found = {}
  for folder in folders:
    if not (root / folder).is_dir():
      continue
    for entry in os.scandir(root / folder):
      path = entry.name if folder == '.' else f'{folder}/{entry.name}'
      name = key(path)
      if name is not None and entry.is_file():
        stat = entry.stat()
        found[name] = File(
          str(root / path),
          stat.st_size,
          stat.st_mtime_ns,
          functools.partial(pathlib.Path.read_bytes, root / path),
        )
  return found


def files_in_archive(
  archive: pathlib.Path,
  key: Callable[[str], Hashable | None],
  spool_dir: str | os.PathLike[str],
) -> dict[Hashable, File]:
  """Finds the files in a tar.

  What is wanted of a compressed one is read at once, into a temporary file
  that no name leads to: it goes with the last `File`, and if the process dies.

  Args:
    archive: a tar, compressed or not.
    key: of a file by its path in the archive, None if it is not wanted.
    spool_dir: where the temporary file is written.

  Returns:
    The files by key.

  Raises:
    UserError: if the archive is truncated or damaged.
  """
  try:
    with archive.open('rb') as file:
      compressed = file.read(6).startswith(_COMPRESSED)
    if compressed:
      return _read_whole(archive, key, spool_dir)
    return _index(archive, key)
  except _BROKEN as error:
    if getattr(error, 'errno', None):
      raise errors.UserError(f'{archive}: {error.strerror}') from error
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise errors.UserError(
      f'{archive}: truncated or damaged archive ({reason}); download it again'
    ) from error


def _members(
  tar: tarfile.TarFile, key: Callable[[str], Hashable | None]
) -> Iterator[tuple[Hashable, tarfile.TarInfo]]:
  """Yields the files that are wanted with their keys."""
  while (member := tar.next()) is not None:
    name = key(member.name)
    if name is not None and member.isfile():
      yield name, member
    tar.members = []  # else it keeps them all


def _index(
  archive: pathlib.Path, key: Callable[[str], Hashable | None]
) -> dict[Hashable, File]:
  found = {}
  with tarfile.open(archive, 'r:') as tar:
    for name, member in _members(tar, key):
      found[name] = File(
        f'{archive}/{member.name}',
        member.size,
        0,
        functools.partial(_part, archive, member.offset_data, member.size),
      )
    # tarfile takes a broken header for the end, which is a block of zeros
    if any(_part(archive, tar.offset, tarfile.BLOCKSIZE)):
      raise tarfile.ReadError(f'no header at byte {tar.offset}')
  return found


def _part(path: pathlib.Path, offset: int, size: int) -> bytes:
  with path.open('rb') as file:
    file.seek(offset)
    data = file.read(size)
  if len(data) < size:
    raise tarfile.ReadError('unexpected end of data')
  return data


def _read_whole(
  archive: pathlib.Path,
  key: Callable[[str], Hashable | None],
  spool_dir: str | os.PathLike[str],
) -> dict[Hashable, File]:
  found = {}
  spool = tempfile.TemporaryFile(dir=spool_dir)  # noqa: SIM115
  with tarfile.open(archive, 'r:*') as tar:
    for name, member in _members(tar, key):
      offset = spool.tell()
      shutil.copyfileobj(tar.extractfile(member), spool)
      found[name] = File(
        f'{archive}/{member.name}',
        member.size,
        0,
        functools.partial(_pread, spool, member.size, offset),
      )
    while tar.fileobj.read(1 << 20):  # to the checksum at the end
      pass
  spool.flush()
  return found


def _pread(spool: tempfile._TemporaryFileWrapper, size: int, at: int) -> bytes:
  return os.pread(spool.fileno(), size, at)
