"""What the TFDS builders of this package have in common."""

import tensorflow_datasets as tfds


def records_info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
  """Describes records of `image`, `label` (class indices) and `name`.

  The metadata is left to the builder: `info` (`DatasetInfo.to_json()`) and
  `splits`, a dict of `num_images` and `max_size` by split.
  """
  return tfds.core.DatasetInfo(
    builder=builder,
    description=type(builder).__doc__,
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(None, None, 3)),
        'label': tfds.features.Image(shape=(None, None, 1)),
        'name': tfds.features.Text(),
      }
    ),
    metadata=tfds.core.MetadataDict(),
  )
