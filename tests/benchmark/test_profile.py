import functools

import jax
import numpy as np
import pytest

from deeplab_jax import deeplab_v3
from deeplab_jax.benchmark import profile
from deeplab_jax.benchmark.profile import operation_layers

pytestmark = pytest.mark.compiles

_HLO = """
HloModule jit_f

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %inner = f32[4]{0} add(%p, %p), metadata={op_name="jit(f)/Net/block/unit/add"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), metadata={op_name="x"}
  %copy.1 = f32[4]{0} copy(%x)
  %dot.2 = f32[4]{0} dot(%copy.1, %x), metadata={op_name="jit(f)/jvp(Net)/aspp/conv/dot_general"}
  %sum.3 = f32[4]{0} fusion(%dot.2), calls=%fused, metadata={op_name="jit(f)/jvp(jit(loss))/reduce_sum"}
  %dot.4 = f32[4]{0} dot(%sum.3, %x), metadata={op_name="jit(f)/transpose(jvp(Net))/aspp/conv/jit(relu)/max" stack_frame_id=3}
  ROOT %copy.5 = f32[4]{0} copy(%dot.4)
}
"""  # noqa: E501


def test_operations_have_the_layer_of_their_source():
  layers = operation_layers(_HLO)
  assert layers['inner'] == ('block/unit', False)
  assert layers['dot.2'] == ('aspp/conv', False)
  assert layers['dot.4'] == ('aspp/conv', True)
  assert layers['sum.3'] == ('reduce_sum', False)


def test_layers_computed_again_have_their_own_name():
  again = 'jit(f)/transpose(jvp(Net))/block/jvp(Net)/block/checkpoint/'
  again += 'rematted_computation/unit.apply/unit/norm/transpose()/mul'
  layers = operation_layers(
    f'  %mul.1 = f32[4]{{0}} add(%p, %p), metadata={{op_name="{again}"}}'
  )
  assert layers['mul.1'] == ('block/unit/norm', True)


def test_forms_of_a_platform_and_functions_of_a_unit_are_no_layers():
  path = 'jit(f)/jvp(Net)/block/unit1.<lambda>/unit1/conv/cond/branch_0_fun/dot'
  layers = operation_layers(
    f'  %dot.1 = f32[4]{{0}} dot(%p, %p), metadata={{op_name="{path}"}}'
  )
  assert layers['dot.1'] == ('block/unit1/conv', False)


def test_copies_belong_to_what_reads_them_else_to_what_they_read():
  layers = operation_layers(_HLO)
  assert layers['copy.1'] == ('aspp/conv', False)
  assert layers['copy.5'] == ('aspp/conv', True)


def test_a_profile_names_the_layers_of_the_network(random_variables):
  model = deeplab_v3('resnet18', width=0.125, aspp_features=8)
  variables = random_variables(model)
  apply = jax.jit(functools.partial(model.apply, train=False))
  images = np.zeros((1, 65, 65, 3), np.uint8)
  hlo = apply.lower(variables, images).compile().as_text()
  layers = profile.profile(lambda: apply(variables, images), hlo, calls=3)
  names = {layer.name for layer in layers}
  assert {'backbone/stem', 'backbone/block4/unit2/conv1', 'logits'} <= names
  assert not any(layer.backward for layer in layers)
  seconds = [layer.seconds for layer in layers]
  assert seconds == sorted(seconds, reverse=True)
  assert 0 < sum(seconds) < 10
