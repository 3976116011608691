# The image of a pod for fine-tuning and custom jobs. From the root of the repository:
#   docker build -f infrastructure/images/fine-tuning.Dockerfile -t openweights/fine-tuning .
FROM python:3.11-slim-bookworm

# Its CUDA version must not be newer than `OW_MIN_CUDA`: pods are bought on hosts with at least that driver.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128

# gcc: Triton compiles kernels on the pod. tini: reaps what shells leave, and passes SIGTERM on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

# The control environment and the job environment cannot be one: their libraries exclude each other.
RUN python -m venv /opt/control && python -m venv /opt/job

COPY infrastructure/environments/job-cpu.txt /tmp/job.txt
RUN grep '^torch==' /tmp/job.txt > /tmp/torch.txt \
    && grep -v '^torch==' /tmp/job.txt > /tmp/others.txt \
    && /opt/job/bin/pip install --no-cache-dir --no-deps -r /tmp/others.txt \
    && /opt/job/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" -r /tmp/torch.txt \
    && rm /tmp/job.txt /tmp/torch.txt /tmp/others.txt

# What changes most often comes last, so that a new version of ours is a small pull for a warm host.
COPY pyproject.toml README.md LICENSE prefect.yaml /src/
COPY openweights_prefect /src/openweights_prefect
COPY flows /src/flows
COPY blocks /src/blocks
COPY infrastructure /src/infrastructure
RUN /opt/control/bin/pip install --no-cache-dir '/src[pod,s3,supabase]' \
    && ln -s /opt/control/bin/ow /usr/local/bin/ow \
    && rm -rf /src

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OW_JOB_PYTHON=/opt/job/bin/python \
    PYTHONUNBUFFERED=1

# The pod's folder: its session, its deadline, its runs, and the link to its agent's socket.
WORKDIR /openweights
ENTRYPOINT ["tini", "--", "/opt/control/bin/python", "-P", "-m", "openweights_prefect.pod"]
