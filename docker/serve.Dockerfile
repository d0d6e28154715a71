# Talk to a trained model, on CPU, as a user without rights; the volume is what docker/train.Dockerfile or dev/runcpu.sh left.
#
#   docker build -f docker/serve.Dockerfile -t nanochat-serve .
#   docker run --init --rm --read-only --tmpfs=/tmp -v nanochat:/data -p 127.0.0.1:8000:8000 nanochat-serve
#   docker run --init --rm --read-only --tmpfs=/tmp -v nanochat:/data -p 127.0.0.1:8000:8000 nanochat-serve --source=rl
#
# It prints the address with its token (or give one: -e NANOCHAT_TOKEN=...). -p 127.0.0.1:8000:8000 shows it to this machine alone.
FROM rust:1-slim-bookworm AS rust

FROM python:3.12-slim-bookworm AS build
WORKDIR /nanochat
COPY . .
# hadolint ignore=DL3008
RUN --mount=type=bind,from=rust,source=/usr/local/rustup,target=/usr/local/rustup \
    apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf .git /var/lib/apt/lists/* \
    && PATH="$(echo /usr/local/rustup/toolchains/*/bin):$PATH" \
    && TORCH_BUILD=cpu PIP_NO_CACHE_DIR=1 bash dev/setup.sh

FROM python:3.12-slim-bookworm
RUN useradd --uid 1000 nanochat && mkdir /data && chown nanochat:nanochat /data
COPY --from=build /nanochat /nanochat
WORKDIR /nanochat
USER 1000
ENV NANOCHAT_BASE_DIR=/data PATH=/nanochat/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
VOLUME /data
EXPOSE 8000
ENTRYPOINT ["python", "-m", "scripts.chat_web", "--host=0.0.0.0"]
