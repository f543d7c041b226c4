# The package and what it needs, at locked versions; the job's own arguments follow the image's name:
#
#   docker build -t distrain .
#   docker run --rm --user "$(id -u):$(id -g)" -v ./data:/work/data -v ./runs:/work/runs distrain train data.dir=data/mine
#
# It runs under any user id, with a read-only root (give it a writable /tmp), no capabilities and no network.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

# What changes seldom: a change of the code leaves this layer, which holds torch, as it is.
FROM ${BASE_IMAGE} AS dependencies
COPY requirements.lock /build/
# Without pip, and what pip keeps is not in the image: nothing here has to be left behind.
RUN python -m venv --without-pip /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip python -m pip --python /opt/venv/bin/python \
    install --no-deps --require-hashes -r /build/requirements.lock
# The code lies in a folder of its own, which this environment looks into.
RUN echo /opt/app > "$(/opt/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/app.pth"

FROM dependencies AS code
COPY pyproject.toml README.md LICENSE /build/
COPY distrain /build/distrain
RUN python -m pip --python /opt/venv/bin/python install --no-deps --no-build-isolation --target /opt/app /build

FROM dependencies
LABEL org.opencontainers.image.title="distrain" \
      org.opencontainers.image.description="Train on WebDataset shards with any number of processes, and get the same result" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=code /opt/app /opt/app
COPY configs /work/configs
# A user id without an entry in /etc/passwd has neither name nor home: what looks for them finds them here.
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    HOME=/tmp USER=distrain LOGNAME=distrain XDG_CACHE_HOME=/tmp/cache \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
USER 1000:1000
# The program is process 1: signals reach it, and it saves.
ENTRYPOINT ["distrain"]
CMD ["--help"]
