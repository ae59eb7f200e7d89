# grove/pgtrickle-relay: the relay with every backend, on distroless Python, as a normal user.
#
# Debian's Python in distroless, not one of our own: its security updates come with the base image,
# and the whole stays below 50 MB (scripts/image-size).
ARG VERSION=0.29.0

FROM python:3.13-slim-trixie AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY locks locks
RUN pip install --no-cache-dir --require-hashes --no-deps --requirement locks/build.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY scripts/bundle.py scripts/bundle.py
COPY conf conf
COPY sql sql
COPY relay relay
# The same Python 3.13 and C library as in the final image, so that compiled modules fit.
RUN python scripts/bundle.py /app

FROM gcr.io/distroless/python3-debian13:nonroot
ARG VERSION
LABEL org.opencontainers.image.title="pgtrickle-relay" \
      org.opencontainers.image.description="Moves events between PostgreSQL and messaging systems" \
      org.opencontainers.image.source="https://github.com/grove/pgtrickle-relay" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=build /app /app
# Modules come from /app and the standard library, never from a directory that is mounted.
ENV PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER nonroot
EXPOSE 9090
ENTRYPOINT ["/usr/bin/python3.13", "-m", "relay"]
