"""Files from the web: fetched once, in parts if need be, never half."""

import functools
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deeplab_jax.disk import locked
from deeplab_jax.errors import UserError

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3  # without progress between them


def cache_dir() -> Path:
  """Where downloads are kept: `$XDG_CACHE_HOME/deeplab_jax`, or in ~/.cache."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return Path(home).expanduser() / 'deeplab_jax'


def download(url: str, md5: str, directory: str | Path | None = None) -> Path:
  """Returns a file from the web, out of the cache if it is whole there.

  The file appears under its name only when its hash is right. What a broken
  connection left is kept as `NAME.part`, and the next try goes on from there.
  Proxies are those of the environment (`https_proxy`, `no_proxy`).

  Args:
    url: http or https.
    md5: of the contents, in hexadecimal.
    directory: of the cache; None for `cache_dir()`.

  Raises:
    UserError: if the network fails, the disk does, or the hash is wrong.
  """
  folder = Path(directory or cache_dir())
  path = folder / url.rpartition('/')[2]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f'.{path.name}.lock'):
      if not (path.exists() and _md5(path) == md5):
        _fetch(url, path, md5)
  except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
    # an OSError with a file name is about the disk
    if getattr(error, 'filename', None) and not _is_http(error):
      raise UserError(f'{error.filename}: {error.strerror}') from error
    raise UserError(_advice(url, path, error)) from error
  return path


def _is_http(error: Exception) -> bool:
  return isinstance(error, urllib.error.HTTPError)


def _advice(url: str, path: Path, error: Exception) -> str:
  reason = getattr(error, 'reason', None) or str(error) or type(error).__name__
  kept = _size(_part(path))
  there = f' after {kept / 1e6:.1f} MB, which are kept' if kept else ''
  return (
    f'{url} cannot be downloaded{there}: {reason}; try again, or download it'
    ' elsewhere and name the file'
  )


def _fetch(url: str, path: Path, md5: str) -> None:
  """Downloads into `.part`, checks it, and moves it in place."""
  part = _part(path)
  while True:
    resumed = part.exists()
    _download(url, part)
    found = _md5(part)
    if found == md5:
      os.replace(part, path)
      return
    part.unlink()
    if not resumed:  # else the older part may be to blame
      raise UserError(
        f'{url} has the MD5 {found}, expected {md5}; it was not kept. A proxy'
        ' may have sent another page: download it elsewhere and name the file'
      )


def _part(path: Path) -> Path:
  return path.with_name(f'{path.name}.part')


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _download(url: str, part: Path) -> None:
  """Completes `part`; an interrupted connection is taken up again."""
  failures, size = 0, _size(part)
  while True:
    try:
      _receive(url, part)
      return
    except urllib.error.HTTPError:
      raise
    except (urllib.error.URLError, http.client.HTTPException, OSError):
      before, size = size, _size(part)
      failures = 0 if size > before else failures + 1
      if failures == _ATTEMPTS:
        raise


def _receive(url: str, part: Path) -> None:
  """Appends what is missing, or all if the server cannot give a range."""
  start = _size(part)
  request = urllib.request.Request(url)
  if start:
    request.add_header('Range', f'bytes={start}-')
  try:
    # `urlopen` would keep the proxies of its first call
    opener = urllib.request.build_opener()
    response = opener.open(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
      return  # it is complete, or not this file: the hash tells
    raise
  with response:
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
      start = 0
    length = int(response.headers.get('Content-Length') or 0)
    with (
      part.open('ab' if start else 'wb') as file,
      _progress(part.stem, start, start + length) as bar,
    ):
      while chunk := response.read(_CHUNK):
        file.write(chunk)
        bar.update(len(chunk))
      if length and file.tell() < start + length:
        raise http.client.IncompleteRead(b'', start + length - file.tell())


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


def _md5(path: Path) -> str:
  with path.open('rb') as file:
    # it guards against accidents alone, so FIPS systems may allow it
    digest = functools.partial(hashlib.md5, usedforsecurity=False)
    return hashlib.file_digest(file, digest).hexdigest()
