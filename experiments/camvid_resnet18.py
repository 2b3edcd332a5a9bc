r"""CamVid, ResNet-18 of quarter width from scratch: half an hour on two cores.

CAMVID is the SegNet split (367 train, 101 val, 11 classes) in VOC layout.

python -m deeplab_jax.main --config=camvid_resnet18 \
  --config.data.dir=CAMVID --workdir=WORKDIR

Result by seed: val mIoU 50.6 to 51.4 and pixel accuracy 88.2 to 89.4; an
earlier run reached 53.5 and 89.5. See RESULTS.md.
"""

from deeplab_jax import config as default


def get_config():
  config = default.get_config()
  config.model.aspp_features = 128
  config.model.bn_decay = 0.95

  config.data.name = 'folder'
  config.data.scale = (0.75, 1.5)
  config.data.crop_size = (241, 321)

  config.train.steps = 750
  config.train.eval_every = 250
  config.train.log_every = 10

  config.optimizer.name = 'adam'
  config.optimizer.learning_rate = 0.003
  config.optimizer.weight_decay = 1e-5
  config.optimizer.warmup_steps = 30

  config.eval.batch_size = 4
  return config
