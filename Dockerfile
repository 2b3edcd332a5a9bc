# For CPUs:         docker build -t deeplab_jax .
# For NVIDIA GPUs:  docker build -t deeplab_jax:cuda --target cuda .
#
# The folder /work of a container is its home: mount a folder of yours there. It
# receives the workdirs, and the prepared and downloaded data.
#
#   docker run --rm -u $(id -u):$(id -g) -v $PWD:/work deeplab_jax --workdir=run
#
# GPUs need `--gpus=all` and the NVIDIA container toolkit; CUDA itself is in the
# image. Loader processes need `--shm-size=2g`.
FROM python:3.13-slim AS base
# FriBidi joins the letters of Arabic and Indian class names.
RUN apt-get update \
  && apt-get install -y --no-install-recommends libfribidi0 \
  && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml setup.py README.md LICENSE /source/
COPY deeplab_jax /source/deeplab_jax
COPY experiments /source/experiments
ENV HOME=/work
WORKDIR /work
ENTRYPOINT ["deeplab_jax"]
CMD ["--help"]

FROM base AS cuda
RUN pip install --no-cache-dir '/source[gpu]'

FROM base AS cpu
RUN pip install --no-cache-dir /source
# Huge pages, where Linux gives them on request, make a step on CPUs faster.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1
