# The image of `ormo-server`. Built from the root of the tree:
#
#   docker build -f deploy/docker/server.Dockerfile -t ormo-server .
#
# Without TORCH_INDEX_URL pip takes PyTorch from its default index, where the x86 build for Linux brings CUDA's
# libraries: it works, and is several GB larger than need be. For the CPU build pass the address of PyTorch's "cpu"
# index, which the install page of pytorch.org shows for Linux, pip and CPU:
#
#   docker build -f deploy/docker/server.Dockerfile --build-arg TORCH_INDEX_URL=ADDRESS -t ormo-server .
#
# Where pip needs an index, a proxy or a certificate of your company's: in a pip.conf, which is there while pip runs, and
# in no layer. `cert = /etc/pip-ca.pem` in it names the second file; leave that out where you need none.
#
#   docker build -f deploy/docker/server.Dockerfile --secret id=pip,src=pip.conf --secret id=pip-ca,src=ca.pem -t ormo-server .
#
# To pin the base to what you have checked, add its digest (`docker buildx imagetools inspect IMAGE` shows it):
# --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:DIGEST
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# checkov:skip=CKV_DOCKER_7: the tag is PYTHON_IMAGE's, which checkov does not look up; a test checks it
FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
ARG TORCH_INDEX_URL=""
# "server buckets" for a --mirror in a bucket.
ARG EXTRAS="server"
COPY pyproject.toml constraints.txt ./
COPY deploy/docker/install.sh deploy/docker/install.sh
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=pip-ca,target=/etc/pip-ca.pem \
    deploy/docker/install.sh dependencies /opt/ormo ${EXTRAS}

FROM dependencies AS programs
COPY README.md LICENSE ./
COPY protos/ormo_protos protos/ormo_protos
COPY protos/ormo_runtime protos/ormo_runtime
COPY server/ormo_server server/ormo_server
COPY worker/ormo_worker worker/ormo_worker
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=pip-ca,target=/etc/pip-ca.pem \
    deploy/docker/install.sh programs /opt/ormo /opt/programs

FROM ${PYTHON_IMAGE} AS server
LABEL org.opencontainers.image.title="ormo-server" \
    org.opencontainers.image.description="Parameter server with ordered momentum" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0"
# A number that Kubernetes can tell from root. Its home is /tmp, the one place besides /data that may be written to.
RUN groupadd --gid 10001 ormo \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ormo \
    && install -d -o 10001 -g 10001 /data
# Two layers: a change of code is a new one of 5 MB, and PyTorch's stays what every node has already.
COPY --from=dependencies /opt/ormo /opt/ormo
COPY --from=programs /opt/programs /opt/ormo
COPY deploy/docker/metrics_answer.py /usr/local/lib/ormo/metrics_answer.py
# All addresses, so it starts only with certificates and a list of who may call, or with ORMO_INSECURE=true where the
# container's network decides who reaches them. No bytecode: pip has compiled it, and the root file
# system may be read-only.
ENV PATH=/opt/ormo/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    ORMO_LISTEN=0.0.0.0:50051 \
    ORMO_METRICS_LISTEN=0.0.0.0:9464 \
    ORMO_DIRECTORY=/data/run
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 50051 9464
# Drains and writes a checkpoint: give it ORMO_DRAIN_SECONDS and the time of a checkpoint before it is killed.
STOPSIGNAL SIGTERM
# Not `ormo-server status`, which would need a certificate where TLS is set.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "/usr/local/lib/ormo/metrics_answer.py"]
ENTRYPOINT ["ormo-server"]
CMD ["serve"]
