"""Files written whole and read in bounds, locks, archives, similar names."""

import contextlib
import difflib
import errno
import fcntl
import json
import logging
import operator
import os
import re
import socket
import stat
import tarfile
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deeplab_jax.runtime.errors import UserError, first_line

log = logging.getLogger(__name__)

_START = time.strftime('%Y-%m-%d %H:%M:%S %Z')


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is in Google's object store, as gs://BUCKET/FOLDER is."""
  return str(path).startswith('gs://')


def as_path(name: str | os.PathLike) -> Path:
  """Returns a `Path`, or of gs:// what acts like one.

  Raises `UserError` if gcsfs is missing or, for a string, cannot reach it.
  """
  if not is_remote(name):
    return Path(name).expanduser()
  try:
    import fsspec
    import gcsfs  # noqa: F401
    from etils import epath

    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it raises them, too
    # Other hosts write there, and TensorStore.
    fsspec.config.conf['gs'] = {'use_listings_cache': False}
    _ = isinstance(name, str) and epath.Path(name).exists()
  except Exception as error:
    advice = "it needs access, and pip install 'deeplab_jax[gcs]'"
    raise UserError(f'{name}: {first_line(error)}; {advice}') from error
  return epath.Path(name)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
  """Yields a temporary name; what is written there replaces `path` at the end.

  If the body raises, `path` stays as it was. Errors name `path`.
  """
  if is_remote(path):  # where objects are put whole
    with tempfile.TemporaryDirectory() as near:
      yield (temporary := os.path.join(near, 'new'))
      as_path(path).write_bytes(Path(temporary).read_bytes())
    return
  folder, name = os.path.split(os.fspath(path))
  temporary = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  except BaseException as error:
    Path(temporary).unlink(missing_ok=True)
    unnamed = None, temporary
    if isinstance(error, OSError) and error.errno and error.filename in unnamed:
      error.filename = os.fspath(path)
    raise


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
  """Yields a temporary folder, which becomes `folder` if the body succeeds.

  Raises `UserError` if it cannot, or has files and not `replace`.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=f'.{folder.name}_', dir=folder.parent
    ) as temporary:
      staging = Path(temporary, 'new')
      staging.mkdir()
      yield staging
      if replace and folder.exists():
        folder.rename(Path(temporary, 'old'))
      staging.rename(folder)
  except OSError as error:
    raise UserError(f'{folder}: {error.strerror or error}') from error


def write(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes bytes, or text as UTF-8, whole or not at all."""
  data = data.encode() if isinstance(data, str) else data
  with replacing(path) as temporary:
    Path(temporary).write_bytes(data)


def read_bytes(path: Path, most: int = 2**20) -> bytes:
  """Reads a file that `check_regular` accepts."""
  if not is_remote(path):
    check_regular(path, most)
  with path.open('rb') as file:
    return file.read(most)


def check_regular(path: str | os.PathLike, most: int) -> None:
  """Raises `UserError` for what may block, have no end, or fill the memory."""
  state = os.stat(path)
  if not stat.S_ISREG(state.st_mode):
    raise UserError(f'{path}: not a regular file; put one there')
  if state.st_size > most:
    raise UserError(
      f'{path}: {state.st_size:,} bytes are too many, at most {most:,} are read'
    )


def append(path: Path, data: bytes) -> None:
  """Appends to a file whole or, as on a full disk, not at all."""
  if is_remote(path):
    path.write_bytes((path.read_bytes() if path.exists() else b'') + data)
    return
  with path.open('ab', buffering=0) as file:
    size = file.tell()
    if file.write(data) < len(data):
      file.truncate(size)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a value, arrays included, as indented JSON, whole or not at all.

  NaN and the infinities, which JSON does not know, become null.
  """
  write(path, json_text(value, indent=2) + '\n')


def json_text(value: Any, **options: Any) -> str:
  """Returns a value, arrays included, as JSON; NaN and the infinities as null.

  The `options` are those of `json.dumps`.
  """
  text = json.dumps(value, default=operator.methodcaller('tolist'))
  finite = json.loads(text, parse_constant=lambda _: None)
  return json.dumps(finite, **options)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[Any]:
  """Holds an exclusive lock between processes; a killed one releases it.

  Yields the lock file, `.NAME.lock`, open. It and its folder are made and stay.
  If another process has the lock, it waits for that or raises a `UserError`,
  which names the owner. Where the file system has no locks, a warning says so.
  Raises `OSError` if the file cannot be made.
  """
  folder = path.parent
  folder.mkdir(parents=True, exist_ok=True)
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # no pipe
  with open(os.open(path, flags, 0o666), 'rb+', buffering=0) as file:
    check_regular(path, 2**20)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if not wait:
        owner = file.read().decode('utf-8', 'replace') or 'another process'
        raise UserError(
          f'{folder} is in use by {owner}; use another --workdir or end that'
          ' run'
        ) from None
      name = path.name.removeprefix('.').removesuffix('.lock')
      log.info('waiting for another process that prepares %s', name)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      log.warning('%s cannot be locked: %s', folder, error.strerror)
    yield file


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """Holds a folder for this process, by `.lock` in it; a killed one frees it.

  Raises `UserError`, as `locked` does. A remote folder is taken from its owner,
  who learns it from `check_held`. What a killed `replacing` left is removed.
  """
  if is_remote(folder):
    log.warning('%s has no lock: a later run ends this one', folder)
    (folder / '.lock').write_text(_owner())
    yield
    return
  path, is_new = folder / '.lock', not folder.exists()
  with locked(path, wait=False) as file:
    try:
      file.truncate(0)
      file.write(_owner().encode())
    except OSError as error:
      raise UserError(f'{path}: {error.strerror}') from error
    try:
      check_held(folder)  # an owner may have removed it since it was opened
      for pattern in ('.*.tmp', '*/.*.tmp'):  # of `replacing`, when killed
        for left in folder.glob(pattern):
          left.unlink(missing_ok=True)
      yield
    finally:
      with contextlib.suppress(UserError, OSError):
        check_held(folder)
        path.unlink()
      if is_new:  # and nothing was written
        with contextlib.suppress(OSError):
          folder.rmdir()


def check_held(folder: Path) -> None:
  """Raises `UserError` unless `held` still holds a folder, as it was."""
  with contextlib.suppress(OSError):
    if (folder / '.lock').read_text('utf-8') == _owner():
      return
  raise UserError(f'{folder} was removed or taken by another run; start again')


def _owner() -> str:
  """This process, in words that no other one has."""
  return f'process {os.getpid()} on {socket.gethostname()} since {_START}'


@contextlib.contextmanager
def reading_archive(path: Path) -> Iterator[None]:
  """Raises `UserError` naming the tar file if it is truncated or damaged."""
  try:
    yield
  except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
    if isinstance(error, OSError) and error.errno:
      raise UserError(f'{error.filename or path}: {error.strerror}') from error
    reason = str(error).partition(':\n')[0] or type(error).__name__
    raise UserError(
      f'{path}: truncated or damaged archive ({reason}); download it again'
    ) from error


def near(name: str, others: Iterable[str]) -> str:
  """Returns '; there is X', where X are the names that may be meant, or ''.

  They differ in case, suffix, punctuation or an addition, else in few letters.
  """
  others = sorted(others)
  bare = _bare(name)
  found = [other for other in others if _bare(other) == bare]
  if not found and bare:
    longer = re.compile(re.escape(bare) + '[a-z]')
    found = [other for other in others if longer.match(_bare(other))]
  found = found or difflib.get_close_matches(name, others, 3, 0.75)
  return f'; there is {", ".join(found[:3])}' if found else ''


def near_file(path: Path) -> str:
  """Returns `near` for the names in the folder of a file."""
  with contextlib.suppress(OSError):  # the folder is missing or unreadable
    return near(path.name, (other.name for other in path.parent.iterdir()))
  return ''


def _bare(name: str) -> str:
  """What two spellings of one name share."""
  name = unicodedata.normalize('NFKC', name).casefold()
  name = re.sub(r'(\.[a-z][a-z0-9]{1,4})+$', '', name)
  return re.sub(r'\W|_|\b0+(?=\d)', '', name)
