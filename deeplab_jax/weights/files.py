"""Which kind of weights a file holds: told by its content, never its name."""

import contextlib
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import near_file, reading_archive

SOURCES = (
  "'keras', hf://timm/REPOSITORY, a TF-slim checkpoint or its .tar.gz, an .h5"
  ' of Keras, a .safetensors of timm, or a workdir or checkpoint of this'
  ' project'
)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
  """Yields the file of the arrays: from a tar file, or `path` itself.

  Any file of a TensorFlow checkpoint of version 2 stands for the checkpoint.
  Raises `UserError` unless an archive is safe and holds one checkpoint.
  """
  part = re.fullmatch(r'(.+)\.(index|meta|data-\d+-of-\d+)', path.name)
  if part and path.with_name(f'{part[1]}.index').is_file():
    path = path.with_name(part[1])
  head = _ends(path)[0] if path.is_file() else b''
  if not (head.startswith(b'\x1f\x8b') or head[257:262] == b'ustar'):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    with reading_archive(path), tarfile.open(path) as tar:
      regular = filter(tarfile.TarInfo.isfile, tar)
      try:
        tar.extractall(folder, regular, filter='data')
      except tarfile.FilterError as error:
        raise UserError(f'{path} is refused: {error}') from error
    files = [x for x in sorted(Path(folder).rglob('*')) if x.is_file()]
    found = [x.with_suffix('') for x in files if x.suffix == '.index']
    found = found or [x for x in files if x.suffix == '.ckpt']
    if len(found) != 1:
      raise UserError(
        f'{path} should hold one checkpoint (.ckpt, or .index and .data), found'
        f' {", ".join(x.name for x in found) or "none"}'
      )
    yield found[0]


def _ends(path: Path) -> tuple[bytes, bytes]:
  """Returns the first 512 bytes of a file, and the last 8."""
  try:
    with path.open('rb') as file:
      head = file.read(512)
      file.seek(max(0, path.stat().st_size - 8))
      return head, file.read()
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error


# Last bytes of a TensorFlow checkpoint of version 1, and of an index.
_TABLE = bytes.fromhex('57fb808b247547db')

# Why a file is refused, by its first bytes.
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
  """Returns 'TensorFlow', 'HDF5' or 'safetensors', else raises `UserError`."""
  if path.with_name(f'{path.name}.index').is_file():
    return 'TensorFlow'
  if path.is_dir():
    raise UserError(f'{path} is a folder without checkpoints of this project')
  if not path.exists():
    raise UserError(
      f'init_from: no file {path}{near_file(path)}; it may be {SOURCES}'
    )
  head, end = _ends(path)
  if head.startswith(b'\x89HDF\r\n\x1a\n'):
    return 'HDF5'
  if head[8:9] == b'{':
    return 'safetensors'
  if end == _TABLE:
    return 'TensorFlow'
  for start, reason in _REFUSED.items():
    if head.startswith(start) and (start or not head):
      raise UserError(f'{path} {reason}')
  raise UserError(
    f'{path} is truncated or of no known kind; it may be {SOURCES}'
  )
