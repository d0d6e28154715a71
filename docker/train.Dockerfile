# Train in a container, as a user without rights:
#
#   docker build -f docker/train.Dockerfile -t nanochat-train .
#   docker run --init --rm --gpus=all --ipc=host -v nanochat:/data nanochat-train
#   docker run --init --rm --gpus=all --ipc=host -v nanochat:/data -e STAGES="sft eval report" nanochat-train
#   docker run --init --rm -v nanochat:/data nanochat-train bash dev/runcpu.sh
#
# Build with --build-arg TORCH_BUILD=cpu, cu126 or rocm7.2 for other machines (AMD: --device=/dev/kfd --device=/dev/dri --group-add=video
# --group-add=render in place of --gpus). To stop it so that it saves: docker stop --timeout=300.
FROM rust:1-slim-bookworm AS rust

FROM python:3.12-slim-bookworm
ARG TORCH_BUILD=cu130
# A compiler for torch.compile and Triton; git for the commit in the records. Debian keeps no older versions to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 nanochat \
    && mkdir /data /nanochat \
    && chown nanochat:nanochat /data /nanochat
WORKDIR /nanochat
USER 1000
COPY --chown=nanochat:nanochat . .
# cargo and rustc are there for this step alone.
RUN --mount=type=bind,from=rust,source=/usr/local/rustup,target=/usr/local/rustup \
    PATH="$(echo /usr/local/rustup/toolchains/*/bin):$PATH" \
    && TORCH_BUILD="$TORCH_BUILD" PIP_NO_CACHE_DIR=1 bash dev/setup.sh
# docker-init passes signals on to the whole group: the ranks save, the script waits for them.
ENV NANOCHAT_BASE_DIR=/data \
    NANOCHAT_VENV=/nanochat/.venv \
    TINI_KILL_PROCESS_GROUP=1
VOLUME /data
CMD ["bash", "speedrun.sh"]
