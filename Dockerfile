# docker build --tag alphatoken .   CPUs; for GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 ALPHATOKEN_CACHE=/cache HF_HOME=/cache/huggingface

# torch first: the largest layer, which does not change with the code
RUN pip install --index-url "$TORCH_INDEX" "torch>=2.7,<2.14"

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY alphatoken alphatoken
COPY conf conf
COPY data_schemas data_schemas
COPY jobs jobs
COPY pipeline pipeline
RUN pip install ".[peft]" && rm -r build alphatoken.egg-info

# To be written to by every user, so that `docker run --user` can take another one.
RUN useradd --uid 1000 --create-home user && mkdir /home/user/runs /cache \
    && chown -R user:user /home/user /cache && chmod -R a+rwX /home/user /cache
USER user
ENV HOME=/home/user
# As Ctrl-C: Python as process 1 does not hear SIGTERM, and would be killed after ten seconds.
STOPSIGNAL SIGINT
WORKDIR /home/user
ENTRYPOINT ["alphatoken"]
CMD ["--help"]
