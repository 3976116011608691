-- What the SDK calls: files, jobs, runs, events, logs. Every function answers with JSON rows.

-- Notifications carry ids alone: anybody who is connected may listen.
create function private.notify(channel text, payload text) returns void
language sql
set search_path = ''
as $$ select pg_notify(channel, payload) $$;

-- Wakes the workers of the control plane. Commits that notify wait for each other, so of those that happen at the
-- same moment only one does: a worker looks a second time shortly after it was woken.
create function private.wake_workers() returns void
language plpgsql
set search_path = ''
as $$
declare
    org uuid := private.my_org();
begin
    if pg_try_advisory_xact_lock(hashtextextended('ow_control:' || org::text, 0)) then
        perform pg_notify('ow_control', org::text);
    end if;
end
$$;

-- Files ---------------------------------------------------------------------------------------

-- A pod may read what it stored, also where somebody had stored the same bytes before: it knows their full hash.
create function private.link_run_file(for_run uuid, for_file text, with_sha256 text) returns void
language sql security definer
set search_path = ''
as $$
    insert into ledger.run_files (organization_id, run_id, file_id)
    select f.organization_id, p.run_id, f.id
    from ledger.files f, private.pod_run() as p
    where f.organization_id = private.my_org() and f.id = for_file and f.sha256 = with_sha256 and p.run_id = for_run
    on conflict do nothing
$$;

create function public.register_file(file jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    held_run uuid := (select p.run_id from private.pod_run() as p);
begin
    insert into ledger.files (id, organization_id, purpose, filename, bytes, sha256)
    values (file ->> 'id', org, file ->> 'purpose', file ->> 'filename', (file ->> 'bytes')::bigint, file ->> 'sha256')
    on conflict do nothing;  -- names no columns: a pod does not see the row before it is linked to its run
    if held_run is not null then
        perform private.link_run_file(held_run, file ->> 'id', file ->> 'sha256');
        if not exists (select from ledger.files f where f.id = file ->> 'id') then
            raise exception 'file id % belongs to other content', quote_nullable(file ->> 'id') using errcode = '22023';
        end if;
    end if;
    return query select to_jsonb(f) from ledger.files f where f.id = file ->> 'id';
end
$$;

create function public.get_files(ids text[]) returns setof jsonb
language sql stable
set search_path = ''
as $$ select to_jsonb(f) from ledger.files f where f.id = any (ids) $$;

create function public.list_files(for_purpose text default null, max_rows int default 100, after_id text default null)
returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
    seen_at timestamptz := (select a.created_at from ledger.files a where a.organization_id = org and a.id = after_id);
begin
    return query
        select to_jsonb(f) from ledger.files f
        where f.organization_id = org
          and (for_purpose is null or f.purpose = for_purpose)
          and (after_id is null or (f.created_at, f.id) < (seen_at, after_id))
        order by f.created_at desc, f.id desc
        limit max_rows;
end
$$;

-- Waits for those who are about to read the file.
create function private.lock_file(file_id text) returns void
language sql security definer
set search_path = ''
as $$ select from ledger.files f where f.organization_id = private.my_org() and f.id = file_id for update $$;

-- Refuses while an unfinished job reads the file.
create function public.delete_file(file_id text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    used_by text;
begin
    perform private.lock_file(file_id);
    used_by := (select j.id from ledger.jobs j
                where j.status in ('pending', 'in_progress') and file_id = any (j.files) limit 1);
    if used_by is not null then
        return query select jsonb_build_object('outcome', 'in_use', 'job_id', used_by);
        return;
    end if;
    delete from ledger.files f where f.id = file_id;
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    perform private.audit('delete_file', file_id);
    return query select jsonb_build_object('outcome', 'deleted');
end
$$;

-- Jobs ----------------------------------------------------------------------------------------

-- Puts a job back to pending with a fresh attempt; the row must be locked by the caller.
create function private.reset_job(for_job text) returns void
language sql
set search_path = ''
as $$
    update ledger.jobs
    set status = 'pending', attempt = attempt + 1, outputs = null, error = null, pending_reason = null,
        cancel_requested = false, failed_attempts = 0, lost_attempts = 0, started_at = null, finished_at = null,
        -- Whoever wants it again pays for it; the control plane wants nothing for itself.
        created_by = case private.claims() ->> 'role' when 'authenticated' then private.my_user() else created_by end,
        token_id = case private.claims() ->> 'role' when 'authenticated' then private.my_token() else token_id end
    where id = for_job
$$;

-- Those of the wanted files that are not stored; null when none is missing. The others cannot be deleted before the
-- caller's transaction ends. Definer, because locking a row needs a right to update it, which nobody has.
create function private.missing_files(wanted text[]) returns text[]
language plpgsql security definer
set search_path = ''
as $$
begin
    perform from ledger.files f where f.organization_id = private.my_org() and f.id = any (wanted) order by f.id for key share;
    return (select array_agg(f) from unnest(wanted) f where not exists (
        select from ledger.files known where known.organization_id = private.my_org() and known.id = f));
end
$$;

-- Those of the wanted secrets that the caller's organization does not have; null when none is missing.
create function private.missing_secrets(wanted text[]) returns text[]
language sql stable security definer
set search_path = ''
as $$
    select array_agg(w order by w) from unnest(wanted) w
    where not exists (select 1 from ledger.organization_secrets s where s.organization_id = private.my_org() and s.name = w)
$$;

-- One transaction says new, joined, completed, reset, or which secrets or files are missing (then nothing is changed).
-- A reset job gets the secrets that are named now, if any are: they are no part of what its id stands for.
create function public.submit_job(job jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    wanted ledger.jobs := jsonb_populate_record(null::ledger.jobs, job);
    missing text[];
    held ledger.jobs;
    answer text;
begin
    if wanted.type = 'script' then
        raise exception 'a job of type script is opened by the script itself' using errcode = '22023';
    end if;
    if octet_length(job::text) > 1000000 then
        raise exception 'the job takes % bytes as JSON; 1000000 are allowed, and larger things belong into files',
            octet_length(job::text) using errcode = '22023';
    end if;
    -- Without a lock: what is waiting, running or completed is only looked at.
    select * into held from ledger.jobs j where j.organization_id = org and j.id = wanted.id;
    if held.status in ('failed', 'canceled') then
        select * into held from ledger.jobs j where j.organization_id = org and j.id = wanted.id for update;
    end if;
    if held.id is null or held.status in ('failed', 'canceled') then
        missing := private.missing_secrets(coalesce(wanted.secrets, held.secrets));
        if missing is not null then
            return query select jsonb_build_object('outcome', 'missing_secrets', 'missing', to_jsonb(missing));
            return;
        end if;
        missing := private.missing_files(coalesce(held.files, wanted.files));
        if missing is not null then
            return query select jsonb_build_object('outcome', 'missing_files', 'missing', to_jsonb(missing));
            return;
        end if;
        if private.is_spent(private.my_token()) then
            return query select jsonb_build_object('outcome', 'limit');
            return;
        end if;
    end if;
    if held.id is null then
        insert into ledger.jobs (id, organization_id, type, model, params, mounts, files, secrets, entrypoint, docker_image,
            requires_vram_gb, allowed_hardware, max_price_per_hour, cloud, min_cuda, min_vcpu, min_ram_gb,
            priority, timeout_seconds, retries, env, created_by, token_id)
        values (wanted.id, org, wanted.type, wanted.model, coalesce(wanted.params, '{}'),
            coalesce(wanted.mounts, '{}'), coalesce(wanted.files, '{}'), coalesce(wanted.secrets, '{}'), wanted.entrypoint,
            wanted.docker_image,
            coalesce(wanted.requires_vram_gb, 0), wanted.allowed_hardware, wanted.max_price_per_hour, wanted.cloud,
            wanted.min_cuda, coalesce(wanted.min_vcpu, 0), coalesce(wanted.min_ram_gb, 0), coalesce(wanted.priority, 0), wanted.timeout_seconds, coalesce(wanted.retries, 0),
            coalesce(wanted.env, '{}'), private.my_user(), private.my_token())
        on conflict (organization_id, id) do nothing
        returning * into held;
        answer := case when found then 'new' end;
        if answer is null then  -- somebody else inserted it just now
            select * into held from ledger.jobs j where j.organization_id = org and j.id = wanted.id;
        end if;
    end if;
    if answer is null then
        answer := case held.status when 'completed' then 'completed'
                                   when 'failed' then 'reset'
                                   when 'canceled' then 'reset'
                                   else 'joined' end;
        if answer = 'reset' then
            perform private.reset_job(held.id);
            update ledger.jobs j set secrets = coalesce(wanted.secrets, j.secrets)
            where j.organization_id = org and j.id = held.id
            returning * into held;
        end if;
    end if;
    if answer in ('new', 'reset') then
        perform private.wake_workers();
    end if;
    return query select jsonb_build_object('outcome', answer, 'job', to_jsonb(held));
end
$$;

create function public.get_job(job_id text) returns setof jsonb
language sql stable
set search_path = ''
as $$ select to_jsonb(j) from ledger.jobs j where j.id = job_id $$;

-- Lists: the caller's organization by equality, so that an index gives the order and the limit ends the scan;
-- planned for the arguments at hand, so that a filter that is not used costs nothing.
create function public.list_jobs(
    with_status text default null, with_type text default null, max_rows int default 10, after_id text default null
) returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
    seen_at timestamptz := (select a.created_at from ledger.jobs a where a.organization_id = org and a.id = after_id);
begin
    return query
        select to_jsonb(j) from ledger.jobs j
        where j.organization_id = org
          and (with_status is null or j.status = with_status)
          and (with_type is null or j.type = with_type)
          and (after_id is null or (j.created_at, j.id) < (seen_at, after_id))
        order by j.created_at desc, j.id desc
        limit max_rows;
end
$$;

-- What an index on the parameters can answer: true for every match of `wanted`, and for some that are none.
create function private.params_filter(wanted jsonb) returns jsonpath
language sql immutable
set search_path = ''
as $$
    select ('strict ' || coalesce(string_agg(
        case jsonb_typeof(w.value)
            when 'object' then (
                select coalesce(string_agg(format('exists($.** ? (@.%s.%s == %s))', to_jsonb(w.key), to_jsonb(field.key), field.value), ' && '),
                                format('exists($.** ? (exists(@.%s)))', to_jsonb(w.key)))
                from jsonb_each(w.value) as field where jsonb_typeof(field.value) not in ('object', 'array'))
            when 'array' then format('exists($.** ? (exists(@.%s)))', to_jsonb(w.key))
            else format('exists($.** ? (@.%s == %s))', to_jsonb(w.key), w.value)
        end, ' && '), 'true == true'))::jsonpath
    from jsonb_each(wanted) as w
$$;

create function private.params_match(params jsonb, wanted jsonb) returns boolean
language sql immutable
set search_path = ''
as $$
    select not exists (
        select 1 from jsonb_each(wanted) as w
        where not exists (
            select 1 from jsonb_path_query(params, format('$.**.%s', to_jsonb(w.key))::jsonpath) as held
            where held = w.value or (jsonb_typeof(w.value) = 'object' and held @> w.value)))
$$;

-- Jobs whose parameters hold every given key with that value, at any depth; an object matches by containment.
create function public.find_jobs(wanted jsonb, max_rows int default 100, after_id text default null) returns setof jsonb
language plpgsql stable security definer
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
    may_match jsonpath := private.params_filter(wanted);
    is_exact boolean := not exists (select from jsonb_each(wanted) as w where jsonb_typeof(w.value) in ('object', 'array'));
    seen_id text := after_id;
    seen_at timestamptz := (select a.created_at from ledger.jobs a where a.organization_id = org and a.id = after_id);
    candidate ledger.jobs;
    looked_at int;
    matched int := 0;
begin
    loop
        looked_at := 0;
        for candidate in
            select * from ledger.jobs j
            where j.organization_id = org and j.params @@ may_match
              and (seen_id is null or (j.created_at, j.id) < (seen_at, seen_id))
            order by j.created_at desc, j.id desc
            limit max_rows
        loop
            looked_at := looked_at + 1;
            seen_at := candidate.created_at;
            seen_id := candidate.id;
            if is_exact or private.params_match(candidate.params, wanted) then
                matched := matched + 1;
                return next to_jsonb(candidate);
                if matched = max_rows then
                    return;
                end if;
            end if;
        end loop;
        exit when looked_at < max_rows;
    end loop;
end
$$;

-- A waiting job is canceled at once; a running one is asked to stop and its pod is told.
create function public.cancel_job(job_id text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
    answer text;
begin
    select * into held from ledger.jobs j where j.id = job_id for update;
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    if held.status = 'pending' then
        update ledger.jobs j set status = 'canceled', finished_at = now(), pending_reason = null where j.id = held.id;
        update ledger.runs r set status = 'canceled', finished_at = now()
        where r.job_id = held.id and r.status = 'pending';
        perform private.notify('ow_job', held.id);
        answer := 'canceled';
    elsif held.status = 'in_progress' then
        update ledger.jobs j set cancel_requested = true where j.id = held.id;
        perform private.notify('ow_pod', r.worker_id) from ledger.runs r
        where r.job_id = held.id and r.status = 'in_progress';
        answer := 'canceling';
    else
        answer := 'refused';
    end if;
    perform private.wake_workers();
    return query select jsonb_build_object('outcome', answer, 'job', to_jsonb(j)) from ledger.jobs j where j.id = held.id;
end
$$;

-- Refuses while the job runs, when it is completed, and when files that it reads were deleted meanwhile.
create function public.restart_job(job_id text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
    missing text[];
    answer text := 'refused';
begin
    select * into held from ledger.jobs j where j.id = job_id for update;
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    if held.type in ('flow', 'script') then
        null; -- only who started it can start it again
    elsif held.status in ('failed', 'canceled') then
        missing := private.missing_files(held.files);
        if missing is not null then
            return query select jsonb_build_object('outcome', 'missing_files', 'missing', to_jsonb(missing));
            return;
        end if;
        if private.is_spent(private.my_token()) then
            return query select jsonb_build_object('outcome', 'limit');
            return;
        end if;
        perform private.reset_job(held.id);
        perform private.wake_workers();
        answer := 'reset';
    elsif held.status = 'pending' then
        answer := 'reset';
    end if;
    return query select jsonb_build_object('outcome', answer, 'job', to_jsonb(j)) from ledger.jobs j where j.id = held.id;
end
$$;

-- Runs, events, logs --------------------------------------------------------------------------

create function public.get_run(run_id uuid) returns setof jsonb
language sql stable
set search_path = ''
as $$ select to_jsonb(r) - 'latest' - 'boot' from ledger.runs r where private.known_caller() and r.id = run_id $$;

-- The newest `max_rows` of those older than `after_id`, oldest of them first.
create function public.list_runs(
    for_job text default null, for_worker text default null, with_status text default null, max_rows int default 100,
    after_id uuid default null
) returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
    seen_at timestamptz := (select a.created_at from ledger.runs a where a.organization_id = org and a.id = after_id);
begin
    return query
        select to_jsonb(newest) - 'latest' - 'boot' from (
            select r.* from ledger.runs r
            where r.organization_id = org
              and (for_job is null or r.job_id = for_job)
              and (for_worker is null or r.worker_id = for_worker)
              and (with_status is null or r.status = with_status)
              and (after_id is null or (r.created_at, r.id) < (seen_at, after_id))
            order by r.created_at desc, r.id desc
            limit max_rows) as newest
        order by newest.created_at, newest.id;
end
$$;

-- Within a run ids and sequence numbers grow together, and a run logs nothing once the next attempt is open:
-- so a page begins where the index on (run_id, sequence) has its cursor.
create function public.list_events(
    for_job text default null, for_run uuid default null, after_id bigint default 0, max_rows int default 1000
) returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
    seen ledger.events;
    seen_attempt int;
begin
    select * into seen from ledger.events e where e.id = after_id and e.organization_id = org;
    select r.attempt into seen_attempt from ledger.runs r
    where r.id = seen.run_id and (for_job is null or r.job_id = for_job);
    return query
        select page.event from ledger.runs r
        cross join lateral (
            select e.id, to_jsonb(e) - 'organization_id' as event from ledger.events e
            where e.run_id = r.id and e.id > after_id
              and e.sequence > case when r.id = seen.run_id then seen.sequence else -1 end
            order by e.sequence
            limit max_rows) as page
        where r.organization_id = org and (for_run is null or r.id = for_run) and (for_job is null or r.job_id = for_job)
          and r.attempt >= coalesce(seen_attempt, 0)
        order by page.id
        limit max_rows;
end
$$;

-- The newest non-null value per field; all fields when none is named.
create function public.latest_events(fields text[] default null, for_job text default null, for_run uuid default null)
returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
begin
    return query
        select coalesce(jsonb_object_agg(newest.key, newest.value order by newest.attempt), '{}')
        from ledger.runs r
        cross join lateral (
            select r.attempt, d.key, d.value from jsonb_each(r.latest) as d
            union all
            (select distinct on (d.key) r.attempt, d.key, d.value
             from ledger.events e, jsonb_each(e.data) as d
             where r.latest is null and e.run_id = r.id and d.value <> 'null'::jsonb
             order by d.key, e.sequence desc)
        ) as newest
        where r.organization_id = org and (for_run is null or r.id = for_run) and (for_job is null or r.job_id = for_job)
          and (fields is null or newest.key = any (fields));
end
$$;

-- Pieces of a run's log that end after `after_offset`, in order.
create function public.read_log(for_run uuid, after_offset bigint default 0, max_rows int default 100) returns setof jsonb
language sql stable
set search_path = ''
as $$
    select jsonb_build_object('start_offset', c.start_offset, 'end_offset', c.end_offset, 'content', c.content)
    from ledger.log_chunks c
    where private.known_caller() and c.run_id = for_run and c.end_offset > after_offset
    order by c.start_offset
    limit max_rows
$$;

create function public.list_workers(with_status text[] default null, max_rows int default 100, after_id text default null)
returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
    seen_at timestamptz := (select a.created_at from ledger.worker a where a.organization_id = org and a.id = after_id);
begin
    return query
        select to_jsonb(w) - 'bootstrap_hash' - 'session_hash' - 'proxy_hash' - 'boot' from ledger.worker w
        where w.organization_id = org
          and (with_status is null or w.status = any (with_status))
          and (after_id is null or (w.created_at, w.id) < (seen_at, after_id))
        order by w.created_at desc, w.id desc
        limit max_rows;
end
$$;

create function public.ping() returns setof jsonb
language sql stable
set search_path = ''
as $$ select jsonb_build_object('organization_id', private.my_org(), 'server_version', current_setting('server_version')) $$;
