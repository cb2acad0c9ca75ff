# One image for the three services; docker-compose.yml says which one a container runs.
FROM python:3.11-slim-bookworm

ENV PATH=/opt/tessera/venv/bin:$PATH \
    GRPC_VERBOSITY=ERROR \
    TESSERA_DATA_DIR=/data \
    TESSERA_SOCKET_DIR=/sockets

# The directories are made here so that new volumes belong to the services' user, and to nobody else.
RUN useradd --uid 10001 --create-home tessera \
    && install -d -m 0700 -o tessera -g tessera /data /sockets \
    /certs /certs/authority /certs/secrets /certs/serving /certs/gateway
WORKDIR /home/tessera

# Every package that is needed to run is checked against its hash. Apart from the sources, which change more often.
COPY requirements/runtime.txt /opt/tessera/requirements.txt
RUN python -m venv /opt/tessera/venv \
    && python -m pip install --no-cache-dir --require-hashes -r /opt/tessera/requirements.txt

# .dockerignore lets in what the package is made of.
COPY . /opt/tessera/source
RUN python -m pip install --no-cache-dir --no-deps /opt/tessera/source

USER tessera
