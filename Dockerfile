# The package and its dependencies, at locked versions. Arguments of distrain follow the image's name:
#
#   docker build -t distrain .
#   docker run --rm --user "$(id -u):$(id -g)" -v ./data:/work/data -v ./runs:/work/runs distrain train data.dir=data/mine
#
# The image runs under any user id, with a read-only root (it needs a writable /tmp; for train.compile one whose files may
# be executed: --tmpfs /tmp:exec), no capabilities and no network.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

# The dependencies (torch, and the clients for data at s3://, gs:// and hf://) change seldom: this layer is not rebuilt
# when the code changes.
FROM ${BASE_IMAGE} AS dependencies
COPY requirements.lock /build/
# Neither pip nor its cache is in the image.
RUN python -m venv --without-pip /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip python -m pip --python /opt/venv/bin/python \
    install --no-deps --require-hashes -r /build/requirements.lock
# The code is in its own folder, /opt/app, which is added to the environment's path.
RUN echo /opt/app > "$(/opt/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/app.pth"

FROM dependencies AS code
COPY pyproject.toml README.md LICENSE /build/
COPY distrain /build/distrain
RUN python -m pip --python /opt/venv/bin/python install --no-deps --no-build-isolation --target /opt/app /build

FROM dependencies
# For train.compile: inductor compiles C++ for CPUs, Triton compiles C (gcc, which g++ needs) to start its kernels on GPUs.
# Both include Python's header files, which python:slim has. Without recommended packages: 59 MB to download, 237 MB on disk, no make.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
LABEL org.opencontainers.image.title="distrain" \
      org.opencontainers.image.description="Train on WebDataset shards with any number of processes, and get the same result" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=code /opt/app /opt/app
COPY configs /work/configs
# A user id without an entry in /etc/passwd has no name and no home: these variables define them.
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    HOME=/tmp USER=distrain LOGNAME=distrain XDG_CACHE_HOME=/tmp/cache \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
USER 1000:1000
# The program is process 1, so it gets the signals, and saves a checkpoint.
ENTRYPOINT ["distrain"]
CMD ["--help"]
