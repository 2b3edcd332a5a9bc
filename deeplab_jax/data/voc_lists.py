"""Lists of ids, as those of PASCAL VOC and what people share for it."""

from __future__ import annotations

import hashlib
import logging
import pathlib
from collections.abc import Sequence

from deeplab_jax.runtime import errors

log = logging.getLogger(__name__)


def refuse_val(train: Sequence[str], val: Sequence[str], origin: str) -> None:
  """Raises `UserError` if images to be scored on are to be trained on.

  Args:
    train: ids to train on.
    val: ids of VOC val.
    origin: where `train` stands, for the error.
  """
  shared = sorted(set(train).intersection(val))
  if shared:
    raise errors.UserError(
      f'{origin}: {len(shared)} of {len(train)} ids are images of VOC val, '
      f'which would make its score worthless: {some(shared)}; take them off '
      'the list'
    )


def hold_out(ids: Sequence[str], share: float) -> tuple[list[str], list[str]]:
  """Parts a list in two, the same way wherever its ids stand in it.

  Args:
    ids: all different.
    share: of the second part, in [0, 1).

  Returns:
    Those to train on, and those held out: the ones whose SHA-256 is lowest,
    `share` of them rounded. Both in the order of `ids`.

  Raises:
    UserError: if none is left to train on.
  """
  ranked = sorted(ids, key=lambda x: hashlib.sha256(x.encode()).hexdigest())
  held = set(ranked[: round(share * len(ids))])
  if len(held) == len(ids):
    raise errors.UserError(
      f'config.data.holdout={share} leaves none of {len(ids)} ids to train on'
    )
  return [x for x in ids if x not in held], [x for x in ids if x in held]


def read_list_file(list_file: str) -> tuple[str, ...]:
  """Reads the ids in a text file as `parse_ids` does, each once.

  Raises:
    UserError: if it cannot be read, or holds none.
  """
  if not list_file:
    raise errors.UserError(
      "config.data.list is empty; 'voc2012_segmentation/list' needs a text "
      'file of the ids to train on'
    )
  try:
    data = pathlib.Path(list_file).expanduser().read_bytes()
  except OSError as error:
    raise errors.UserError(
      f'config.data.list={list_file}: cannot be read ({error.strerror})'
    ) from error
  names = parse_ids(data)
  ids = dict.fromkeys(names)
  if not ids:
    raise errors.UserError(f'{list_file}: no id in it; list one a line')
  if len(ids) < len(names):
    log.warning(
      '%s: %d ids stand there more than once', list_file, len(names) - len(ids)
    )
  return tuple(ids)


def parse_ids(data: bytes) -> list[str]:
  """Reads the first word of each line, without its folder and suffix."""
  text = data.decode('utf-8-sig', errors='replace').replace('\\', '/')
  words = [line.split()[0] for line in text.splitlines() if line.strip()]
  return [word.rpartition('/')[2].partition('.')[0] for word in words]


def some(names: Sequence[str]) -> str:
  """Writes the first five."""
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
