# For machines with NVIDIA GPUs: PyTorch, CUDA, Transformer Engine and NVIDIA Apex come with NVIDIA's image.
# This file is linted; it has not been built yet, for no machine with Docker was at hand.
#
#     docker build --tag megatron-solopo .
#     docker run --gpus all --ipc=host --ulimit memlock=-1 --volume "$PWD:/work" megatron-solopo doctor
FROM nvcr.io/nvidia/pytorch:25.09-py3

# The image's own torch and Transformer Engine stay: pip must not replace them.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    HF_HUB_OFFLINE=1

WORKDIR /opt/megatron-solopo
COPY pyproject.toml setup.py README.md LICENSE ./
COPY megatron_solopo megatron_solopo
RUN python -c "import torch; print('torch==' + torch.__version__)" >/tmp/constraints.txt \
    && pip install --constraint /tmp/constraints.txt . \
    && rm /tmp/constraints.txt

WORKDIR /work
ENTRYPOINT ["megatron-solopo"]
CMD ["--help"]
