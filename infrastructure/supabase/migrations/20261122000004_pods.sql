-- What a pod's agent calls: its lease, the run it holds, and what the run produces.
-- Locks are always taken in the order job, run, worker. A stale caller gets an answer, never an error.

-- Ends a run whose pod is gone; its job goes back to pending until three pods in a row were lost.
-- A flow of the user's own, which has a flow run and no job of ours behind it, is not run again by us.
create function private.lose_run(for_run uuid, why text) returns void
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
    ending text;
begin
    select j.* into held from ledger.jobs j join ledger.runs r on r.job_id = j.id where r.id = for_run for update of j;
    update ledger.runs r set status = 'lost', error = why, finished_at = now()
    where r.id = for_run and r.status = 'in_progress';
    if not found or held.status <> 'in_progress' then
        return;
    end if;
    ending := case when held.cancel_requested then 'canceled'
                   when held.entrypoint is null or held.type = 'script' or held.lost_attempts + 1 >= 3 then 'failed' end;
    update ledger.jobs j
    set lost_attempts = j.lost_attempts + 1,
        status = coalesce(ending, 'pending'),
        attempt = j.attempt + (ending is null)::int,
        error = case when ending = 'failed' and (j.entrypoint is null or j.type = 'script') then why
                     when ending = 'failed' then 'Lost 3 pods in a row; the last one: ' || why end,
        finished_at = case when ending is not null then now() end,
        started_at = case when ending is not null then j.started_at end
    where j.id = held.id;
    perform private.notify('ow_job', held.id);
    perform private.wake_workers();
end
$$;

-- Ends a pod in the eyes of the ledger: its status becomes `verdict`, and the run that it holds at this very moment is
-- lost. False when that is so already, or when `only_silent` and it has renewed its lease meanwhile.
create function private.condemn_pod(for_worker text, verdict text, why text, only_silent boolean default false)
returns boolean
language plpgsql
set search_path = ''
as $$
declare
    held ledger.worker;
begin
    loop
        select * into held from ledger.worker w where w.id = for_worker;
        if not found or held.status in ('terminated', verdict) or (only_silent and held.lease_expires_at >= now()) then
            return false;
        end if;
        -- Locks are taken in the order job, run, worker; who opened or ended a run meanwhile sends us round again.
        perform from ledger.jobs j join ledger.runs r on r.job_id = j.id where r.id = held.run_id for update of j;
        update ledger.worker w
        set status = verdict, boot = null, run_id = null,
            reason = case verdict when 'lost' then why else coalesce(w.reason, why) end,
            terminated_at = case verdict when 'terminated' then now() end
        where w.id = for_worker and w.status = held.status and w.run_id is not distinct from held.run_id
          and w.lease_expires_at is not distinct from held.lease_expires_at;
        exit when found;
    end loop;
    if held.run_id is not null then
        perform private.lose_run(held.run_id, why);
    end if;
    return true;
end
$$;

-- Takes the lease of a pod for the process `as_boot`. What an earlier process of the pod held is lost; asked again by
-- the same process, however late, nothing changes but the lease. Which one it is at the provider, if one create made two,
-- only the pod itself knows.
create function public.register_pod(
    for_worker text, as_boot uuid, lease_seconds int, models text[], proxy_hash text default null, provider_id text default null
) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.worker;
begin
    loop
        select * into held from ledger.worker w where w.id = for_worker;
        if not found then
            return query select jsonb_build_object('outcome', 'refused');
            return;
        elsif held.status not in ('starting', 'active', 'busy') then
            return query select jsonb_build_object('outcome', 'shutdown');
            return;
        elsif held.boots >= 5 and held.boot is distinct from as_boot then
            perform private.condemn_pod(for_worker, 'lost', 'its agent restarted 5 times');
            return query select jsonb_build_object('outcome', 'shutdown');
            return;
        end if;
        -- Locks are taken in the order job, run, worker; who opened or ended a run meanwhile sends us round again.
        perform from ledger.jobs j join ledger.runs r on r.job_id = j.id where r.id = held.run_id for update of j;
        update ledger.worker w
        set status = case when w.boot = as_boot then w.status else 'active' end,
            run_id = case when w.boot = as_boot then w.run_id end,
            idle_since = case when w.boot = as_boot then w.idle_since else now() end,
            boots = w.boots + (w.boot is distinct from as_boot)::int, boot = as_boot,
            pod_id = coalesce(register_pod.provider_id, w.pod_id),
            proxy_hash = coalesce(register_pod.proxy_hash, w.proxy_hash), heartbeat_at = now(), active_at = coalesce(w.active_at, now()), cached_models = models,
            lease_seconds = register_pod.lease_seconds,
            lease_expires_at = now() + make_interval(secs => least(register_pod.lease_seconds, 3600))
        where w.id = for_worker and w.status = held.status and w.boot is not distinct from held.boot
          and w.run_id is not distinct from held.run_id;
        exit when found;
    end loop;
    if held.run_id is not null and held.boot is distinct from as_boot then
        perform private.lose_run(held.run_id, 'the agent of pod ' || for_worker || ' restarted');
    end if;
    perform private.wake_workers();
    return query select jsonb_build_object('outcome', 'registered', 'gpu_count', w.gpu_count,
                                           'deadline_seconds', extract(epoch from w.deadline_at - now()))
                 from ledger.worker w where w.id = for_worker;
end
$$;

-- True when the pod may run the job. Nobody else decides that.
create function private.fits(job ledger.jobs, pod ledger.worker) returns boolean
language sql immutable
set search_path = ''
as $$
    select pod.docker_image = job.docker_image
       and case when job.allowed_hardware is null then job.requires_vram_gb <= pod.vram_gb
                else pod.hardware = any (job.allowed_hardware) end
       and (job.max_price_per_hour is null or pod.price_per_hour <= job.max_price_per_hour)
       and (job.cloud is null or pod.cloud = job.cloud)
       and (job.min_cuda is null
            or string_to_array(pod.cuda, '.')::int[] >= string_to_array(job.min_cuda, '.')::int[])
       and job.min_vcpu <= pod.vcpu and job.min_ram_gb <= pod.ram_gb
$$;

-- How many pods work for each user who has one.
create function private.busy_users(org uuid) returns table (owner uuid, pods bigint)
language sql stable
set search_path = ''
as $$
    select j.created_by, count(*)
    from ledger.runs r join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
    where r.organization_id = org and r.status = 'in_progress' and r.worker_id is not null
    group by j.created_by
$$;

-- The waiting jobs in the order in which they are served: by priority, then in turn between users, each with what he
-- has running, then by age. Jobs with the same `needs_class` fit the same pods; `place_in_class` counts among those.
create function private.waiting_line() returns table (job_id text, needs_class text, place bigint, place_in_class bigint)
language sql stable
set search_path = ''
as $$
    with turns as (
        select j.id, j.priority, j.created_at, md5(jsonb_build_array(
                   j.docker_image, j.requires_vram_gb, j.allowed_hardware, j.max_price_per_hour, j.cloud, j.min_cuda,
                   j.min_vcpu, j.min_ram_gb)::text) as needs_class,
               coalesce(busy.pods, 0) + row_number() over (
                   partition by j.created_by order by j.priority desc, j.created_at, j.id) as turn
        from ledger.jobs j
        left join private.busy_users((select private.my_org())) as busy on busy.owner is not distinct from j.created_by
        where j.organization_id = (select private.my_org()) and j.status = 'pending')
    select t.id, t.needs_class,
           row_number() over (order by t.priority desc, t.turn, t.created_at, t.id),
           row_number() over (partition by t.needs_class order by t.priority desc, t.turn, t.created_at, t.id)
    from turns t
$$;

-- The two calls of a claim are definers: they check the pod once instead of in every statement, and a pod needs no
-- view of jobs that it does not hold.
create function public.renew_lease(for_worker text, as_boot uuid, lease_seconds int, models text[]) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    org uuid := (select o from private.my_orgs() as o);  -- null: the pod has ended
    pod ledger.worker;
    cancel boolean;
    next_run uuid;
begin
    -- A heartbeat that is lost with the machine costs nothing: it does not wait for the disk.
    perform set_config('synchronous_commit', 'off', true);
    update ledger.worker w
    set heartbeat_at = now(), lease_seconds = renew_lease.lease_seconds, cached_models = models,
        lease_expires_at = now() + make_interval(secs => least(renew_lease.lease_seconds, 3600))
    where w.organization_id = org and w.id = for_worker and w.id = private.my_pod() and w.boot = as_boot
      and w.status in ('active', 'busy', 'draining')
    returning * into pod;
    if not found then
        return query select jsonb_build_object('fenced', true);
        return;
    end if;
    if pod.run_id is not null then
        select j.cancel_requested into cancel
        from ledger.runs r join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
        where r.id = pod.run_id;
    elsif pod.status = 'active' and not pod.shutdown_requested then
        select r.id into next_run
        from ledger.runs r join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
        where r.organization_id = org and r.hinted_worker_id = pod.id and r.status = 'pending'
          and j.status = 'pending' and private.fits(j, pod)
        order by r.hinted_at
        limit 1;
        if next_run is null then
            -- Whoever finds a run hints it at itself: pods that look at the same moment find different ones.
            update ledger.runs u set hinted_worker_id = pod.id, hinted_at = now()
            where u.id = (
                select r.id
                from ledger.runs r
                join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id and j.attempt = r.attempt
                left join private.busy_users(org) as busy on busy.owner is not distinct from j.created_by
                where r.organization_id = org and r.status = 'pending' and j.status = 'pending'
                  and (r.hinted_worker_id is null or r.hinted_at < now() - interval '10 seconds')
                  and (r.ceiling_per_hour is null or pod.price_per_hour <= r.ceiling_per_hour)
                  and private.fits(j, pod)
                order by j.priority desc, coalesce(busy.pods, 0), j.created_at
                limit 1
                for update of r skip locked)
            returning u.id into next_run;
        end if;
    end if;
    return query select jsonb_build_object('fenced', false, 'shutdown', pod.shutdown_requested or pod.status = 'draining',
        'cancel', coalesce(cancel, false), 'run_id', pod.run_id, 'next_run', next_run,
        'deadline_seconds', extract(epoch from pod.deadline_at - now()));
end
$$;

-- Makes the holder of the lease the executor of the run. The one gate to execution.
create function public.open_run(for_run uuid, for_worker text, as_boot uuid) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    org uuid := (select o from private.my_orgs() as o);
    held_job ledger.jobs;
    held_run ledger.runs;
    pod ledger.worker;
    refusal text;
begin
    select j.* into held_job
    from ledger.runs r join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
    where r.id = for_run and r.organization_id = org for update of j;
    select * into held_run from ledger.runs r where r.id = for_run and r.organization_id = org for update;
    select * into pod from ledger.worker w
    where w.organization_id = org and w.id = for_worker and w.id = private.my_pod() for update;
    refusal := case
        when held_run.id is null then 'unknown run'
        when pod.id is null then 'another pod'
        when held_run.status = 'in_progress' and held_run.boot = as_boot and held_run.worker_id = pod.id then null
        when held_run.status <> 'pending' then 'the run is ' || held_run.status
        when held_job.status <> 'pending' then 'the job is ' || held_job.status
        when held_run.attempt <> held_job.attempt then 'a newer attempt exists'
        when pod.boot is distinct from as_boot or pod.lease_expires_at < clock_timestamp() then 'the lease is lost'
        when pod.status <> 'active' or pod.shutdown_requested then 'the pod is ' || pod.status
        when not private.fits(held_job, pod) then 'the pod does not fit'
    end;
    if refusal is not null then
        return query select jsonb_build_object('outcome', 'refused', 'reason', refusal);
        return;
    end if;
    update ledger.runs r set status = 'in_progress', worker_id = for_worker, boot = as_boot, started_at = coalesce(r.started_at, now())
    where r.id = for_run;
    update ledger.jobs j set status = 'in_progress', started_at = coalesce(j.started_at, now()), pending_reason = null
    where j.organization_id = org and j.id = held_job.id
    returning * into held_job;
    update ledger.worker w set status = 'busy', run_id = for_run, idle_since = null
    where w.organization_id = org and w.id = for_worker;
    return query select jsonb_build_object('outcome', 'opened', 'job', to_jsonb(held_job), 'attempt', held_run.attempt,
                                           'gpu_count', pod.gpu_count);
end
$$;

-- Stores a batch whose first event is number `first_sequence` of the run; what is already stored is skipped.
create function public.append_events(for_run uuid, as_boot uuid, first_sequence bigint, batch jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.runs;
    newest jsonb;
begin
    select * into held from ledger.runs r
    where r.id = for_run and r.boot = as_boot and r.status = 'in_progress' for update;
    if not found then
        return query select jsonb_build_object('outcome', 'stale');
        return;
    end if;
    if first_sequence > held.next_sequence then
        return query select jsonb_build_object('outcome', 'gap', 'next_sequence', held.next_sequence);
        return;
    end if;
    with added as (
        select first_sequence + e.number - 1 as sequence, e.item
        from jsonb_array_elements(batch) with ordinality as e (item, number)
        where first_sequence + e.number - 1 >= held.next_sequence
    ), stored as (
        insert into ledger.events (organization_id, run_id, sequence, created_at, data, file)
        select held.organization_id, held.id, a.sequence,
               coalesce(to_timestamp((a.item ->> 'at')::double precision), now()), a.item -> 'data', a.item ->> 'file'
        from added a
        order by a.sequence
    )
    select held.latest || coalesce(jsonb_object_agg(d.key, d.value order by a.sequence), '{}') into newest
    from added a, jsonb_each(a.item -> 'data') as d
    where held.latest is not null and d.value <> 'null'::jsonb;
    update ledger.runs r
    set next_sequence = greatest(held.next_sequence, first_sequence + jsonb_array_length(batch)), logged_at = now(),
        latest = case when pg_column_size(newest) <= 100000 then newest end
    where r.id = held.id;
    return query select jsonb_build_object('outcome', 'stored', 'next_sequence',
                                           greatest(held.next_sequence, first_sequence + jsonb_array_length(batch)));
end
$$;

create function public.append_log(for_run uuid, as_boot uuid, from_offset bigint, to_offset bigint, piece text)
returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.runs;
begin
    select * into held from ledger.runs r
    where r.id = for_run and r.boot = as_boot and r.status = 'in_progress' for update;
    if not found then
        return query select jsonb_build_object('outcome', 'stale');
        return;
    end if;
    if from_offset = held.log_bytes then
        insert into ledger.log_chunks (organization_id, run_id, start_offset, end_offset, content)
        values (held.organization_id, held.id, from_offset, to_offset, piece);
        update ledger.runs r set log_bytes = to_offset, logged_at = now() where r.id = held.id;
    end if;
    return query select jsonb_build_object('outcome', 'stored', 'log_bytes', r.log_bytes) from ledger.runs r where r.id = held.id;
end
$$;

-- A pod on which five runs in a row failed, of more than one job, while another pod completed one: the pod is to blame.
-- Definer, because a pod sees no runs but its own.
create function private.retire_failing_pod(for_worker text) returns void
language sql security definer
set search_path = ''
as $$
    with newest as (
        select r.job_id, r.status, r.started_at from ledger.runs r
        where r.organization_id = (select private.my_org()) and r.worker_id = for_worker and r.finished_at is not null
        order by r.created_at desc
        limit 5)
    update ledger.worker w set status = 'draining', reason = 'five failed runs in a row'
    where w.organization_id = (select private.my_org()) and w.id = for_worker and w.status in ('active', 'busy')
      and (select count(*) = 5 and bool_and(n.status = 'failed') and count(distinct n.job_id) > 1 from newest n)
      and exists (select from ledger.runs r
                  where r.organization_id = w.organization_id and r.status = 'completed' and r.worker_id <> w.id
                    and r.finished_at > (select min(n.started_at) from newest n))
$$;

-- Ends a run under its lease: run, job, outputs and pod in one transaction. `result` is completed, failed, canceled or lost.
create function public.finish_run(
    for_run uuid, as_boot uuid, result text, why text default null, log_file_id text default null,
    result_outputs jsonb default null
) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held_job ledger.jobs;
    held_run ledger.runs;
    again boolean;
    outputs_found jsonb;
begin
    if result is null or result not in ('completed', 'failed', 'canceled', 'lost') then
        raise exception 'result=% is none of completed, failed, canceled, lost', quote_nullable(result) using errcode = '22023';
    end if;
    select j.* into held_job from ledger.jobs j join ledger.runs r on r.job_id = j.id where r.id = for_run for update of j;
    select * into held_run from ledger.runs r where r.id = for_run and r.boot = as_boot for update;
    if held_run.id is null or held_run.status not in ('in_progress', result) then
        return query select jsonb_build_object('outcome', 'stale', 'status', held_run.status);
        return;
    elsif held_run.status = result then  -- asked again: the first answer was lost on the way
        return query select jsonb_build_object('outcome', 'finished', 'job', to_jsonb(held_job));
        return;
    end if;
    if result = 'completed' then  -- read while the run is still held: a pod sees its events no longer
        outputs_found := coalesce(result_outputs, (select o from public.latest_events(null, null, for_run) as o));
    end if;
    update ledger.runs r set log_file = log_file_id where r.id = for_run;
    if result = 'lost' then
        perform private.lose_run(for_run, why);
    else
        again := result = 'failed' and not held_job.cancel_requested and held_job.failed_attempts < held_job.retries;
        update ledger.runs r set status = result, error = why, finished_at = now() where r.id = for_run;
        update ledger.jobs j
        set status = case when again then 'pending' else result end,
            attempt = j.attempt + again::int,
            failed_attempts = j.failed_attempts + (result = 'failed')::int,
            lost_attempts = 0,
            error = case when again then null else why end,
            outputs = outputs_found,
            started_at = case when again then null else j.started_at end,
            finished_at = case when again then null else now() end
        where j.id = held_job.id and j.status = 'in_progress';
    end if;
    update ledger.worker w
    set status = case when w.status = 'busy' then 'active' else w.status end, run_id = null, idle_since = now(),
        cached_models = case when held_job.model is null or held_job.model = any (w.cached_models) then w.cached_models
                             else w.cached_models || held_job.model end
    where w.id = held_run.worker_id and w.run_id = for_run;
    if result = 'failed' then
        perform private.retire_failing_pod(held_run.worker_id);
    end if;
    perform private.notify('ow_job', held_job.id);
    perform private.wake_workers();
    return query select jsonb_build_object('outcome', 'finished', 'job', to_jsonb(j)) from ledger.jobs j where j.id = held_job.id;
end
$$;

-- The pod asks to end. Refused while it holds a run or was hinted at one just now, unless `forced`.
create function public.release_pod(for_worker text, as_boot uuid, why text, forced boolean default false) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.worker w set status = 'draining', reason = why
    where w.id = for_worker and w.boot = as_boot and w.run_id is null and w.status in ('active', 'draining')
      and (forced or not exists (select 1 from ledger.runs r where r.status = 'pending' and r.hinted_worker_id = w.id
                                 and r.hinted_at > now() - interval '10 seconds'));
    if found then
        perform private.wake_workers();
    end if;
    return query select jsonb_build_object('outcome', case when found then 'draining' else 'refused' end);
end
$$;

-- The pod found its machine unusable.
create function public.reject_pod(for_worker text, why text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    rejected boolean := private.condemn_pod(for_worker, 'lost', left('unusable host: ' || why, 500));
begin
    if rejected then
        perform private.wake_workers();
    end if;
    return query select jsonb_build_object('outcome', case when rejected then 'rejected' else 'refused' end);
end
$$;

-- Moves the deadline of a pod to so many seconds from now, and reserves what that may cost. Called by people, and by a
-- pod for itself.
create function public.extend_pod(for_worker text, deadline_seconds double precision) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    pod ledger.worker;
    deadline timestamptz;
begin
    if deadline_seconds is null or not deadline_seconds between 0 and 30 * 86400 then
        raise exception 'deadline_seconds=% is not between 0 and 30 days', deadline_seconds using errcode = '22023';
    end if;
    deadline := now() + make_interval(secs => deadline_seconds);
    perform pg_advisory_xact_lock(hashtextextended('ow_pods:' || org::text, 0));
    select * into pod from ledger.worker w
    where w.organization_id = org and w.id = for_worker and w.status in ('starting', 'active', 'busy')
      and (private.claims() ->> 'role' <> 'ow_pod' or w.id = private.my_pod())
    for update;
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    elsif deadline > pod.deadline_at
          and private.over_budget(pod.price_per_hour * extract(epoch from deadline - pod.deadline_at) / 3600) then
        return query select jsonb_build_object('outcome', 'budget',
                                               'deadline_seconds', extract(epoch from pod.deadline_at - now()));
        return;
    end if;
    update ledger.worker w set deadline_at = deadline where w.organization_id = org and w.id = pod.id;
    update ledger.reservations r set usd = pod.price_per_hour * extract(epoch from deadline - pod.created_at) / 3600
    where r.organization_id = org and r.worker_id = pod.id;
    perform private.notify('ow_pod', pod.id);
    return query select jsonb_build_object('outcome', 'extended', 'deadline_seconds', deadline_seconds);
end
$$;
