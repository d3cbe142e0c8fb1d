# Ollama without root's rights: the image named, and a folder for its models that our user owns.
ARG OLLAMA_IMAGE=docker.io/ollama/ollama:0.34.1
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS folder
RUN install -d /models

# hadolint ignore=DL3006
FROM ${OLLAMA_IMAGE}
LABEL org.opencontainers.image.title="web4lora-ollama" \
      org.opencontainers.image.vendor="Web4 LoRA Core" \
      org.opencontainers.image.licenses="MIT"
COPY --from=folder --chown=10001:10001 /models /models
USER 10001:10001
ENV HOME=/models \
    OLLAMA_HOST=0.0.0.0:11434 \
    OLLAMA_MODELS=/models
EXPOSE 11434
VOLUME /models
HEALTHCHECK --interval=15s --timeout=20s --start-period=60s --retries=3 CMD ["ollama", "list"]
