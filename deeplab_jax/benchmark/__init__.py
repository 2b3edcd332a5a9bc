"""Speed and memory: python -m deeplab_jax.benchmark."""
