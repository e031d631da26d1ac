# syntax=docker/dockerfile:1
# Image of the server. For a GPU: docker build -t expertsteer/server:0.1.0 .
# Without one:                    docker build --build-arg TARGET=cpu -t expertsteer/server:0.1.0-cpu .
# Every step is a script in deploy/image/steps, which tests/deploy/test_image.py runs without a container engine.
# Tags are pinned. For builds that can be repeated to the byte, pin their digests: --build-arg GPU_BASE=NAME@sha256:...
ARG TARGET=gpu
ARG GPU_BASE=vllm/vllm-openai:v0.32.0
ARG CUDA_TOOLKIT=nvidia/cuda:13.0.2-devel-ubuntu22.04
ARG CPU_BASE=python:3.11-slim-bookworm
ARG CPU_TOOLKIT=python:3.11-bookworm

FROM ${CUDA_TOOLKIT} AS cuda-toolkit

# Where packages are installed and kernels compiled.
FROM ${CPU_TOOLKIT} AS toolkit-cpu

FROM ${GPU_BASE} AS toolkit-gpu
COPY --from=cuda-toolkit /usr/local/cuda-13.0 /opt/cuda-toolkit
ENV NVCC=/opt/cuda-toolkit/bin/nvcc

# A stage of this file, not an image.
# hadolint ignore=DL3006
FROM toolkit-${TARGET} AS packages
ARG TARGET
WORKDIR /build
COPY deploy/requirements deploy/requirements
RUN PIP_NO_CACHE_DIR=1 deploy/requirements/environment.sh "${TARGET}" /opt/expertsteer

FROM packages AS wheel
ARG TARGET
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY steering_kernels steering_kernels
COPY artifacts artifacts
COPY deploy/image deploy/image
RUN deploy/image/steps/kernels.sh "${TARGET}" /opt/expertsteer \
    && deploy/image/steps/wheel.sh /opt/expertsteer /build/dist

FROM ${CPU_BASE} AS base-cpu
# torch.compile needs a compiler when it runs, and vLLM uses it for some answers even with --enforce-eager. There is none
# here: everything runs as it is written, and vLLM says so in its log.
ENV TORCH_COMPILE_DISABLE=1

FROM ${GPU_BASE} AS base-gpu

# Likewise.
# hadolint ignore=DL3006
FROM base-${TARGET}
ARG TARGET
USER 0
COPY --from=packages /opt/expertsteer /opt/expertsteer
RUN --mount=type=bind,from=wheel,source=/build,target=/build \
    /build/deploy/image/steps/system.sh "${TARGET}" \
    && /build/deploy/image/steps/install.sh /opt/expertsteer /build/dist \
    && /build/deploy/image/steps/check.sh "${TARGET}" /opt/expertsteer \
    && /build/deploy/image/steps/account.sh

LABEL org.opencontainers.image.title="ExpertSteer server" \
      org.opencontainers.image.description="Per-request activation steering for any decoder LLM on unmodified vLLM" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# Everything that is written lies in two folders, so that the root file system may be read-only. USER is for programs that
# ask for the name of a user id that the image does not know.
ENV PATH=/opt/expertsteer/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    USER=expertsteer \
    HOME=/var/cache/expertsteer \
    TMPDIR=/var/cache/expertsteer \
    XDG_CACHE_HOME=/var/cache/expertsteer \
    XDG_CONFIG_HOME=/var/cache/expertsteer \
    HF_HOME=/var/cache/expertsteer/huggingface \
    VLLM_CACHE_ROOT=/var/cache/expertsteer/vllm \
    VLLM_CONFIG_ROOT=/var/cache/expertsteer/vllm \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/expertsteer/inductor \
    TRITON_CACHE_DIR=/var/cache/expertsteer/triton \
    CUDA_CACHE_PATH=/var/cache/expertsteer/cuda \
    FLASHINFER_WORKSPACE_BASE=/var/cache/expertsteer \
    NUMBA_CACHE_DIR=/var/cache/expertsteer/numba \
    MPLCONFIGDIR=/var/cache/expertsteer/matplotlib

WORKDIR /var/lib/expertsteer
USER 65532:65532
EXPOSE 8000
STOPSIGNAL SIGTERM
# Not by a name or a proxy of the environment. A start may download a model first.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["expertsteer"]
CMD ["demo", "--host", "0.0.0.0", "--show-log"]
