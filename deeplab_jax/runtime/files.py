"""Files written whole and read in bounds, locks, archives, similar names."""

import contextlib
import difflib
import fcntl
import logging
import os
import re
import stat
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from deeplab_jax.runtime.errors import UserError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
  """Yields a temporary name; what is written there replaces `path` at the end.

  If the body raises, `path` stays as it was. Errors name `path`.
  """
  folder, name = os.path.split(os.fspath(path))
  temporary = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  except BaseException as error:
    Path(temporary).unlink(missing_ok=True)
    if isinstance(error, OSError) and error.filename == temporary:
      error.filename = os.fspath(path)
    raise


def read_bytes(path: Path, most: int = 2**20) -> bytes:
  """Reads a file that `check_regular` accepts."""
  check_regular(path, most)
  return path.read_bytes()


def check_regular(path: str | os.PathLike, most: int) -> None:
  """Raises `UserError` for what may block, have no end, or fill the memory."""
  state = os.stat(path)
  if not stat.S_ISREG(state.st_mode):
    raise UserError(f'{path}: not a regular file; put one there')
  if state.st_size > most:
    raise UserError(
      f'{path}: {state.st_size:,} bytes are too many, at most {most:,} are read'
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds an exclusive lock between processes; a killed one releases it.

  The lock file, `.NAME.lock`, and its folder are made and stay. Raises
  `OSError` if they cannot be made.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      name = path.name.removeprefix('.').removesuffix('.lock')
      log.info('waiting for another process that prepares %s', name)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


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
