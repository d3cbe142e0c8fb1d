# The real PostgreSQL, Debian's package, for where no image can be pulled; it takes the variables of the official image.
FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends postgresql-15 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/lib/postgresql/* \
 && install -d -o postgres -g postgres /var/lib/postgresql/data
COPY postgres-entrypoint /usr/local/bin/
ENV PATH=/usr/lib/postgresql/15/bin:$PATH
VOLUME /var/lib/postgresql/data
USER 101
ENTRYPOINT ["postgres-entrypoint"]
