-- What the control plane calls: flow runs for jobs, hints, the fleet, and the reconciler.

-- Until when a pod counts as alive: by its lease, or for as long again after what its run logged last.
create function private.heard_until(pod ledger.worker) returns timestamptz
language sql stable
set search_path = ''
as $$
    select greatest(pod.lease_expires_at,
                    (select r.logged_at + make_interval(secs => pod.lease_seconds) from ledger.runs r where r.id = pod.run_id))
$$;

-- A pod with its ages. It is silent when its lease ran out and its run has logged nothing for a while either.
create function private.shown_pod(pod ledger.worker) returns jsonb
language sql stable
set search_path = ''
as $$
    select to_jsonb(pod) - 'bootstrap_hash' - 'session_hash' - 'proxy_hash' || jsonb_build_object(
        'age_seconds', extract(epoch from now() - pod.created_at),
        'idle_seconds', extract(epoch from now() - pod.idle_since),
        'overdue_seconds', extract(epoch from now() - pod.deadline_at),
        'heartbeat_seconds', extract(epoch from now() - pod.heartbeat_at),
        'silent_seconds', case when pod.status in ('active', 'busy', 'draining')
                               then extract(epoch from now() - private.heard_until(pod)) end)
$$;

-- Everything that one pass of the worker looks at. Of the waiting jobs the first of each kind of need come before the
-- rest of any kind: what nothing can run now does not stand in the way of what could run.
create function public.control_snapshot(max_waiting int default 100) returns setof jsonb
language plpgsql stable
set search_path = ''
as $$
declare
    org uuid := private.my_org();
begin
    return query
    with line as materialized (select * from private.waiting_line()),
    chosen as materialized (
        select * from line order by (place_in_class - 1) / 10, place limit max_waiting),
    waiting as (
        select c.place, c.needs_class, j.id as job_id, r.id as run_id, j.attempt, j.type, j.model, j.params, j.mounts,
               j.entrypoint, j.docker_image, j.requires_vram_gb, j.allowed_hardware, j.max_price_per_hour, j.cloud,
               j.min_cuda, j.min_vcpu, j.min_ram_gb, j.priority, j.created_by as owner, j.created_at, j.pending_reason,
               r.hinted_worker_id, extract(epoch from now() - r.hinted_at) as hinted_seconds_ago, r.ceiling_per_hour
        from chosen c
        join ledger.jobs j on j.organization_id = org and j.id = c.job_id
        left join ledger.runs r on r.organization_id = org and r.job_id = j.id and r.attempt = j.attempt),
    fitting as (
        select c.needs_class, array_agg(w.id) as workers
        from (select distinct on (n.needs_class) n.needs_class, n.job_id from chosen n) as c
        join ledger.jobs j on j.organization_id = org and j.id = c.job_id
        join ledger.worker w on w.organization_id = org and w.status in ('starting', 'active') and not w.shutdown_requested
                            and private.fits(j, w)
        group by c.needs_class)
    select jsonb_build_object(
        'waiting', (select coalesce(jsonb_agg(to_jsonb(waiting) - 'place' order by place), '[]') from waiting),
        'waiting_total', (select count(*) from line),
        'released', (select count(*) from ledger.runs r where r.organization_id = org and r.status = 'pending'),
        'fitting', (select coalesce(jsonb_object_agg(f.needs_class, f.workers), '{}') from fitting f),
        'pods', (select coalesce(jsonb_agg(private.shown_pod(w) order by w.created_at), '[]')
                 from ledger.worker w where w.organization_id = org and w.status <> 'terminated'),
        'refusals', (select coalesce(jsonb_object_agg(f.subject, jsonb_build_object(
                         'failures', f.failures, 'reason', f.reason, 'seconds_left', extract(epoch from f.until - now()))), '{}')
                     from ledger.refusals f where f.organization_id = org and f.until > now() - interval '6 hours'),
        'unmirrored', (select coalesce(jsonb_agg(jsonb_build_object('run_id', r.id, 'job_id', r.job_id, 'status', r.status,
                           'error', r.error) order by r.finished_at), '[]')
                       from (select * from ledger.runs u where u.organization_id = org and not u.mirrored
                               and (u.status in ('lost', 'canceled')
                                    or (u.status in ('completed', 'failed')
                                        and (u.started_at is null or u.finished_at < now() - interval '10 seconds')))
                             order by u.finished_at limit 100) as r));
end
$$;

-- Ties a flow run to the attempt that it is for.
create function public.record_flow_run(for_job text, for_attempt int, flow_run uuid, ceiling double precision default null)
returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    held ledger.jobs;
begin
    select * into held from ledger.jobs j where j.id = for_job for update;
    if held.status = 'pending' and held.attempt = for_attempt then
        insert into ledger.runs (id, organization_id, job_id, attempt, token_id, ceiling_per_hour)
        values (flow_run, held.organization_id, for_job, for_attempt, held.token_id, ceiling)
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

-- What a warm pod may cost at most to be worth taking, by run id; null: whatever it costs.
create function public.set_ceilings(ceilings jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.runs r set ceiling_per_hour = c.value::numeric
    from jsonb_each_text(ceilings) as c
    where r.id = c.key::uuid and r.status = 'pending';
    return query select jsonb_build_object('outcome', 'set');
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
                                   price_per_hour, bought_for, cuda, vcpu, ram_gb, bootstrap_hash, deadline_at)
        values (wanted.id, org, wanted.docker_image, wanted.hardware, wanted.gpu_type, wanted.gpu_count, wanted.vram_gb,
                wanted.cloud, wanted.price_per_hour, wanted.bought_for, wanted.cuda, coalesce(wanted.vcpu, 0),
                coalesce(wanted.ram_gb, 0), intend_pod.bootstrap_hash, now() + make_interval(secs => ttl_seconds));
        insert into ledger.reservations (organization_id, worker_id, usd) values (org, wanted.id, most);
    end if;
    return query select jsonb_build_object('outcome', 'intended', 'deadline_at', extract(epoch from w.deadline_at))
                 from ledger.worker w where w.id = wanted.id;
end
$$;

-- The provider's id and price of a pod that was bought or adopted, and what it tells of the machine: `host`, `cuda`,
-- `vcpu`, `ram_gb`, and `created_at`, when its bill began.
create function public.record_pod(for_worker text, provider_id text, price double precision, details jsonb default '{}')
returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    told ledger.worker := jsonb_populate_record(null::ledger.worker, details - 'created_at');
begin
    update ledger.worker w
    set pod_id = provider_id, price_per_hour = price, host = coalesce(told.host, w.host), cuda = coalesce(told.cuda, w.cuda),
        vcpu = coalesce(nullif(told.vcpu, 0), w.vcpu), ram_gb = coalesce(nullif(told.ram_gb, 0), w.ram_gb)
    where w.id = for_worker and w.status <> 'terminated' and (w.pod_id is null or w.pod_id = provider_id);
    if not found then
        -- Given up as never created, and there it is after all: it is on the bill, and is to be ended.
        update ledger.worker w
        set pod_id = provider_id, price_per_hour = price, status = 'lost', terminated_at = null, reason = 'found after it was given up'
        where w.id = for_worker and w.status = 'terminated' and w.pod_id is null;
        if not found then
            return query select jsonb_build_object('outcome', 'refused');
            return;
        end if;
        insert into ledger.reservations (organization_id, worker_id, usd)
        select w.organization_id, w.id, 0 from ledger.worker w where w.id = for_worker
        on conflict do nothing;
    end if;
    update ledger.reservations r set usd = price * extract(epoch from w.deadline_at - w.created_at) / 3600
    from ledger.worker w where w.id = for_worker and r.worker_id = w.id and r.organization_id = w.organization_id;
    -- The provider's clock may be wrong: the bill began after the intent was written, and not after now.
    update ledger.pod_intervals i
    set started_at = greatest(w.created_at, least((details ->> 'created_at')::timestamptz, coalesce(i.ended_at, now())))
    from ledger.worker w
    where w.id = for_worker and i.worker_id = w.id and i.organization_id = w.organization_id and details ? 'created_at'
      and i.id = (select min(f.id) from ledger.pod_intervals f
                  where f.organization_id = w.organization_id and f.worker_id = w.id);
    return query select jsonb_build_object('outcome', 'recorded');
end
$$;

-- The pod is judged dead: its run is lost, and it is to be terminated. One that ended before it took any work counts
-- (`counts`) against the job that it was bought for, which fails when that happened three times in a row.
create function public.lose_pod(for_worker text, why text, counts boolean default true) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    pod ledger.worker;
begin
    select * into pod from ledger.worker w where w.id = for_worker;
    perform from ledger.jobs j where j.id = pod.bought_for for update;  -- before the worker: job, run, worker
    if not private.condemn_pod(for_worker, 'lost', why) then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    if counts and exists (select from ledger.worker w where w.id = for_worker and w.active_at is null) then
        update ledger.jobs j set lost_attempts = j.lost_attempts + 1 where j.id = pod.bought_for and j.status = 'pending';
        if exists (select from ledger.jobs j where j.id = pod.bought_for and j.status = 'pending' and j.lost_attempts >= 3) then
            perform public.fail_job(pod.bought_for, 'Lost 3 pods in a row; the last one: ' || why);
        end if;
    end if;
    perform private.wake_workers();
    return query select jsonb_build_object('outcome', 'lost');
end
$$;

-- What the ledger knows of these pods, whether they have ended or not.
create function public.known_pods(worker_ids text[]) returns setof jsonb
language sql stable
set search_path = ''
as $$
    select jsonb_build_object('worker_id', w.id, 'pod_id', w.pod_id, 'status', w.status, 'docker_image', w.docker_image,
                              'age_seconds', extract(epoch from now() - w.created_at))
    from ledger.worker w where private.known_caller() and w.id = any (worker_ids)
$$;

-- One create made two pods; the second one was ended after so many seconds, and is on the bill of the first.
create function public.record_duplicate(for_worker text, provider_id text, price double precision, seconds double precision)
returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    insert into ledger.pod_intervals (organization_id, worker_id, kind, price_per_hour, started_at, ended_at, duplicate)
    select w.organization_id, w.id, 'teardown', price, now() - make_interval(secs => greatest(0, seconds)), now(), provider_id
    from ledger.worker w where w.id = for_worker
    on conflict do nothing;
    return query select jsonb_build_object('outcome', 'recorded');
end
$$;

-- Pods that are silent: of those that the caller has seen silent for a while, or of all. Their runs are lost at once; a
-- stale holder's writes change nothing from here on.
create function public.expire_leases(silent text[] default null) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    pod text;
begin
    perform private.my_org();
    for pod in select w.id from ledger.worker w
               where w.status in ('active', 'busy', 'draining') and private.heard_until(w) < now()
                 and (silent is null or w.id = any (silent))
               order by w.id loop
        if private.condemn_pod(pod, 'lost', 'pod ' || pod || ' was silent for longer than its lease', true) then
            perform private.wake_workers();
            return query select jsonb_build_object('worker_id', pod);
        end if;
    end loop;
end
$$;

-- The provider confirmed that the pod is gone, or it never existed. Its bill ended `billed_seconds_ago`, as far as anybody
-- saw, and not before its last heartbeat.
create function public.end_pod(for_worker text, why text default null, billed_seconds_ago double precision default 0)
returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    bill_ended timestamptz := now() - make_interval(secs => greatest(0, billed_seconds_ago));
begin
    if not private.condemn_pod(for_worker, 'terminated', coalesce(why, 'the pod ended')) then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    bill_ended := greatest(bill_ended, (select w.heartbeat_at from ledger.worker w where w.id = for_worker));
    update ledger.pod_intervals i
    set started_at = least(i.started_at, greatest(bill_ended, w.created_at)), ended_at = greatest(bill_ended, w.created_at)
    from ledger.worker w
    where w.id = for_worker and i.organization_id = w.organization_id and i.worker_id = w.id and i.ended_at > bill_ended;
    delete from ledger.reservations r where r.worker_id = for_worker;
    return query select jsonb_build_object('outcome', 'terminated');
end
$$;

-- A waiting job that no pod can ever run.
create function public.fail_job(for_job text, why text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.jobs j set status = 'failed', error = left(why, 2000), finished_at = now(), pending_reason = null
    where j.id = for_job and j.status = 'pending';
    if not found then
        return query select jsonb_build_object('outcome', 'refused');
        return;
    end if;
    update ledger.runs r set status = 'failed', error = left(why, 2000), finished_at = now()
    where r.job_id = for_job and r.status = 'pending';
    perform private.notify('ow_job', for_job);
    perform private.wake_workers();
    return query select jsonb_build_object('outcome', 'failed');
end
$$;

-- The pod that shows this to the proxy of the Prefect API, and the runs that it may speak of: those that it holds or is
-- pointed at, and for a minute those that it ended.
create function public.pod_of_proxy(hash text) returns setof jsonb
language sql stable
set search_path = ''
as $$
    select jsonb_build_object('worker_id', w.id, 'organization_id', w.organization_id, 'run_ids', (
        select coalesce(jsonb_agg(r.id), '[]') from ledger.runs r
        where r.organization_id = w.organization_id
          and ((r.worker_id = w.id and (r.status = 'in_progress' or r.finished_at > now() - interval '1 minute'))
               or (r.hinted_worker_id = w.id and r.status = 'pending'))))
    from ledger.worker w
    where private.known_caller() and w.proxy_hash = hash and w.status in ('active', 'busy', 'draining')
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
