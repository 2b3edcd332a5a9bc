r"""PASCAL VOC 2012, ResNet-50, as the TF-slim DeepLab v3 of the preset 'seed'.

It has that project's network, ImageNet weights, color jitter and training list,
of which a tenth is held out and evaluated on during training, and trains with
Adam at a constant rate. That project crops at the center, this recipe at
random; that one trains until it is stopped, this one for 60k steps. The list is
dataset/custom_train.txt of https://github.com/sthalles/deeplab_v3. The weights
are http://download.tensorflow.org/models/resnet_v2_50_2017_04_14.tar.gz, and
need `.[tf]`. Both are read from the current folder.

python -m deeplab_jax.main --config=voc_resnet50_seed --workdir=WORKDIR
python -m deeplab_jax.main --workdir=WORKDIR --mode=eval \
  --config.data.eval_split=val

Hardware, an estimate: one GPU with 24 GB, three to six hours (0.12 EFLOP).
Published, not ours, averages over the images of val: pixel accuracy 91, mean
accuracy 82, mIoU 74, frequency weighted IoU 86.
"""

from deeplab_jax.configure import from_recipe


def get_config():
  config = from_recipe('voc_resnet50')
  config.init_from = 'resnet_v2_50_2017_04_14.tar.gz'
  config.model.preset = 'seed'
  config.model.bn_decay = 0.997

  config.data.name = 'voc2012_segmentation/list'
  config.data.options.list = 'custom_train.txt'
  config.data.options.holdout = 0.1
  config.data.eval_split = 'holdout'
  # The jitter of TF-slim, which adds up to 32 of 255 to the brightness.
  config.data.color_jitter = (0.125, 0.5, 0.5, 0.2)

  config.train.batch_size = 8
  config.train.steps = 60_000

  config.optimizer.name = 'adam'
  config.optimizer.learning_rate = 1e-5
  config.optimizer.power = 0.0
  # That project has an L2 penalty that never enters its loss.
  config.optimizer.weight_decay = 0.0
  return config
