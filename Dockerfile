# grove/pgtrickle-relay: the relay with every backend, on distroless Python, as a normal user.
ARG VERSION=0.29.0

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY pyproject.toml hatch_build.py README.md ./
COPY conf conf
COPY sql sql
COPY relay relay
# The same Python 3.11 as in the final image, so that compiled wheels fit.
RUN pip install --no-cache-dir --no-compile --target /app ".[all]" \
    && find /app -name tests -type d -prune -exec rm -rf {} + \
    && rm -rf /app/bin

FROM gcr.io/distroless/python3-debian12:nonroot
ARG VERSION
LABEL org.opencontainers.image.title="pgtrickle-relay" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=build /app /app
ENV PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER nonroot
EXPOSE 9090
ENTRYPOINT ["/usr/bin/python3.11", "-m", "relay"]
