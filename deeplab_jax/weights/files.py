"""What a file of weights is: told by its content, unpacked, or refused."""

import contextlib
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import near_file

SOURCES = (
  "'keras', hf://timm/REPOSITORY, a TF-slim checkpoint or its .tar.gz, an .h5"
  ' of Keras, a .safetensors of timm, or a workdir or checkpoint of this'
  ' project'
)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
  """Yields the file of the arrays: out of a tar file, or `path` itself.

  A TensorFlow checkpoint of version 2 is several files; it goes by what their
  names share.

  Raises:
    UserError: if an archive is damaged, has no checkpoint or more than one, or
      anything in it leads out of its folder.
  """
  found = re.fullmatch(r'(.+)\.(index|meta|data-\d+-of-\d+)', path.name)
  if found and path.with_name(f'{found[1]}.index').is_file():
    path = path.with_name(found[1])
  if path.is_file() and _is_archive(path):
    with tempfile.TemporaryDirectory() as folder:
      _extract(path, Path(folder))
      yield _only_checkpoint(path, Path(folder))
  else:
    yield path


def _is_archive(path: Path) -> bool:
  head = _read(path, 0, 512)
  return head[:2] == b'\x1f\x8b' or head[257:262] == b'ustar'


def _read(path: Path, start: int, count: int) -> bytes:
  """`count` bytes from `start`, or from the end if that is negative."""
  try:
    with path.open('rb') as file:
      size = file.seek(0, 2)
      file.seek(max(0, size + start) if start < 0 else start)
      return file.read(count)
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error


# Last bytes of a TensorFlow checkpoint, version 1, and of an index.
_TABLE = bytes.fromhex('57fb808b247547db')

# Beginnings of what is refused, and why.
_REFUSED = {
  b'': 'is empty',
  b'PK': 'is a zip file, as PyTorch and new Keras write; it may hold pickles'
  ' and is refused unseen. Save safetensors, or .h5 from Keras',
  b'\x80': 'is a pickle, which can run anything when it is opened, and is'
  ' refused unseen. Save it as safetensors',
  b'\x93NUMPY': 'is a single array',
  b'<': 'is a web page, not a download',
  b'version https://git-lfs': 'is a git-lfs pointer; fetch the file itself',
}


def kind_of(path: Path) -> str:
  """Tells 'TensorFlow', 'HDF5' or 'safetensors', whatever the name says.

  Raises:
    UserError: if it is none of them, or cannot be read.
  """
  if path.with_name(f'{path.name}.index').is_file():
    return 'TensorFlow'
  if path.is_dir():
    raise UserError(f'{path} is a folder without checkpoints of this project')
  if not path.exists():
    raise UserError(
      f'init_from: no file {path}{near_file(path)}; it may be {SOURCES}'
    )
  head = _read(path, 0, 32)
  if head.startswith(b'\x89HDF\r\n\x1a\n'):
    return 'HDF5'
  if head[8:9] == b'{':
    return 'safetensors'
  if _read(path, -8, 8) == _TABLE:
    return 'TensorFlow'
  for start, reason in reversed(_REFUSED.items()):
    if head.startswith(start) and (start or not head):
      raise UserError(f'{path} {reason}')
  raise UserError(
    f'{path} is truncated or of no known kind; it may be {SOURCES}'
  )


def _extract(archive: Path, folder: Path) -> None:
  """Unpacks the regular files; Python has filters for this from 3.11.4 on."""
  folder = folder.resolve()
  try:
    with tarfile.open(archive, 'r:*') as tar:
      for member in filter(tarfile.TarInfo.isfile, tar):
        target = (folder / member.name.lstrip('/')).resolve()
        if not target.is_relative_to(folder):
          raise UserError(
            f'{archive} is refused: {member.name} leads outside of its folder'
          )
        target.parent.mkdir(parents=True, exist_ok=True)
        with tar.extractfile(member) as source, target.open('wb') as file:
          shutil.copyfileobj(source, file)
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    reason = str(error).partition(':\n')[0]
    raise UserError(f'{archive} is truncated or damaged: {reason}') from error


def _only_checkpoint(archive: Path, folder: Path) -> Path:
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  found = [path.with_suffix('') for path in files if path.suffix == '.index']
  found = found or [path for path in files if path.suffix == '.ckpt']
  if len(found) != 1:
    names = ', '.join(path.name for path in found) or 'none'
    raise UserError(
      f'{archive} should hold one checkpoint (.ckpt, or .index and .data),'
      f' found {names}'
    )
  return found[0]
