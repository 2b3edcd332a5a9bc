"""Export of a trained network: StableHLO, a TensorFlow SavedModel, or ONNX.

What is exported holds normalization, network, upsampling and argmax. It takes
`images`, uint8 RGB [B, H, W, 3] or as they are stored, and gives
`segmentation_map`, uint8 [B, H, W], and on request `probabilities`, float32
[B, H, W, C].
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax import ops
from deeplab_jax.data import bands, images, shapes
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.evaluation import windows
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.predict import Predictor
from deeplab_jax.runtime import distributed, host
from deeplab_jax.runtime.errors import UserError, check_choice, naming, require
from deeplab_jax.runtime.files import as_path, is_remote, new_folder, write_json
from deeplab_jax.weights import networks

Run = Callable[[np.ndarray], Mapping[str, Any]]  # from images to results
_SHAPE = 'b, {}, {}, {}'  # of images, by names where any number will do
_DTYPES = ('float32', 'float16', 'bfloat16')
_PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
_LARGEST = 1024  # height and width of the picture to compare on, at most


def export(config: ConfigDict, workdir: Path) -> Path:
  """Exports a checkpoint of `workdir` as `config.export` says.

  It writes the artifact, loads it again, compares it with the Predictor on a
  picture and prints the differences. Returns the folder of the artifact and its
  `manifest.json`. Raises `UserError`, with nothing written, for what is
  missing, impossible or there already.
  """
  settings = config.export
  folder = as_path(settings.output_dir or workdir / 'export' / settings.format)
  _check(settings, folder)
  networks.check_workdir(workdir)
  predictor = Predictor.from_config(config, workdir)
  if not distributed.is_first_process():
    return folder
  variables = jax.tree.map(
    lambda x: x.astype(settings.dtype if x.ndim == 4 else np.float32),
    predictor.variables,
  )
  network = Exportable(
    predictor.model,
    variables,
    size=settings.size,
    platforms=settings.platforms,
    probabilities=settings.probabilities,
    dtype=predictor.info.fill.dtype,
  )
  picture = _picture(config.data.dir, settings.size, predictor.info)
  with new_folder(folder) as staging, naming('config.export'):
    run = FORMATS[settings.format][0](network, staging)
    # Of an image at its own size, seen whole once, as the artifact sees it.
    parts = predictor.model, predictor.variables, predictor.info
    plain = Predictor(*parts, window=max(picture.shape))
    compared = compare(run, plain, picture)
    manifest = _manifest(settings, predictor, staging)
    write_json(staging / 'manifest.json', {**manifest, 'compared': compared})
  size = 'x'.join(map(str, settings.size)) or 'any size'
  print(f'step {predictor.step} as {settings.format} in {folder}')
  print(f'{size}, {settings.dtype} kernels; compared with the Predictor:')
  shown = ', '.join(f'{key} {value:.6g}' for key, value in compared.items())
  print(shown.replace('_', ' '), flush=True)
  return folder


@dataclasses.dataclass(frozen=True)
class Exportable:
  """A network, and what is to be exported of it."""

  model: DeepLabV3
  variables: Mapping[str, Any]  # numpy arrays; kernels of any float type
  size: tuple[int, ...] = ()  # height and width of the images; empty for any
  platforms: tuple[str, ...] = ('cpu', 'cuda', 'tpu')
  probabilities: bool = False
  dtype: Any = np.uint8  # of the images

  @property
  def shape(self) -> str:
    """The shape of the images, for JAX."""
    return _SHAPE.format(*(self.size or 'hw'), len(self.model.mean))

  def segment(
    self, variables: Mapping[str, Any], images: jax.Array
  ) -> dict[str, jax.Array]:
    """The function to export, made of XLA's own operations alone."""
    with ops.use('xla'):
      logits: Any = self.model.apply(variables, images, train=False)
    result = {'segmentation_map': jnp.argmax(logits, -1).astype(jnp.uint8)}
    if self.probabilities:
      result['probabilities'] = jax.nn.softmax(logits)
    return result


def write_stablehlo(network: Exportable, folder: Path) -> Run:
  """Writes `model.stablehlo` for `jax.export`; returns it, loaded."""
  shape = jax.export.symbolic_shape(network.shape)
  segment = jax.jit(functools.partial(network.segment, network.variables))
  exported = jax.export.export(segment, platforms=network.platforms)(
    jax.ShapeDtypeStruct(shape, network.dtype)
  )
  path = folder / 'model.stablehlo'
  path.write_bytes(exported.serialize())  # by flatbuffers
  return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def write_savedmodel(network: Exportable, folder: Path) -> Run:
  """Writes a SavedModel of TensorFlow into the folder 1; returns it, loaded.

  The signature `predict_images` takes `images`, and `predict_bytes` takes
  `image_bytes`, encoded JPEG or PNG images of one size, if these are RGB.
  """
  import tensorflow as tf  # the extra 'tf'
  from jax.experimental import jax2tf

  channels, kind = len(network.model.mean), tf.as_dtype(network.dtype)
  spec = tf.TensorSpec([*(network.size or (None, None)), channels], kind)
  batch = tf.TensorSpec([None, *spec.shape], kind, 'images')
  encoded = tf.TensorSpec([None], tf.string, 'image_bytes')
  weights = tf.nest.map_structure(tf.Variable, network.variables)
  segment = jax2tf.convert(
    network.segment,
    polymorphic_shapes=[None, network.shape],
    with_gradient=False,
    native_serialization_platforms=network.platforms,
  )
  decode = functools.partial(
    tf.io.decode_image, channels=3, expand_animations=False
  )
  function = functools.partial(tf.function, autograph=False)
  predict_images = function(
    lambda images: segment(weights, images), input_signature=[batch]
  )
  predict_bytes = function(
    lambda image_bytes: predict_images(
      tf.map_fn(decode, image_bytes, fn_output_signature=spec)
    ),
    input_signature=[encoded],
  )
  module = tf.Module()
  module.weights = tf.nest.flatten(weights)
  signatures = {
    'serving_default': predict_images,
    'predict_images': predict_images,
  }
  if (channels, kind) == (3, tf.uint8):
    signatures['predict_bytes'] = predict_bytes
  # Older TensorFlow reads version 9 and no later one.
  version = 'jax_export_calling_convention_version'
  default = getattr(jax.config, version)
  jax.config.update(version, 9)
  try:
    tf.saved_model.save(module, folder / '1', signatures)
  finally:
    jax.config.update(version, default)
  loaded = tf.saved_model.load(folder / '1')
  return lambda images: loaded.signatures['predict_images'](
    images=tf.constant(images)
  )


def write_onnx(network: Exportable, folder: Path) -> Run:
  """Writes `model.onnx`; returns it, loaded by onnxruntime."""
  import onnxruntime  # the extra 'onnx'

  from deeplab_jax.weights.onnx import onnx_model

  made = onnx_model(
    network.model,
    network.variables,
    size=network.size,
    probabilities=network.probabilities,
    dtype=network.dtype,
  )
  path = folder / 'model.onnx'
  path.write_bytes(made.SerializeToString())
  session = onnxruntime.InferenceSession(
    path, providers=['CPUExecutionProvider']
  )
  names = [output.name for output in session.get_outputs()]
  return lambda images: dict(
    zip(names, session.run(names, {'images': images}), strict=True)
  )


# How to write each format, its extra, the packages of that, what will load it.
FORMATS: dict[str, tuple[Callable[..., Run], str, tuple[str, ...], str]] = {
  'stablehlo': (
    *(write_stablehlo, '', ()),
    'jax that is at most 6 months newer or 3 weeks older than in versions',
  ),
  'savedmodel': (
    *(write_savedmodel, 'tf', ('tensorflow',)),
    'TensorFlow that reads version 9 of XlaCallModule, at least 6 months long',
  ),
  'onnx': (
    *(write_onnx, 'onnx', ('onnx', 'onnxruntime')),
    'all that reads opset 17 of ONNX',
  ),
}


def _check(settings: ConfigDict, folder: Path) -> None:
  """Raises `UserError` for what cannot be done, before anything is."""
  size, here = settings.size, jax.default_backend().replace('gpu', 'cuda')
  with naming('config.export'):
    check_choice('format', settings.format, FORMATS)
    check_choice('dtype', settings.dtype, _DTYPES)
    fits = all(isinstance(n, int) and n >= 1 for n in size)
    rule = 'size must be height,width from 1, or empty for any size'
    require(fits and len(size) in (0, 2), rule, size)
    for platform in settings.platforms:
      check_choice('platforms', platform, _PLATFORMS)
    rule = f'platforms must include {here}, where the artifact is tried'
    require(here in settings.platforms, rule, settings.platforms)
  _, extra, packages, _ = FORMATS[settings.format]
  for package in packages:
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f'config.export.format={settings.format} needs {package}: pip install'
        f" 'deeplab_jax[{extra}]'"
      )
  if is_remote(folder):
    raise UserError(f'{folder}: give a local --config.export.output_dir=DIR')
  if folder.exists():
    raise UserError(
      f'{folder} exists; remove it, or name another folder:'
      ' --config.export.output_dir=DIR'
    )


def _picture(
  directory: str | None, size: tuple[int, ...], info: DatasetInfo
) -> np.ndarray:
  """A picture of the data set's folder, else a drawn one, [H, W, C]."""
  rng = np.random.default_rng(0)
  picture, _ = shapes.generate_scene(rng)
  if info.mean:
    noise = rng.normal(info.mean, info.std, (*picture.shape[:2], len(info.std)))
    picture = np.clip(noise, 0, 2**info.bits - 1).astype(info.fill.dtype)
  with contextlib.suppress(UserError):
    if directory:
      path = images.list_images([directory], bands.SUFFIXES)[0]
      picture = images.as_pixels(path, info)
  picture = picture[:_LARGEST, :_LARGEST]
  return windows.resized(picture, (size[0], size[1])) if size else picture


def compare(
  run: Run, predictor: Predictor, picture: np.ndarray
) -> dict[str, float]:
  """Compares an artifact with the Predictor on a picture [H, W, C].

  Returns the share of pixels of equal classes; by how much, at most, the
  Predictor's probability of its own class exceeds that of the artifact's; and
  the largest difference of a probability, if the artifact gives them.
  """
  labels, probabilities = predictor(picture, probabilities=True)
  found = {key: np.asarray(x)[0] for key, x in run(picture[None]).items()}
  own = found['segmentation_map']
  chosen = np.take_along_axis(probabilities, own[..., None].astype(int), -1)
  result = {
    'equal_classes': (own == labels).mean(),
    'largest_preference': (probabilities.max(-1) - chosen[..., 0]).max(),
  }
  if 'probabilities' in found:
    differences = np.abs(found['probabilities'] - probabilities)
    result['largest_difference'] = differences.max()
  return {key: float(value) for key, value in result.items()}


def _manifest(
  settings: ConfigDict, predictor: Predictor, folder: Path
) -> dict[str, Any]:
  """What a program has to know to use the files of a folder, as JSON values."""
  _, _, packages, loads_in = FORMATS[settings.format]
  model = predictor.model
  files = [path for path in folder.rglob('*') if path.is_file()]
  hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
  names = [str(path.relative_to(folder)) for path in files]
  outputs = {'segmentation_map': 'uint8 [B, H, W]'}
  if settings.probabilities:
    outputs['probabilities'] = 'float32 [B, H, W, C]'
  packages = 'deeplab_jax', 'jax', 'jaxlib', 'flax', *packages
  info = predictor.info
  kind = f'uint{info.bits} {"as stored" if info.mean else "RGB"}'
  return {
    'format': settings.format,
    'sha256': dict(zip(names, hashes, strict=True)),
    'inputs': {'images': f'{kind} [B, H, W, {len(info.fill)}]'},
    'outputs': outputs,
    'size': settings.size or None,
    'normalization': {'mean': model.mean, 'std': model.std, 'inside': True},
    'dataset': predictor.info.to_json(),
    'trained_size': predictor.trained_size,
    'network': predictor.settings,
    'kernels': settings.dtype,
    'platforms': settings.platforms,
    'checkpoint': {'step': predictor.step, 'metrics': predictor.metrics},
    'date': datetime.datetime.now(datetime.UTC).isoformat(' ', 'seconds'),
    'versions': host.versions(*packages),
    'loads_in': loads_in,
  }
