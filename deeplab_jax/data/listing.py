"""What a layout finds: the files of a split, and what their labels mean."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from deeplab_jax.data.records import Item
from deeplab_jax.runtime.errors import UserError


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
