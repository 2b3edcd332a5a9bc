"""What a layout finds: the files of a split, and what their labels mean."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deeplab_jax.data.records import Item
from deeplab_jax.runtime.errors import UserError


class Made(NamedTuple):
  """What stands for an image or label file and is none, in an `Item`."""

  origin: str  # names it in messages
  name: str  # as the name of a file, without a folder
  state: tuple[Any, ...]  # plain JSON values; others if the content changes
  read: Callable[[], bytes]  # returns an image file, or raises `UserError`

  def __str__(self) -> str:
    return self.origin


def open_file(open_: Callable[..., Any], file: pathlib.Path | Made) -> Any:
  """Calls `open_picture`, `open_label` or their like."""
  if isinstance(file, Made):
    return open_(str(file), file.read())
  return open_(file)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Listing:
  """What a layout finds of a split: its files, and what their labels mean."""

  origin: object  # where the ids are listed, for messages
  found: Mapping[str, Item | UserError]  # by listed id; why one has no files
  classes: pathlib.Path | Sequence[str]  # lines as of classes.txt, or the file
  label_map: str = ''  # where `config.data.label_map` says nothing
  label_folder: pathlib.Path | None = None  # its first palette gives the colors
  name: str = ''  # of the data set; empty for that of its folder


# A function (root, split, **options) that finds the files of a data set. It
# raises `UserError` for an unknown or empty split, or wrong options.
Layout = Callable[..., Listing]
