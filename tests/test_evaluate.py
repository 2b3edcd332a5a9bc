"""Evaluation against a plain loop over the images."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import make_config

from deeplab_jax import deeplab_v3, distributed, evaluate, metrics
from deeplab_jax.checkpoints import Checkpoints
from deeplab_jax.data import images
from deeplab_jax.data.transforms import pad_to
from deeplab_jax.errors import UserError


def padded_size(size, stride=16):
  """Whole strides and one pixel, as 513: where aligned corners are exact."""
  return tuple(1 + stride * ((n + stride - 2) // stride) for n in size)


def plain_measures(config, dataset, variables):
  """One image at a time, counted by numpy."""
  split, classes = config.data.eval_split, dataset.info.num_classes
  model = deeplab_v3(num_classes=classes, **config.model)
  apply = jax.jit(lambda x: model.apply(variables, x, train=False))
  confusion = np.zeros((classes, classes), np.int64)
  for record in dataset.source(split):
    image = images.decode_image(record['image'])
    label = images.decode_label(record['label'])
    height, width = label.shape
    padded = pad_to(image, label, padded_size(dataset.tally(split).max_size))[0]
    logits = np.asarray(apply(padded[None]))[0, :height, :width]
    valid = label != 255
    pairs = (label[valid], logits.argmax(-1)[valid])
    np.add.at(confusion, pairs, 1)
  return metrics.measures(confusion, dataset.info.classes)


@pytest.mark.parametrize(
  'split, batch_size', [('val', 3), ('train', 1), ('train', 8)]
)
def test_evaluation_equals_a_loop_over_the_images(trained, split, batch_size):
  config = make_config(
    trained.settings, data__eval_split=split, eval__batch_size=batch_size
  )
  dataset = evaluate.open_dataset(config, split)
  model = deeplab_v3(num_classes=dataset.info.num_classes, **config.model)
  with Checkpoints(trained.workdir) as saved:
    variables = saved.restore_variables(saved.latest_step)
  measures, picture = evaluate.evaluate_variables(
    evaluate.make_eval_step(model, dataset),
    distributed.replicate(variables),
    dataset,
    config,
    model.padded_size(dataset.tally(split).max_size),
  )
  assert measures.pop('images') == {'val': 3, 'train': 6}[split]
  expected = plain_measures(config, dataset, variables)
  assert set(measures) == set(expected)
  for key, value in expected.items():
    # Rounding may tip a pixel of some thousands over to another class.
    assert measures[key] == pytest.approx(value, abs=2e-3), key
  rows = dataset.tally(split).num_images
  assert picture.shape[0] > rows * 40 and picture.dtype == np.uint8


@pytest.mark.parametrize('panels', [0, 2])
def test_picture_holds_as_many_rows_as_asked_for(trained, panels):
  config = make_config(trained.settings, eval__panels=panels)
  dataset = evaluate.open_dataset(config, 'val')

  def eval_step(variables, batch):
    del variables
    return np.zeros((4, 4), np.int32) + 1, batch['label'] * 0

  _, picture = evaluate.evaluate_variables(
    eval_step, {}, dataset, config, dataset.tally('val').max_size
  )
  if panels == 0:
    assert picture is None
  else:
    heights = [
      images.decode_label(record['label']).shape[0]
      for record in dataset.source('val')
    ]
    assert picture.shape[0] == sum(heights[:2]) + 4  # and a line between


@pytest.mark.parametrize('name', ['best', 'latest', '6'])
def test_evaluating_a_checkpoint_repeats_its_measures(
  trained, tmp_path, capsys, name
):
  workdir = shutil.copytree(trained.workdir, tmp_path / 'w')
  (workdir / 'eval.json').unlink()
  config = make_config(trained.settings, eval__step=name)
  result = evaluate.evaluate(config, workdir)
  assert json.loads((workdir / 'eval.json').read_text()) == result
  assert (workdir / 'eval.png').exists()
  with Checkpoints(workdir) as saved:
    step = saved.step_named(name)
    assert result == {**saved.metadata(step)['measures'], 'step': step}
  table = capsys.readouterr().out
  assert table.startswith(f'step {step}, 3 images\n')
  assert f'{100 * result["miou"]:.2f}' in table


def test_unknown_step_is_named(trained):
  config = make_config(trained.settings, eval__step='5')
  with pytest.raises(UserError, match=r'config\.eval\.step=5 is not in'):
    evaluate.evaluate(config, trained.workdir)


def test_evaluation_without_a_split_says_how_to_name_one(trained):
  config = make_config(trained.settings, data__eval_split='')
  with pytest.raises(UserError, match=r'--config\.data\.eval_split=val'):
    evaluate.evaluate(config, trained.workdir)
