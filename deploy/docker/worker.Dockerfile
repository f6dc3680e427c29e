# The images of `ormo-worker`, which trains (`run`) and evaluates (`evaluate`). Built from the root of the tree:
#
#   docker build -f deploy/docker/worker.Dockerfile --target cpu --build-arg TORCH_INDEX_URL=ADDRESS -t ormo-worker .
#   docker build -f deploy/docker/worker.Dockerfile --target cuda -t ormo-worker:cuda .
#
# For target cpu TORCH_INDEX_URL is the address of PyTorch's "cpu" index (see server.Dockerfile; without it the image
# works too, and has CUDA's libraries for nothing). For target cuda pip's default index has the CUDA build, and another
# index of PyTorch's has those for older drivers.
#
# The CUDA image needs no CUDA base: PyTorch's wheels for Linux bring CUDA's libraries, in the versions that they name
# exactly, and the driver's come from the host through the NVIDIA container runtime (`docker run --gpus all`).
#
# PYTHON_IMAGE takes a digest, and pip its index, proxy and certificate from secrets, as in server.Dockerfile.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# checkov:skip=CKV_DOCKER_7: the tag is PYTHON_IMAGE's, which checkov does not look up; a test checks it
FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
ARG TORCH_INDEX_URL=""
COPY pyproject.toml constraints.txt ./
COPY deploy/docker/install.sh deploy/docker/install.sh
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=pip-ca,target=/etc/pip-ca.pem \
    deploy/docker/install.sh dependencies /opt/ormo worker vision

FROM dependencies AS programs
COPY README.md LICENSE ./
COPY protos/ormo_protos protos/ormo_protos
COPY protos/ormo_runtime protos/ormo_runtime
COPY server/ormo_server server/ormo_server
COPY worker/ormo_worker worker/ormo_worker
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=pip-ca,target=/etc/pip-ca.pem \
    deploy/docker/install.sh programs /opt/ormo /opt/programs

FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="ormo-worker" \
    org.opencontainers.image.description="Worker and evaluator of the parameter server with ordered momentum" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0"
# A number that Kubernetes can tell from root. Its home is /tmp, the one place that should be writable.
RUN groupadd --gid 10001 ormo \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ormo
# Two layers: a change of code is a new one of 5 MB, and PyTorch's stays what every node has already.
COPY --from=dependencies /opt/ormo /opt/ormo
COPY --from=programs /opt/programs /opt/ormo
COPY deploy/docker/metrics_answer.py /usr/local/lib/ormo/metrics_answer.py
# No bytecode: pip has compiled it, and the root file system may be read-only.
ENV PATH=/opt/ormo/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    ORMO_METRICS_LISTEN=0.0.0.0:9465
USER 10001:10001
# Where your own task can be mounted, as in --task mine.py:MyTask.
WORKDIR /work
EXPOSE 9465
STOPSIGNAL SIGTERM
# Says that the process runs, no more. Whether a worker gets on is the server's to say: it takes a silent one's lease
# away, and a worker may rightly wait for long. One that can't go on ends with an exit code.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "/usr/local/lib/ormo/metrics_answer.py"]
ENTRYPOINT ["ormo-worker"]
CMD ["run"]

FROM runtime AS cuda
# What the NVIDIA runtime puts into the container: every GPU that it was started with, and the driver's libraries.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Last, so that it is what a build without --target makes.
FROM runtime AS cpu
