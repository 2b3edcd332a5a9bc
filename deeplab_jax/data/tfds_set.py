"""The layout of TFDS: any of its sets that has images and masks.

What TFDS prepared as array_record is read without TensorFlow.
"""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from deeplab_jax.data.image_files import Made
from deeplab_jax.data.records import Item, Listing, read_features
from deeplab_jax.runtime.errors import UserError, first_line


def tfds_set(
  name: str, root: Path, split: str, *, images: str = '', masks: str = ''
) -> Listing:
  """The set `name` in TFDS's folder `root`.

  A split may be a part, as 'train[:80%]'. `images` and `masks` are features, by
  default the only images of three channels and of one.
  """
  find = tfds.core.read_only_builder.builder_from_files
  try:
    builder = find(name, data_dir=root, file_format='array_record')
  except Exception as error:  # of many kinds
    raise UserError(
      f'{root}: holds no {name} as array_record ({first_line(error)}); where '
      'TensorFlow is installed, run tfds build --file_format=array_record '
      f'--data_dir={root} {name}'
    ) from error
  home, features = Path(builder.data_path), builder.info.features
  image = _feature('images', images, features, 3, ())
  mask = _feature('masks', masks, features, 1, ('segmentation_mask', 'label'))
  splits, raw = builder.info.splits, tfds.decode.DeserializeMethod.RAW_BYTES
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    source = builder.as_data_source(split, deserialize_method=raw)
  except Exception as error:  # of many kinds
    raise UserError(
      f'{home}: no split {split!r} ({first_line(error)}); known splits: '
      f'{", ".join(splits)}'
    ) from error
  ids = [
    f'{part.splitname}_{index:06d}'
    for part in parts
    for index in range(
      part.from_ or 0, part.to or splits[part.splitname].num_examples
    )
  ]
  stat = (home / 'dataset_info.json').stat()
  state = stat.st_size, stat.st_mtime_ns

  def made(index: int, feature: str) -> Made:
    def read() -> bytes:
      features = read_features(source, index, home)
      return features[feature].bytes_list.value[0]

    name = f'{ids[index]}.png'
    return Made(f'{home}: {feature} of {ids[index]}', name, state, read)

  return Listing(
    origin=f'{home}: {split}',
    found={
      x: Item(x, made(i, image), made(i, mask)) for i, x in enumerate(ids)
    },
    classes=getattr(features[mask], 'names', None) or home / 'classes.txt',
    name=name.partition('/')[0],
  )


def _feature(
  what: str, given: str, features: Any, channels: int, usual: tuple[str, ...]
) -> str:
  """Returns the feature that holds the images or masks, or `UserError`."""
  image = tfds.features.Image
  images = {k: x.shape[-1] for k, x in features.items() if isinstance(x, image)}
  found = [key for key in images if images[key] == channels]
  if len(found) > 1:
    found = [key for key in usual if key in found][:1]
  found = [given] if given else found
  if len(found) != 1 or found[0] not in images:
    raise UserError(
      f'config.data.options.{what}: name the feature that it is; images are '
      f'{", ".join(sorted(images)) or "none"}'
    )
  return found[0]
