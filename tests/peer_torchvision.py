"""The time of torchvision's own DeepLab v3, in the faster memory format.

Run it in an environment with torch and torchvision, as the peer of a benchmark:

  python -m deeplab_jax.benchmark --mode=forward --crop=513 --batch=1 \
    --config.model.preset=torchvision --config.model.backbone=resnet50_v1 \
    --config.model.width=1 --config.model.aspp_features=256 \
    --config.model.multi_grid=1,1,1 --config.model.aspp_rates=12,24,36 \
    --config.model.decoder=conv --config.model.output_stride=8 \
    --peer='PYTHON tests/peer_torchvision.py --crop=513 --batch=1'
"""

import argparse
import json
import sys
import time
import types

# It declares operators that only a torchvision built for this torch has.
sys.modules['torchvision._meta_registrations'] = types.ModuleType('none')

import torch  # noqa: E402
from torchvision.models.segmentation import deeplabv3_resnet50  # noqa: E402


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--crop', type=int, default=513)
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--repeat', type=int, default=3)
  options = parser.parse_args()
  seconds = {}
  for layout in ('contiguous_format', 'channels_last'):
    torch.manual_seed(0)
    network = deeplabv3_resnet50(weights=None, weights_backbone=None).eval()
    form = {'memory_format': getattr(torch, layout)}
    network = network.to(**form)
    images = torch.randn(options.batch, 3, options.crop, options.crop).to(
      **form
    )
    times = []
    with torch.no_grad():
      for _ in range(1 + options.repeat):
        start = time.perf_counter()
        network(images)
        times.append(time.perf_counter() - start)
    seconds[layout] = min(times[1:])
  print(json.dumps({'seconds': min(seconds.values()), 'by_format': seconds}))


if __name__ == '__main__':
  main()
