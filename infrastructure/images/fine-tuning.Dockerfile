# The image of a pod for fine-tuning with plain TRL and for custom jobs. From the root of the repository:
#   docker build -f infrastructure/images/fine-tuning.Dockerfile -t openweights/fine-tuning .
FROM python:3.11-slim-bookworm

# Its CUDA version must not be newer than `OW_MIN_CUDA`: pods are bought on hosts with at least that driver.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128

# gcc: Triton compiles kernels on the pod. tini: reaps what shells leave, and passes SIGTERM on.
# Host keys are made by each pod for itself.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev openssh-server tini \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

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
COPY infrastructure/images/start.sh /usr/local/bin/start
RUN /opt/control/bin/pip install --no-cache-dir '/src[pod,s3,supabase]' \
    && ln -s /opt/control/bin/ow /usr/local/bin/ow \
    && rm -rf /src

# No credential is here or in a file: a job gets HF_TOKEN in its own environment when it names that secret.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_DISABLE_TELEMETRY=1 \
    OW_JOB_PYTHON=/opt/job/bin/python \
    PYTHONUNBUFFERED=1

# No USER: RunPod mounts its volumes for root alone and starts its web terminal as root, and sshd can read its host
# keys and open a session only as root. Both environments are root's, so that a job of another user cannot change them.
# The pod's folder: its session, its deadline, its runs, and the link to its agent's socket.
WORKDIR /openweights
EXPOSE 22
ENTRYPOINT ["tini", "--", "/usr/local/bin/start", "/opt/control/bin/python", "-P", "-m", "openweights_prefect.pod"]
