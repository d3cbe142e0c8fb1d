# The images of our own services, a target each: gateway, deployer, packager, trainer. One file, so that packager
# and deployer share the very stage that compiles llama.cpp. `docker compose build` builds what compose.yaml needs.
#
# Build options (compose.yaml passes them on from .env):
#   --secret id=ca,src=FILE          a CA bundle that the package clients shall trust, behind a proxy; in no image
#   --secret id=pip,src=FILE         pip's settings (index, no-index, credentials); in no image
#   docker/wheels/                   wheels put here are found by pip before any index
#   docker/hashes.txt                the digest of every file that pip may install, torch from TORCH_INDEX excepted
#   --build-arg TORCH_INDEX=URL      where torch comes from; empty: from where all else comes from (amd64: with CUDA)
#   --build-arg BASE_IMAGE=IMAGE     Debian 12, or what is built on it
#   --build-arg LLAMA_CPP_IMAGE=IMAGE  a ready llama.cpp instead of compiling it: /opt/llama.cpp as the stage lays it out
#
# Needs BuildKit, of Docker 20.10 or newer; no image but BASE_IMAGE is pulled.
ARG BASE_IMAGE=debian:bookworm-slim
ARG LLAMA_CPP_IMAGE=compiled

# Python, the user without rights, the folder it may write. libgomp1 and libstdc++6 are llama.cpp's.
FROM ${BASE_IMAGE} AS python
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 libstdc++6 python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && groupadd --gid 10001 web4lora \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/web4lora --shell /usr/sbin/nologin web4lora \
 && install -d -o web4lora -g web4lora -m 700 /var/lib/web4lora

# The same without what nothing needs at run time: package manager, Perl, translations, manuals. The list of packages
# stays, for scanners, and so do the licences.
FROM python AS trimmed
RUN find /usr/share/doc -type f ! -name copyright -delete \
 && rm -rf /usr/bin/perl* /usr/lib/*-linux-gnu/perl* /usr/share/perl* /usr/lib/*-linux-gnu/gconv /usr/lib/apt /usr/bin/apt* \
      /usr/share/locale /usr/share/i18n /usr/share/man /usr/share/info /usr/share/zoneinfo /var/cache/* /var/log/*

# What runs.
FROM scratch AS runtime
# hadolint ignore=DL3067
COPY --from=trimmed / /
COPY LICENSE /usr/share/doc/web4lora/LICENSE
ENV PATH=/opt/web4lora/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/web4lora \
    MPLCONFIGDIR=/tmp/matplotlib \
    WEB4LORA_HOME=/var/lib/web4lora \
    WEB4LORA_CACHE=/var/lib/web4lora/cache
LABEL org.opencontainers.image.vendor="Web4 LoRA Core" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
VOLUME /var/lib/web4lora
WORKDIR /var/lib/web4lora

# What builds: a virtual environment with what every service needs. What others made comes first, then ours, so a
# change of ours downloads nothing.
FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && python3 -m venv /opt/web4lora
WORKDIR /src
ENV PATH=/opt/web4lora/bin:$PATH
COPY docker/pip-install docker/requirements.py docker/hashes.txt docker/
COPY docker/wheels/ docker/wheels/
COPY constraints.txt ./
COPY proto/pyproject.toml proto/
COPY libs/chassis/pyproject.toml libs/chassis/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --locked pip \
 && docker/pip-install --needs proto libs/chassis

# llama.cpp from its pinned source, for any processor of this architecture. Kept in the builder's cache, so that only
# another source or other options compile again.
FROM build AS compiled
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY libs/llamacpp/pyproject.toml libs/llamacpp/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --needs libs/llamacpp
COPY proto proto
COPY libs libs
COPY docker/copy_llama_cpp.py docker/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --ours proto libs/chassis libs/llamacpp
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/llama.cpp,sharing=locked \
    WEB4LORA_CACHE=/llama.cpp docker/pip-install --run python -m web4lora_llamacpp build --portable \
 && python docker/copy_llama_cpp.py /llama.cpp /opt/llama.cpp

# hadolint ignore=DL3006
FROM ${LLAMA_CPP_IMAGE} AS llama.cpp

FROM build AS gateway-build
COPY services/gateway/pyproject.toml services/gateway/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --needs services/gateway
COPY proto proto
COPY libs/chassis libs/chassis
COPY services/gateway services/gateway
COPY docker/seal docker/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --ours proto libs/chassis services/gateway \
 && docker/seal web4lora_gateway.__main__

FROM runtime AS gateway
LABEL org.opencontainers.image.title="web4lora-gateway" \
      org.opencontainers.image.description="Runs the pipeline, dataset to tested deployment, durably"
COPY --from=gateway-build /opt/web4lora /opt/web4lora
USER 10001:10001
ENV WEB4LORA_GATEWAY_ADDRESS=0.0.0.0:8461
EXPOSE 8461
HEALTHCHECK --interval=15s --timeout=20s --start-period=90s --retries=3 \
    CMD ["python", "-m", "web4lora_chassis.rpc.healthcheck", "127.0.0.1:8461"]
CMD ["python", "-m", "web4lora_gateway"]

# Without the tools of llama.cpp that only packaging and training ask, and most of fontTools, which matplotlib needs for
# PDF and PostScript alone: the reports' pictures are PNG.
FROM build AS deployer-build
COPY --from=llama.cpp /opt/llama.cpp/bin /opt/llama.cpp/bin
RUN rm -f /opt/llama.cpp/bin/llama-imatrix /opt/llama.cpp/bin/llama-tokenize
COPY libs/llamacpp/pyproject.toml libs/llamacpp/
COPY services/deployer/pyproject.toml services/deployer/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --needs services/deployer libs/llamacpp --without cmake ninja
COPY proto proto
COPY libs libs
COPY services/deployer services/deployer
COPY docker/seal docker/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --ours proto libs/chassis libs/llamacpp services/deployer \
 && find /opt/web4lora/lib/python3*/site-packages/fontTools -mindepth 1 -maxdepth 1 -type d ! -name misc -exec rm -rf {} + \
 && docker/seal web4lora_deployer.__main__ web4lora_deployer.worker matplotlib.figure \
 && find /opt/web4lora -name __pycache__ -prune -exec rm -rf {} +

FROM runtime AS deployer
LABEL org.opencontainers.image.title="web4lora-deployer" \
      org.opencontainers.image.description="Puts a model into Ollama, Docker Model Runner or its own llama-server, and tests it" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT"
COPY --from=llama.cpp /opt/llama.cpp/LICENSE /usr/share/doc/llama.cpp/LICENSE
COPY --from=deployer-build /opt/llama.cpp/bin /opt/llama.cpp/bin
COPY --from=deployer-build /opt/web4lora /opt/web4lora
USER 10001:10001
# Its Python code is compiled at the first start, into the tmpfs: 40 MB less of image.
ENV WEB4LORA_LLAMA_CPP=/opt/llama.cpp/bin \
    WEB4LORA_DEPLOYER_ADDRESS=0.0.0.0:8464 \
    PYTHONPYCACHEPREFIX=/tmp/pycache
EXPOSE 8464
HEALTHCHECK --interval=15s --timeout=20s --start-period=90s --retries=3 \
    CMD ["python", "-m", "web4lora_chassis.rpc.healthcheck", "127.0.0.1:8464"]
CMD ["python", "-m", "web4lora_deployer"]

# torch, for the packager's converter and the CPU trainer, in one layer that both share while building.
FROM build AS torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${TORCH_INDEX}" ]; then docker/pip-install --index-url "${TORCH_INDEX}" --no-deps torch; fi \
 && docker/pip-install --locked torch

FROM torch AS packager-build
COPY libs/llamacpp/pyproject.toml libs/llamacpp/
COPY services/packager/pyproject.toml services/packager/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --needs services/packager libs/llamacpp --without cmake ninja
COPY proto proto
COPY libs libs
COPY services/packager services/packager
COPY docker/seal docker/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --ours proto libs/chassis libs/llamacpp services/packager \
 && docker/seal web4lora_packager.__main__ web4lora_packager.worker torch transformers

FROM runtime AS packager
LABEL org.opencontainers.image.title="web4lora-packager" \
      org.opencontainers.image.description="Merges, converts to GGUF, quantizes and checks" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT AND BSD-3-Clause"
COPY --from=llama.cpp /opt/llama.cpp /opt/llama.cpp
COPY --from=packager-build /opt/web4lora /opt/web4lora
USER 10001:10001
ENV WEB4LORA_LLAMA_CPP=/opt/llama.cpp/bin \
    WEB4LORA_LLAMA_CPP_SOURCE=/opt/llama.cpp/source \
    WEB4LORA_PACKAGER_ADDRESS=0.0.0.0:8463
EXPOSE 8463
HEALTHCHECK --interval=15s --timeout=20s --start-period=90s --retries=3 \
    CMD ["python", "-m", "web4lora_chassis.rpc.healthcheck", "127.0.0.1:8463"]
CMD ["python", "-m", "web4lora_packager"]

FROM torch AS trainer-build
COPY libs/llamacpp/pyproject.toml libs/llamacpp/
COPY services/trainer/pyproject.toml services/trainer/
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --needs services/trainer libs/llamacpp --without cmake ninja
COPY proto proto
COPY libs libs
COPY services/trainer services/trainer
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --ours proto libs/chassis libs/llamacpp services/trainer

# On the CPU alone, for machines without a native trainer. It keeps pip: base models may come as packages. llama.cpp
# is asked whether it will know a base, and which tokens it reads.
FROM runtime AS trainer
LABEL org.opencontainers.image.title="web4lora-trainer" \
      org.opencontainers.image.description="Trains LoRA adapters on the CPU" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT AND BSD-3-Clause"
COPY --from=llama.cpp /opt/llama.cpp /opt/llama.cpp
COPY --from=trainer-build /opt/web4lora /opt/web4lora
USER 10001:10001
ENV WEB4LORA_LLAMA_CPP=/opt/llama.cpp/bin \
    WEB4LORA_LLAMA_CPP_SOURCE=/opt/llama.cpp/source \
    WEB4LORA_TRAINER_ADDRESS=0.0.0.0:8462
EXPOSE 8462
HEALTHCHECK --interval=15s --timeout=20s --start-period=90s --retries=3 \
    CMD ["python", "-m", "web4lora_chassis.rpc.healthcheck", "127.0.0.1:8462"]
CMD ["python", "-m", "web4lora_trainer"]
