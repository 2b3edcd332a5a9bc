"""Files from the web: fetched once, in parts if need be, never half."""

import errno
import hashlib
import http.client
import logging
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import locked

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3  # without progress between them


def cache_dir() -> Path:
  """Where downloads are kept: `$XDG_CACHE_HOME/deeplab_jax`, or in ~/.cache."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return Path(home).expanduser() / 'deeplab_jax'


class _WrongContentError(Exception):
  """An address gives another file."""


# HTTP and URL errors are OSErrors as well.
_FAILURES = (OSError, http.client.HTTPException, _WrongContentError)


def download(
  urls: Sequence[str],
  *,
  digest: str,
  size: int | None = None,
  directory: str | Path | None = None,
  advice: str,
) -> Path:
  """Returns a file from the web, out of the cache if it is whole there.

  The file appears under its name only when its digest is right. What a broken
  connection left is kept as `NAME.part`, and the next address or the next try
  goes on from there. Proxies are those of the environment (`https_proxy`,
  `no_proxy`).

  Args:
    urls: http or https addresses of the same file, tried in order; the first
      gives the name.
    digest: of the contents, 'md5:' or 'sha256:' and hexadecimal digits.
    size: in bytes, if it is known.
    directory: of the cache; None for `cache_dir()`.
    advice: what to do if no address gives the file, for the error.

  Raises:
    UserError: if no address gives the file, or the disk is full or fails.
  """
  folder = Path(directory or cache_dir())
  path = folder / urls[0].rpartition('/')[2]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f'.{path.name}.lock'):
      if not (path.exists() and _digest(path, digest) == digest):
        if size is not None:
          needed = missing_bytes(path, size)
          require_space(folder, needed, f'the download of {path.name}')
        _fetch(urls, path, digest, size, advice)
  except OSError as error:
    raise UserError(f'{error.filename or folder}: {error.strerror}') from error
  return path


def missing_bytes(path: Path, size: int) -> int:
  """How much of a file of `size` bytes `download` has still to write."""
  return 0 if _size(path) == size else max(size - _size(_part(path)), 0)


def require_space(
  folder: Path, needed: int, what: str, advice: str = 'make room there'
) -> None:
  """Raises `UserError` unless `needed` bytes are free for `what`.

  Args:
    folder: where it is to be written; may not be there yet.
    needed: in bytes.
    what: a noun, for the error.
    advice: what to do, for the error.
  """
  there = folder
  while not there.exists():
    there = there.parent
  free = shutil.disk_usage(there).free
  if free < needed:
    raise UserError(
      f'{folder}: {what} needs {_readable(needed)} of disk, but'
      f' {_readable(free)} are free; {advice}'
    )


def _readable(size: int) -> str:
  return f'{size / 1e9:.1f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def _fetch(
  urls: Sequence[str], path: Path, digest: str, size: int | None, advice: str
) -> None:
  """Tries the addresses in turn, and moves the file in place."""
  reasons = []
  for index, url in enumerate(urls, 1):
    log.info('downloading %s', url)
    try:
      _fetch_from(url, _part(path), digest, size)
    except _FAILURES as error:
      if _is_about_disk(error):
        raise
      reason = getattr(error, 'reason', None) or str(error)
      reason = ' '.join(str(reason or type(error).__name__).split())
      if index < len(urls):
        log.warning('%s: %s; trying the next address', url, reason)
      place = url if len(urls) == 1 else urllib.parse.urlsplit(url).netloc
      reasons.append(f'{place}: {reason}')
    else:
      os.replace(_part(path), path)
      return
  kept = _size(_part(path))
  there = f' after {kept / 1e6:.1f} MB, which are kept' if kept else ''
  raise UserError(
    f'{path.name} cannot be downloaded{there}: {"; ".join(reasons)}; {advice}'
  )


def _is_about_disk(error: Exception) -> bool:
  if isinstance(error, urllib.error.HTTPError):  # whose file name is the URL
    return False
  full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return bool(getattr(error, 'filename', None)) or (
    getattr(error, 'errno', None) in full
  )


def _fetch_from(url: str, part: Path, digest: str, size: int | None) -> None:
  """Completes `part` and checks it."""
  while True:
    resumed = part.exists()
    if size is None or _size(part) != size:
      _download(url, part, size)
    found = _digest(part, digest)
    if found == digest:
      return
    part.unlink()
    if not resumed:  # else the older part may be to blame
      kind, _, value = found.partition(':')
      raise _WrongContentError(
        f'has the {kind.upper()} {value}, expected {digest.partition(":")[2]};'
        ' it was not kept, a proxy may have sent another page'
      )


def _part(path: Path) -> Path:
  return path.with_name(f'{path.name}.part')


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _download(url: str, part: Path, size: int | None) -> None:
  """Completes `part`; an interrupted connection is taken up again."""
  if size is not None and _size(part) > size:
    part.unlink()
  failures, before = 0, _size(part)
  while True:
    try:
      _receive(url, part, size)
      return
    except urllib.error.URLError:  # it did not answer, or refused
      raise
    except (OSError, http.client.HTTPException) as error:
      if _is_about_disk(error):
        raise
      now = _size(part)
      failures, before = 0 if now > before else failures + 1, now
      if failures == _ATTEMPTS:
        raise


def _receive(url: str, part: Path, size: int | None) -> None:
  """Appends what is missing.

  Raises:
    _WrongContentError: if the length tells that it is another file; what was
      there stays.
  """
  start = _size(part)
  request = urllib.request.Request(url)
  if start:
    request.add_header('Range', f'bytes={start}-')
  try:
    # `urlopen` would keep the proxies of its first call
    opener = urllib.request.build_opener()
    response = opener.open(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    beyond = error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    if beyond and start and size is None:
      return  # it is complete, or not this file: the digest tells
    raise
  with response:
    partial = response.status == http.HTTPStatus.PARTIAL_CONTENT
    length = int(response.headers.get('Content-Length') or 0)
    total = length and length + (start if partial else 0)
    if size is not None and total not in (0, size):
      raise _WrongContentError(f'has {total} bytes, expected {size}')
    if size is None and 0 < total < start:
      return  # not this file either
    if not partial:  # without ranges; what is there is not given up for that
      _skip(response, start)
    with part.open('ab') as file, _progress(part.stem, start, total) as bar:
      while chunk := response.read(_CHUNK):
        file.write(chunk)
        bar.update(len(chunk))
      if file.tell() < (size or total):
        raise http.client.IncompleteRead(b'', (size or total) - file.tell())


def _skip(response: http.client.HTTPResponse, count: int) -> None:
  while count:
    chunk = response.read(min(count, _CHUNK))
    if not chunk:
      raise http.client.IncompleteRead(b'', count)
    count -= len(chunk)


def _progress(name: str, start: int, total: int) -> Any:
  # Imported here, so that `import deeplab_jax` stays fast.
  from tqdm import tqdm

  return tqdm(
    desc=name,
    initial=start,
    total=total or None,
    unit='B',
    unit_scale=True,
    disable=not sys.stderr.isatty(),
  )


def _digest(path: Path, like: str) -> str:
  """The digest of a file, of the kind and in the form of `like`."""
  kind = like.partition(':')[0]
  with path.open('rb') as file:
    # it guards against accidents too, so FIPS systems may allow MD5
    digest = hashlib.file_digest(
      file, lambda: hashlib.new(kind, usedforsecurity=False)
    )
  return f'{kind}:{digest.hexdigest()}'
