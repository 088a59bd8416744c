# dschat with CUDA. Build from the root of the repository:
#
#   docker build -t dschat .
#   docker run --rm --gpus all --ipc host -v "$PWD/output:/work/output" dschat doctor
#
# The devel image brings nvcc, with which DeepSpeed compiles its operators.
ARG CUDA_IMAGE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv
ENV PATH=$VIRTUAL_ENV/bin:$PATH
# Models, data and compiled operators; mount a volume here to keep them.
ENV DSCHAT_CACHE=/cache HF_HOME=/cache/huggingface
RUN python3 -m venv "$VIRTUAL_ENV"

# torch first: it is large and changes seldom, so that its layer is kept. TORCH may name another
# build, which must fit the driver.
ARG TORCH="torch>=2.11,<2.15"
RUN pip install --no-cache-dir "$TORCH"
COPY . /opt/dschat
RUN pip install --no-cache-dir "/opt/dschat[demo]"

WORKDIR /work
ENTRYPOINT ["dschat"]
CMD ["--help"]
