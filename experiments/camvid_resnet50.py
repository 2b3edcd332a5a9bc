r"""CamVid, ResNet-50 from scratch at full resolution, in bfloat16, on a GPU.

CAMVID is the SegNet split (367 train, 101 val, 11 classes) in VOC layout.

python -m deeplab_jax.main --config=camvid_resnet50 \
  --config.data.dir=CAMVID --workdir=WORKDIR

Result: not run yet; RESULTS.md lists what has been run.
"""

from deeplab_jax import config as default


def get_config():
  config = default.get_config()
  config.model.backbone = 'resnet50'
  config.model.width = 1.0
  config.model.aspp_features = 256
  config.model.bn_decay = 0.99
  config.model.dtype = 'bfloat16'

  config.data.name = 'folder'
  config.data.crop_size = (353, 465)
  config.data.color_jitter = (0.4, 0.4, 0.4, 0.1)

  config.train.batch_size = 16
  config.train.steps = 10_000
  config.train.eval_every = 500
  config.train.log_every = 50

  config.optimizer.learning_rate = 0.05
  config.optimizer.weight_decay = 5e-4
  config.optimizer.warmup_steps = 500
  return config
