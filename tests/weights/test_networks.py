"""What a checkpoint is of: another network or other classes are named."""

import json

import pytest

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.networks import check_same_architecture, describe

MODEL = {
  'preset': 'paper',
  'backbone': 'resnet18',
  'width': 0.5,
  'output_stride': 16,
  'multi_grid': [1, 2, 4],
  'aspp_features': 8,
  'aspp_rates': [6, 12, 18],
  'decoder': 'none',
}
DATASET = {'classes': ['a', 'b'], 'name': 'x'}


@pytest.mark.parametrize(
  'changes, classes, words',
  [
    ({'backbone': 'resnet34'}, 'ab', 'backbone resnet18 there, resnet34 asked'),
    ({'width': 1.0}, 'ab', 'width 0.5 there, 1.0 asked for'),
    ({'aspp_features': 16}, 'ab', 'aspp_features 8 there, 16 asked for'),
    ({'aspp_rates': [6, 12, 24]}, 'ab', 'aspp_rates'),
    ({'multi_grid': [1, 1, 1]}, 'ab', 'multi_grid'),
    ({'decoder': 'conv'}, 'ab', 'decoder none there, conv asked for'),
    ({'preset': 'keras'}, 'ab', 'preset paper there, keras asked for'),
    ({}, 'abc', 'num_classes 2 there, 3 asked for'),
    ({}, 'ac', "class 'b' there, 'c' asked for"),
  ],
)
def test_another_architecture_is_named(changes, classes, words):
  asked = describe({**MODEL, **changes}, {'classes': list(classes)})
  with pytest.raises(UserError, match=words):
    check_same_architecture(describe(MODEL, DATASET), asked, 'w')


def test_settings_that_shape_no_variable_may_differ():
  asked = {**MODEL, 'output_stride': 8, 'aspp_rates': (6, 12, 18)}
  saved = json.loads(json.dumps(describe(MODEL, DATASET)))
  check_same_architecture(saved, describe(asked, DATASET), 'w')


def test_an_old_checkpoint_without_preset_and_decoder_has_those_of_the_paper():
  saved = describe({**MODEL, 'preset': 'paper'}, DATASET)
  asked = json.loads(json.dumps(saved))
  del saved['model']['preset'], saved['model']['decoder']
  check_same_architecture(saved, asked, 'w')
  asked['model']['preset'] = 'seed'
  with pytest.raises(UserError, match='preset paper there, seed asked for'):
    check_same_architecture(saved, asked, 'w')
