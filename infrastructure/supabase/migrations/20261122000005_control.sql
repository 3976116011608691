-- What the control plane calls: flow runs for jobs, hints, the fleet, and the reconciler.

-- Everything that one pass of the worker looks at.
create function public.control_snapshot(max_waiting int default 100) returns setof jsonb
language sql stable
set search_path = ''
as $$
    with waiting as (
        select j.id as job_id, r.id as run_id, j.attempt, j.type, j.model, j.params, j.mounts, j.entrypoint,
               j.docker_image, j.requires_vram_gb,
               j.allowed_hardware, j.max_price_per_hour, j.priority, j.created_at, j.pending_reason,
               r.hinted_worker_id, extract(epoch from now() - r.hinted_at) as hinted_seconds_ago
        from ledger.jobs j left join ledger.runs r on r.organization_id = j.organization_id and r.job_id = j.id and r.attempt = j.attempt
        where j.organization_id = (select private.my_org()) and j.status = 'pending'
        order by j.priority desc, j.created_at
        limit max_waiting)
    select jsonb_build_object(
        'waiting', (select coalesce(jsonb_agg(to_jsonb(waiting) order by priority desc, created_at), '[]') from waiting),
        'pods', (select coalesce(jsonb_agg(to_jsonb(w) - 'bootstrap_hash' - 'session_hash' || jsonb_build_object(
                     'age_seconds', extract(epoch from now() - w.created_at),
                     'overdue_seconds', extract(epoch from now() - w.deadline_at)) order by w.created_at), '[]')
                 from ledger.worker w where w.status <> 'terminated'),
        'unmirrored', (select coalesce(jsonb_agg(jsonb_build_object('run_id', r.id, 'job_id', r.job_id, 'status', r.status,
                           'error', r.error) order by r.finished_at), '[]')
                       from (select * from ledger.runs u where not u.mirrored
                               and (u.status in ('lost', 'canceled')
                                    or (u.status in ('completed', 'failed') and u.finished_at < now() - interval '10 seconds'))
                             order by u.finished_at limit 100) as r))
$$;

-- Ties a flow run to the attempt that it is for.
create function public.record_flow_run(for_job text, for_attempt int, flow_run uuid) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
begin
    select * into held from ledger.jobs j where j.id = for_job for update;
    if held.status = 'pending' and held.attempt = for_attempt then
        insert into ledger.runs (id, organization_id, job_id, attempt, token_id)
        values (flow_run, held.organization_id, for_job, for_attempt, held.token_id)
        on conflict do nothing;
    end if;
    return query select jsonb_build_object('outcome', case when exists (
        select 1 from ledger.runs r where r.id = flow_run and r.job_id = for_job and r.attempt = for_attempt)
        then 'recorded' else 'stale' end);
end
$$;

-- A flow run that somebody else created (a schedule, the Prefect UI, `prefect deployment run`) for a job:
-- adopted as its attempt, or following the run that exists, or answered from the finished job.
create function public.adopt_flow_run(job jsonb, flow_run uuid, created timestamptz) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
    submitted jsonb;
begin
    select * into held from ledger.jobs j where j.id = job ->> 'id' for update;
    if held.status in ('failed', 'canceled') and held.finished_at > created then
        return query select jsonb_build_object('outcome', held.status, 'job', to_jsonb(held));
        return;
    end if;
    select s into submitted from public.submit_job(job) as s;
    if submitted ->> 'outcome' in ('missing_secrets', 'missing_files', 'limit', 'completed') then
        return query select submitted;
        return;
    end if;
    if (select o ->> 'outcome' from public.record_flow_run(job ->> 'id', (submitted -> 'job' ->> 'attempt')::int, flow_run) as o) = 'recorded' then
        perform private.wake_workers();
        return query select jsonb_set(submitted, '{outcome}', '"adopted"');
    else
        return query select jsonb_set(submitted, '{outcome}', '"following"');
    end if;
end
$$;

-- Points waiting runs at idle pods: `hints` maps run ids to worker ids.
create function public.hint_runs(hints jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.runs r set hinted_worker_id = h.value, hinted_at = now()
    from jsonb_each_text(hints) as h
    where r.id = h.key::uuid and r.status = 'pending';
    perform private.notify('ow_pod', h.value) from jsonb_each_text(hints) as h;
    return query select jsonb_build_object('outcome', 'hinted');
end
$$;

create function public.set_pending_reasons(reasons jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.jobs j set pending_reason = r.value
    from jsonb_each_text(reasons) as r
    where j.id = r.key and j.status = 'pending' and j.pending_reason is distinct from r.value;
    return query select jsonb_build_object('outcome', 'set');
end
$$;

-- The row that must exist before a pod is bought. Counted under a lock, so that the limit holds for all workers together.
-- `bootstrap_hash` is of the one-time token that the pod will find in its environment.
create function public.intend_pod(pod jsonb, bootstrap_hash text, ttl_seconds double precision, max_pods int)
returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    wanted ledger.worker := jsonb_populate_record(null::ledger.worker, pod);
    most numeric := wanted.price_per_hour * ttl_seconds / 3600;
begin
    perform pg_advisory_xact_lock(hashtextextended('ow_pods:' || org::text, 0));
    if not exists (select 1 from ledger.worker w where w.id = wanted.id) then  -- else asked again: the first answer was lost
        if (select count(*) from ledger.worker w where w.organization_id = org and w.status <> 'terminated')
           >= coalesce(max_pods, 0) then
            return query select jsonb_build_object('outcome', 'limit');
            return;
        elsif private.over_budget(most) then
            return query select jsonb_build_object('outcome', 'budget');
            return;
        end if;
        insert into ledger.worker (id, organization_id, docker_image, hardware, gpu_type, gpu_count, vram_gb, cloud,
                                   price_per_hour, bootstrap_hash, deadline_at)
        values (wanted.id, org, wanted.docker_image, wanted.hardware, wanted.gpu_type, wanted.gpu_count, wanted.vram_gb,
                wanted.cloud, wanted.price_per_hour, intend_pod.bootstrap_hash,
                now() + make_interval(secs => ttl_seconds));
        insert into ledger.reservations (organization_id, worker_id, usd) values (org, wanted.id, most);
    end if;
    return query select jsonb_build_object('outcome', 'intended', 'deadline_at', extract(epoch from w.deadline_at))
                 from ledger.worker w where w.id = wanted.id;
end
$$;

-- The provider's id and price of a pod that was bought or adopted.
create function public.record_pod(for_worker text, provider_id text, price double precision) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.worker w set pod_id = provider_id, price_per_hour = price
    where w.id = for_worker and w.status <> 'terminated' and (w.pod_id is null or w.pod_id = provider_id);
    if not found then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    update ledger.reservations r set usd = price * extract(epoch from w.deadline_at - w.created_at) / 3600
    from ledger.worker w where w.id = for_worker and r.worker_id = w.id and r.organization_id = w.organization_id;
    return query select jsonb_build_object('outcome', 'recorded');
end
$$;

-- The pod is judged dead: its run is lost, and it is to be terminated.
create function public.lose_pod(for_worker text, why text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    if not private.condemn_pod(for_worker, 'lost', why) then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    perform private.wake_workers();
    return query select jsonb_build_object('outcome', 'lost');
end
$$;

-- Pods whose lease ran out. Their runs are lost at once; a stale holder's writes change nothing from here on.
create function public.expire_leases() returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    silent text;
begin
    perform private.my_org();
    for silent in select w.id from ledger.worker w
                  where w.status in ('active', 'busy', 'draining') and w.lease_expires_at < now() order by w.id loop
        if private.condemn_pod(silent, 'lost', 'pod ' || silent || ' was silent for longer than its lease', true) then
            perform private.wake_workers();
            return query select jsonb_build_object('worker_id', silent);
        end if;
    end loop;
end
$$;

-- The provider confirmed that the pod is gone, or it never existed.
create function public.end_pod(for_worker text, why text default null) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    if not private.condemn_pod(for_worker, 'terminated', coalesce(why, 'the pod ended')) then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    delete from ledger.reservations r where r.worker_id = for_worker;
    return query select jsonb_build_object('outcome', 'terminated');
end
$$;

-- A waiting run whose flow run is gone: the job gets another attempt, a flow of the user's own is canceled.
create function public.abandon_run(for_run uuid, why text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
begin
    select j.* into held from ledger.jobs j join ledger.runs r on r.job_id = j.id where r.id = for_run for update of j;
    update ledger.runs r
    set status = 'lost', error = why, finished_at = now(), mirrored = true, worker_id = coalesce(private.my_pod(), r.worker_id)
    where r.id = for_run and r.status = 'pending';
    if found and held.status = 'pending' then
        update ledger.jobs j
        set status = case when j.entrypoint is null then 'canceled' else j.status end,
            finished_at = case when j.entrypoint is null then now() end,
            attempt = j.attempt + (j.entrypoint is not null)::int
        where j.id = held.id;
        perform private.notify('ow_job', held.id);
        perform private.wake_workers();
    end if;
    return query select jsonb_build_object('outcome', 'abandoned');
end
$$;

-- The pod is to end when its run has ended; its next heartbeat says so.
create function public.request_shutdown(for_worker text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.worker w set shutdown_requested = true where w.id = for_worker and w.status <> 'terminated';
    if not found then
        return query select jsonb_build_object('outcome', 'not_found');
        return;
    end if;
    perform private.notify('ow_pod', for_worker);
    return query select jsonb_build_object('outcome', 'requested');
end
$$;

create function public.mark_mirrored(run_ids uuid[]) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    perform private.my_org();
    update ledger.runs r set mirrored = true where r.id = any (run_ids);
    return query select jsonb_build_object('outcome', 'marked');
end
$$;

-- Runs that the ledger knows, among these flow runs.
create function public.known_runs(flow_runs uuid[]) returns setof jsonb
language sql stable
set search_path = ''
as $$
    select jsonb_build_object('run_id', r.id, 'job_id', r.job_id, 'status', r.status, 'worker_id', r.worker_id,
                              'mirrored', r.mirrored)
    from ledger.runs r where private.known_caller() and r.id = any (flow_runs)
$$;
