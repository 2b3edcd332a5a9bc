"""The archive of label maps that PASCAL VOC's test server takes."""

import gzip
import io
import os
import tarfile
from collections.abc import Iterable

from deeplab_jax.disk import replacing


def write_archive(
  path: str | os.PathLike,
  results: Iterable[tuple[str, bytes]],
  dataset: str = 'VOC2012',
) -> None:
  """Writes results/DATASET/Segmentation/comp6_test_cls/NAME.png.

  comp6 is the competition for training on any data. Equal results make equal
  bytes, and the file appears whole or not at all.

  Args:
    path: the .tar.gz to write.
    results: the name of each image and its palette PNG (mode P).
    dataset: as the server calls it.
  """
  with (
    replacing(path) as temporary,
    open(temporary, 'wb') as file,
    # A name or a time in the header would make two archives differ.
    gzip.GzipFile('', 'wb', fileobj=file, mtime=0) as packed,
    tarfile.open(fileobj=packed, mode='w') as archive,
  ):
    for name, png in results:
      entry = tarfile.TarInfo(
        f'results/{dataset}/Segmentation/comp6_test_cls/{name}.png'
      )
      entry.size = len(png)
      archive.addfile(entry, io.BytesIO(png))
