-- Tables, row-level security and grants of the ledger. PostgreSQL 15 features only.
-- Every state change is a function of the later migrations; roles other than the owner get no DDL.

create schema if not exists private;
revoke all on schema private from public;
grant usage on schema private to authenticated, service_role;

-- The organizations that the caller may act for.
create function private.my_orgs() returns setof uuid
language sql stable
set search_path = ''
as $$
    select (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'organization_id')::uuid
$$;

-- The one organization that a write is for; raises when the caller names none.
create function private.my_org() returns uuid
language plpgsql stable
set search_path = ''
as $$
declare
    org uuid := (select o from private.my_orgs() as o limit 1);
begin
    if org is null then
        raise exception 'the caller belongs to no organization' using errcode = '28000';
    end if;
    return org;
end
$$;

create function private.touch() returns trigger
language plpgsql
set search_path = ''
as $$
begin
    new.updated_at := now();
    return new;
end
$$;

create table public.organizations (
    id uuid primary key,
    name text not null check (length(name) between 1 and 200),
    created_at timestamptz not null default now()
);

-- Bytes are in the file store; a row exists only for a file that is complete there.
create table public.files (
    id text primary key check (length(id) <= 200),
    organization_id uuid not null references public.organizations,
    purpose text not null,
    filename text not null,
    bytes bigint not null check (bytes >= 0),
    sha256 text not null check (sha256 ~ '^[0-9a-f]{64}$'),
    created_at timestamptz not null default now()
);
create index files_organization_created on public.files (organization_id, created_at desc, id desc);

-- A pod and its lease. `boot` names the process that holds the lease: a new process, a new boot.
create table public.worker (
    id text primary key check (length(id) <= 60),
    organization_id uuid not null references public.organizations,
    status text not null default 'starting'
        check (status in ('starting', 'active', 'busy', 'draining', 'lost', 'terminated')),
    pod_id text,
    docker_image text not null,
    hardware text not null,
    gpu_type text not null,
    gpu_count int not null check (gpu_count >= 0),
    vram_gb int not null check (vram_gb >= 0),
    cloud text not null,
    price_per_hour numeric not null check (price_per_hour >= 0),
    token_hash text not null,
    boot uuid,
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
    terminated_at timestamptz
);
create index worker_alive on public.worker (organization_id, created_at)
    where status <> 'terminated';
create index worker_organization_created on public.worker (organization_id, created_at desc, id desc);

create table public.jobs (
    id text primary key check (length(id) <= 200),
    organization_id uuid not null references public.organizations,
    type text not null,
    status text not null default 'pending'
        check (status in ('pending', 'in_progress', 'completed', 'failed', 'canceled')),
    model text,
    params jsonb not null default '{}',
    mounts jsonb not null default '{}',           -- target path -> file id
    files text[] not null default '{}',           -- every file that the job reads
    entrypoint text,                              -- null: a flow of the user's that is not one of our job types
    docker_image text not null,
    requires_vram_gb int not null default 0 check (requires_vram_gb >= 0),
    allowed_hardware text[],
    max_price_per_hour numeric check (max_price_per_hour > 0),
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
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    started_at timestamptz,
    finished_at timestamptz
);
create index jobs_organization_created on public.jobs (organization_id, created_at desc, id desc);
create index jobs_open on public.jobs (organization_id, priority desc, created_at)
    where status in ('pending', 'in_progress');

-- One attempt; its id is the id of its Prefect flow run.
create table public.runs (
    id uuid primary key,
    organization_id uuid not null references public.organizations,
    job_id text not null references public.jobs on delete cascade,
    attempt int not null,
    status text not null default 'pending'
        check (status in ('pending', 'in_progress', 'completed', 'failed', 'canceled', 'lost')),
    worker_id text references public.worker,
    boot uuid,                                    -- the lease under which it runs
    hinted_worker_id text references public.worker,
    hinted_at timestamptz,
    next_sequence bigint not null default 0,      -- events stored so far
    log_bytes bigint not null default 0,          -- log stored so far
    log_file text,
    error text,
    mirrored boolean not null default false,      -- Prefect shows the final status
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    started_at timestamptz,
    finished_at timestamptz,
    unique (job_id, attempt)
);
create index runs_open on public.runs (organization_id, created_at) where status in ('pending', 'in_progress');
create index runs_unmirrored on public.runs (organization_id) where not mirrored;
create index runs_worker on public.runs (worker_id, created_at);

create table public.events (
    id bigint generated always as identity primary key,
    organization_id uuid not null references public.organizations,
    run_id uuid not null references public.runs on delete cascade,
    sequence bigint not null,
    created_at timestamptz not null default now(),
    data jsonb not null,
    file text,
    unique (run_id, sequence)
);

-- The log of a run, in pieces, by byte offsets of the log file on the pod.
create table public.log_chunks (
    organization_id uuid not null references public.organizations,
    run_id uuid not null references public.runs on delete cascade,
    start_offset bigint not null,
    end_offset bigint not null check (end_offset > start_offset),
    content text not null,
    created_at timestamptz not null default now(),
    primary key (run_id, start_offset)
);

create trigger touch before update on public.worker for each row execute function private.touch();
create trigger touch before update on public.jobs for each row execute function private.touch();
create trigger touch before update on public.runs for each row execute function private.touch();

-- Some installations grant everything to the API roles by default: begin from nothing.
revoke all on all tables in schema public from public, anon, authenticated;
revoke all on all functions in schema private from public, anon;
alter default privileges in schema public revoke execute on functions from public;

grant usage on schema public to anon, authenticated, service_role;
grant execute on all functions in schema private to authenticated, service_role;
grant select on public.organizations to authenticated;
grant select, insert, delete on public.files to authenticated;
grant select, insert, update on public.worker, public.jobs, public.runs to authenticated;
grant select, insert on public.events to authenticated;
grant select, insert, delete on public.log_chunks to authenticated;
grant all on all tables in schema public to service_role;

do $$
declare
    tab text;
    org text;
begin
    foreach tab in array array['organizations', 'files', 'worker', 'jobs', 'runs', 'events', 'log_chunks'] loop
        org := case tab when 'organizations' then 'id' else 'organization_id' end;
        execute format('alter table public.%I enable row level security', tab);
        execute format('alter table public.%I force row level security', tab);
        execute format(
            'create policy read_own on public.%I for select to authenticated
             using (%I = any (array(select private.my_orgs())))', tab, org);
        execute format(
            'create policy insert_own on public.%I for insert to authenticated
             with check (%I = any (array(select private.my_orgs())))', tab, org);
        execute format(
            'create policy update_own on public.%I for update to authenticated
             using (%I = any (array(select private.my_orgs())))
             with check (%I = any (array(select private.my_orgs())))', tab, org, org);
        execute format(
            'create policy delete_own on public.%I for delete to authenticated
             using (%I = any (array(select private.my_orgs())))', tab, org);
    end loop;
end
$$;
