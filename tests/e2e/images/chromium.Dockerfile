# A real headless Chromium, Debian's package, which a test drives through its debugging port.
FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
USER 10001:10001
ENV HOME=/tmp
ENTRYPOINT ["chromium-headless-shell", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
