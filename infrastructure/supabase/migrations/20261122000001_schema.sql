-- Roles and tables of the ledger. PostgreSQL 15 features only, no extension.
-- Tables are in `ledger`, which no API exposes; `public` holds the functions that callers may use, `private` the rest.

-- Beside Supabase's own roles: the control plane, and a pod. Roles belong to the whole server, and another
-- database's migrator may create them at the same moment.
do $$
declare
    role_name text;
begin
    foreach role_name in array array['ow_worker', 'ow_pod'] loop
        if to_regrole(role_name) is null then
            begin
                execute format('create role %I nologin', role_name);
            exception
                when duplicate_object or unique_violation then null;
            end;
        end if;
        if not pg_has_role('authenticator', role_name, 'member') then
            begin
                execute format('grant %I to authenticator', role_name);
            exception
                when unique_violation then null;
            end;
        end if;
    end loop;
end
$$;

create schema ledger;
create schema private;
revoke all on schema ledger, private from public;
grant usage on schema ledger, private to authenticated, ow_worker, ow_pod, service_role;
grant usage on schema public to authenticated, ow_worker, ow_pod, service_role;

-- Some installations grant everything to the API roles by default: what follows begins from nothing.
alter default privileges in schema public revoke execute on functions from public, anon, authenticated, service_role;
alter default privileges revoke execute on functions from public;

-- Tenancy -------------------------------------------------------------------------------------

create table ledger.organizations (
    id uuid primary key,
    name text not null check (length(name) between 1 and 200),
    created_at timestamptz not null default now()
);

create table ledger.members (
    organization_id uuid not null references ledger.organizations on delete cascade,
    user_id uuid not null,
    role text not null check (role in ('admin', 'user')),
    email text check (length(email) <= 320),
    created_at timestamptz not null default now(),
    primary key (organization_id, user_id)
);
create index members_user on ledger.members (user_id);

-- One-time codes; whoever brings one becomes a member.
create table ledger.invitations (
    id uuid primary key default gen_random_uuid(),
    organization_id uuid not null references ledger.organizations on delete cascade,
    code_hash text not null unique check (code_hash ~ '^[0-9a-f]{64}$'),
    role text not null check (role in ('admin', 'user')),
    email text check (length(email) <= 320),      -- for whom it is meant; a note
    created_by uuid not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    accepted_by uuid,
    accepted_at timestamptz
);
create index invitations_organization on ledger.invitations (organization_id, created_at desc, id desc);

-- Only the hash of a token is known here; the token itself never comes to the database.
create table ledger.api_tokens (
    id uuid primary key default gen_random_uuid(),
    organization_id uuid not null references ledger.organizations on delete cascade,
    name text not null check (length(name) between 1 and 100),
    role text not null check (role in ('user', 'admin', 'worker')),
    prefix text not null check (length(prefix) <= 12),
    token_hash text not null unique check (token_hash ~ '^[0-9a-f]{64}$'),
    created_by uuid not null,
    minted_by uuid references ledger.api_tokens on delete cascade,
    spend_limit_usd numeric check (spend_limit_usd >= 0),
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz
);
create index api_tokens_organization on ledger.api_tokens (organization_id, created_at desc, id desc);
create index api_tokens_minted_by on ledger.api_tokens (minted_by) where minted_by is not null;

-- Either sealed by the client's key file, or an id of Supabase Vault: never plain text.
create table ledger.organization_secrets (
    organization_id uuid not null references ledger.organizations on delete cascade,
    name text not null check (name ~ '^[A-Za-z_][A-Za-z0-9_]{0,99}$'),
    sealed text check (sealed like 'sealed:v1:%'),
    vault_id uuid,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    updated_by jsonb not null,
    primary key (organization_id, name),
    check (num_nonnulls(sealed, vault_id) = 1)
);

create table ledger.audit_log (
    id bigint generated always as identity primary key,
    organization_id uuid not null references ledger.organizations on delete cascade,
    created_at timestamptz not null default now(),
    actor jsonb not null,                         -- {user_id, token_id, worker_id}
    action text not null,
    subject text not null,
    detail jsonb not null default '{}'
);
create index audit_log_organization on ledger.audit_log (organization_id, id desc);

-- Files ---------------------------------------------------------------------------------------

-- Bytes are in the file store; a row exists only for a file that is complete there.
create table ledger.files (
    organization_id uuid not null references ledger.organizations,
    id text not null check (length(id) <= 200),
    purpose text not null check (length(purpose) <= 100),
    filename text not null check (length(filename) <= 1000),
    bytes bigint not null check (bytes >= 0),
    sha256 text not null check (sha256 ~ '^[0-9a-f]{64}$'),
    created_at timestamptz not null default now(),
    primary key (organization_id, id)
);
create index files_organization_created on ledger.files (organization_id, created_at desc, id desc);
create index files_organization_purpose on ledger.files (organization_id, purpose, created_at desc, id desc);

-- Pods, jobs, runs ----------------------------------------------------------------------------

-- A pod and its lease. `boot` names the process that holds the lease: a new process, a new boot.
create table ledger.worker (
    organization_id uuid not null references ledger.organizations,
    id text not null check (length(id) <= 60),
    status text not null default 'starting'
        check (status in ('starting', 'active', 'busy', 'draining', 'lost', 'terminated')),
    pod_id text check (length(pod_id) <= 200),
    docker_image text not null check (length(docker_image) <= 500),
    hardware text not null check (length(hardware) <= 200),
    gpu_type text not null check (length(gpu_type) <= 200),
    gpu_count int not null check (gpu_count >= 0),
    vram_gb int not null check (vram_gb >= 0),
    cloud text not null check (length(cloud) <= 100),
    price_per_hour numeric not null check (price_per_hour >= 0),
    bought_for text check (length(bought_for) <= 200),  -- the job that made it necessary
    host text check (length(host) <= 100),        -- a weak fingerprint of the machine
    cuda text check (cuda ~ '^[0-9]{1,3}(\.[0-9]{1,3})?$'),  -- of the host's driver; at least, while it is not known
    vcpu int not null default 0 check (vcpu >= 0),
    ram_gb int not null default 0 check (ram_gb >= 0),
    bootstrap_hash text not null unique check (bootstrap_hash ~ '^[0-9a-f]{64}$'),
    session_hash text unique check (session_hash ~ '^[0-9a-f]{64}$'),  -- set once, by who brings the bootstrap token
    proxy_hash text unique check (proxy_hash ~ '^[0-9a-f]{64}$'),  -- of what it shows to the proxy of the Prefect API
    boot uuid,
    boots int not null default 0,                 -- processes that have taken the lease
    lease_seconds int not null default 0,
    lease_expires_at timestamptz,
    heartbeat_at timestamptz,
    run_id uuid,
    shutdown_requested boolean not null default false,
    cached_models text[] not null default '{}',
    reason text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    active_at timestamptz,
    idle_since timestamptz,
    deadline_at timestamptz not null,
    terminated_at timestamptz,
    primary key (organization_id, id)
);
create index worker_alive on ledger.worker (organization_id, created_at)
    where status <> 'terminated';
create index worker_organization_created on ledger.worker (organization_id, created_at desc, id desc);

create table ledger.jobs (
    organization_id uuid not null references ledger.organizations,
    id text not null check (length(id) <= 200),
    type text not null check (length(type) <= 100),
    status text not null default 'pending'
        check (status in ('pending', 'in_progress', 'completed', 'failed', 'canceled')),
    model text check (length(model) <= 500),
    params jsonb not null default '{}',
    mounts jsonb not null default '{}',           -- target path -> file id
    files text[] not null default '{}',           -- every file that the job reads
    secrets text[] not null default '{}',         -- names of the secrets that it gets
    entrypoint text,                              -- null: a flow of the user's that is not one of our job types
    docker_image text not null check (length(docker_image) <= 500),
    requires_vram_gb int not null default 0 check (requires_vram_gb >= 0),
    allowed_hardware text[],
    max_price_per_hour numeric check (max_price_per_hour > 0),
    cloud text check (cloud in ('SECURE', 'COMMUNITY')),
    min_cuda text check (min_cuda ~ '^[0-9]{1,3}(\.[0-9]{1,3})?$'),
    min_vcpu int not null default 0 check (min_vcpu >= 0),
    min_ram_gb int not null default 0 check (min_ram_gb >= 0),
    priority int not null default 0,
    timeout_seconds int check (timeout_seconds > 0),
    retries int not null default 0 check (retries >= 0),
    env jsonb not null default '{}',
    outputs jsonb,
    error text,
    pending_reason text,
    cancel_requested boolean not null default false,
    attempt int not null default 1,               -- the attempt that is wanted or running
    failed_attempts int not null default 0,       -- the user's own failures since the last reset
    lost_attempts int not null default 0,         -- pods lost in a row since the last reset
    created_by uuid,
    token_id uuid references ledger.api_tokens on delete set null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    started_at timestamptz,
    finished_at timestamptz,
    primary key (organization_id, id)
);
create index jobs_organization_created on ledger.jobs (organization_id, created_at desc, id desc);
create index jobs_open on ledger.jobs (organization_id, priority desc, created_at)
    where status in ('pending', 'in_progress');
create index jobs_waiting on ledger.jobs (organization_id, priority desc, created_at) where status = 'pending';
create index jobs_type on ledger.jobs (organization_id, type, created_at desc, id desc);
create index jobs_unsuccessful on ledger.jobs (organization_id, status, created_at desc, id desc)
    where status in ('failed', 'canceled');
create index jobs_params on ledger.jobs using gin (params);

-- One attempt; its id is the id of its Prefect flow run.
create table ledger.runs (
    id uuid primary key,
    organization_id uuid not null,
    job_id text not null,
    attempt int not null,
    status text not null default 'pending'
        check (status in ('pending', 'in_progress', 'completed', 'failed', 'canceled', 'lost')),
    worker_id text,
    token_id uuid references ledger.api_tokens on delete set null,  -- who pays for this attempt
    boot uuid,                                    -- the lease under which it runs
    hinted_worker_id text,
    hinted_at timestamptz,
    ceiling_per_hour numeric,                     -- a warm pod that is dearer is not worth it
    next_sequence bigint not null default 0,      -- events stored so far
    log_bytes bigint not null default 0,          -- log stored so far
    logged_at timestamptz,                        -- when events or log were stored last
    latest jsonb default '{}',                    -- newest value of each field logged; null when that is too much to keep
    log_file text,
    error text,
    mirrored boolean not null default false,      -- Prefect shows the final status
    lease_expires_at timestamptz,                 -- lease of a script, which has no pod; null for every other run
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    started_at timestamptz,
    finished_at timestamptz,
    unique (organization_id, job_id, attempt),
    foreign key (organization_id, job_id) references ledger.jobs on delete cascade,
    foreign key (organization_id, worker_id) references ledger.worker,
    foreign key (organization_id, hinted_worker_id) references ledger.worker
);
create index runs_organization_created on ledger.runs (organization_id, created_at desc, id desc);
create index runs_open on ledger.runs (organization_id, created_at) where status in ('pending', 'in_progress');
create index runs_hinted on ledger.runs (organization_id, hinted_worker_id) where hinted_worker_id is not null;
create index runs_unsuccessful on ledger.runs (organization_id, status, created_at desc, id desc)
    where status in ('failed', 'canceled', 'lost');
create index runs_token on ledger.runs (token_id) where token_id is not null;
create index runs_unmirrored on ledger.runs (organization_id) where not mirrored;
create index runs_worker on ledger.runs (organization_id, worker_id, created_at);
create index runs_script_leases on ledger.runs (lease_expires_at) where status = 'in_progress' and lease_expires_at is not null;

create table ledger.events (
    id bigint generated always as identity primary key,
    organization_id uuid not null,
    run_id uuid not null references ledger.runs on delete cascade,
    sequence bigint not null,
    created_at timestamptz not null default now(),
    data jsonb not null,
    file text,
    unique (run_id, sequence)
);

-- The log of a run, in pieces, by byte offsets of the log file on the pod.
create table ledger.log_chunks (
    organization_id uuid not null,
    run_id uuid not null references ledger.runs on delete cascade,
    start_offset bigint not null,
    end_offset bigint not null check (end_offset > start_offset),
    content text not null,
    created_at timestamptz not null default now(),
    primary key (run_id, start_offset)
);

-- Files that a run stored, whoever had stored the same bytes before.
create table ledger.run_files (
    organization_id uuid not null,
    run_id uuid not null references ledger.runs on delete cascade,
    file_id text not null,
    primary key (run_id, file_id),
    foreign key (organization_id, file_id) references ledger.files on delete cascade
);

create index run_files_file on ledger.run_files (organization_id, file_id);

-- Money ---------------------------------------------------------------------------------------

create table ledger.budgets (
    organization_id uuid primary key references ledger.organizations on delete cascade,
    limit_usd numeric not null check (limit_usd >= 0),
    updated_at timestamptz not null default now()
);

-- What a live pod may still cost at most; given back when it has ended.
create table ledger.reservations (
    organization_id uuid not null,
    worker_id text not null,
    usd numeric not null check (usd >= 0),
    created_at timestamptz not null default now(),
    primary key (organization_id, worker_id),
    foreign key (organization_id, worker_id) references ledger.worker on delete cascade
);

-- What each second of a pod was for.
create table ledger.pod_intervals (
    id bigint generated always as identity primary key,
    organization_id uuid not null,
    worker_id text not null,
    kind text not null check (kind in ('boot', 'idle', 'run', 'teardown')),
    run_id uuid,
    price_per_hour numeric not null,
    started_at timestamptz not null,
    ended_at timestamptz,
    duplicate text check (length(duplicate) <= 200),  -- of a second pod of the same create, its id at the provider
    foreign key (organization_id, worker_id) references ledger.worker on delete cascade
);
create unique index pod_intervals_duplicate on ledger.pod_intervals (organization_id, duplicate) where duplicate is not null;
create index pod_intervals_worker on ledger.pod_intervals (organization_id, worker_id, started_at);
create index pod_intervals_run on ledger.pod_intervals (run_id) where run_id is not null;

-- What the provider sells, as the control plane saw it last, and the limits that it works under.
create table ledger.catalogues (
    organization_id uuid primary key references ledger.organizations on delete cascade,
    offers jsonb not null,
    limits jsonb not null,
    updated_at timestamptz not null default now()
);

-- What the provider refused: an offer, a host, or everything (`account`). It is not asked again before `until`.
create table ledger.refusals (
    organization_id uuid not null references ledger.organizations on delete cascade,
    subject text not null check (length(subject) <= 300),
    failures int not null default 1,              -- in a row
    reason text not null,
    refused_at timestamptz not null default now(),
    until timestamptz not null,
    primary key (organization_id, subject)
);

-- Failed exchanges by who tried, to slow down guessing.
create table private.refused_exchanges (
    source text not null,
    minute timestamptz not null,
    refusals int not null default 1,
    primary key (source, minute)
);
create index refused_exchanges_minute on private.refused_exchanges (minute);

create function private.touch() returns trigger
language plpgsql
set search_path = ''
as $$
begin
    new.updated_at := now();
    return new;
end
$$;

create trigger touch before update on ledger.worker for each row execute function private.touch();
create trigger touch before update on ledger.jobs for each row execute function private.touch();
create trigger touch before update on ledger.runs for each row execute function private.touch();
