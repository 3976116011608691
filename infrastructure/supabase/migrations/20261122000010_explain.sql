-- What the control plane knows about the provider, and why a job waits.

-- What the provider offers now, and the limits under which the control plane buys.
create function public.publish_catalogue(offers jsonb, limits jsonb) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    org uuid := private.my_org();
begin
    if offers = '{}' then  -- an empty list, to a client that does not know the type
        offers := '[]';
    end if;
    if jsonb_typeof(offers) is distinct from 'array' or jsonb_typeof(limits) is distinct from 'object' then
        raise exception 'offers is not an array, or limits is not an object' using errcode = '22023';
    end if;
    insert into ledger.catalogues as c (organization_id, offers, limits)
    values (org, publish_catalogue.offers, publish_catalogue.limits)
    on conflict (organization_id) do update set offers = excluded.offers, limits = excluded.limits, updated_at = now();
    return query select jsonb_build_object('outcome', 'published');
end
$$;

-- The provider refused `subject`, which is left alone for so many seconds. Failures count up until it is cleared, or was
-- left alone for a day; what nobody asked for in a week is forgotten.
create function public.note_refusal(subject text, why text, seconds double precision) returns setof jsonb
language plpgsql
set search_path = ''
as $$
#variable_conflict use_column
declare
    org uuid := private.my_org();
begin
    if seconds is null or not seconds between 0 and 30 * 86400 then
        raise exception 'seconds=% is not between 0 and 30 days', seconds using errcode = '22023';
    end if;
    delete from ledger.refusals f where f.organization_id = org and f.until < now() - interval '7 days';
    insert into ledger.refusals as f (organization_id, subject, failures, reason, until)
    values (org, note_refusal.subject, 1, left(why, 2000), now() + make_interval(secs => seconds))
    on conflict (organization_id, subject) do update
    set failures = case when f.until < now() - interval '1 day' then 1 else f.failures + 1 end,
        reason = excluded.reason, refused_at = now(), until = excluded.until;
    return query select jsonb_build_object('outcome', 'noted', 'failures', f.failures)
                 from ledger.refusals f where f.organization_id = org and f.subject = note_refusal.subject;
end
$$;

create function public.clear_refusal(subject text) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    delete from ledger.refusals f where f.organization_id = private.my_org() and f.subject = clear_refusal.subject;
    return query select jsonb_build_object('outcome', 'cleared');
end
$$;

-- Everything that says when a job begins and what it costs; no row for an unknown job. `ahead` are the five before it,
-- the nearest first; `ahead_for_same_pods` counts those of all before it that need the same.
create function public.explain_job(job_id text) returns setof jsonb
language plpgsql stable
set search_path = ''
as $$
#variable_conflict use_column
declare
    org uuid := private.my_org();
    wanted ledger.jobs;
    position bigint;
    rivals bigint;
    ahead jsonb;
begin
    select * into wanted from ledger.jobs j where j.organization_id = org and j.id = explain_job.job_id;
    if not found then
        return;
    end if;
    with line as materialized (select * from private.waiting_line()),
    mine as (select * from line l where l.job_id = wanted.id)
    select m.place, m.place_in_class - 1, (
               select jsonb_agg(jsonb_build_object('job_id', j.id, 'type', j.type, 'priority', j.priority) order by b.place desc)
               from (select * from line l where l.place < m.place order by l.place desc limit 5) as b
               join ledger.jobs j on j.organization_id = org and j.id = b.job_id)
    into position, rivals, ahead from mine m;
    return query select jsonb_build_object(
        'job', to_jsonb(wanted), 'position', position, 'ahead', coalesce(ahead, '[]'),
        'ahead_for_same_pods', rivals,
        'waiting_total', (select count(*) from ledger.jobs j where j.organization_id = org and j.status = 'pending'),
        'pods', (select coalesce(jsonb_agg(private.shown_pod(w) - 'boot' order by w.created_at), '[]')
                 from ledger.worker w where w.organization_id = org and w.status <> 'terminated'),
        'fitting', (select coalesce(jsonb_agg(w.id order by w.created_at), '[]') from ledger.worker w
                    where w.organization_id = org and w.status <> 'terminated' and private.fits(wanted, w)),
        'catalogue', (select jsonb_build_object('offers', c.offers, 'limits', c.limits,
                                                'age_seconds', extract(epoch from now() - c.updated_at))
                      from ledger.catalogues c where c.organization_id = org),
        'refusals', (select coalesce(jsonb_object_agg(f.subject, jsonb_build_object(
                         'failures', f.failures, 'reason', f.reason, 'seconds_left', extract(epoch from f.until - now()),
                         'seconds_ago', extract(epoch from now() - f.refused_at))), '{}')
                     from ledger.refusals f where f.organization_id = org),
        'budget', (select b from public.get_budget() as b),
        'boot_seconds', private.median_boot_seconds(), 'run_seconds', private.median_run_seconds(wanted.type),
        'cost', (select c from public.job_cost(wanted.id) as c),
        'runs', (select coalesce(jsonb_agg(r.run order by r.attempt), '[]') from (
                     select r.attempt, jsonb_build_object(
                                'id', r.id, 'attempt', r.attempt, 'status', r.status, 'error', r.error, 'worker_id', r.worker_id,
                                'hardware', w.hardware, 'cloud', w.cloud, 'price_per_hour', w.price_per_hour,
                                'pod_reason', w.reason, 'started_at', r.started_at, 'finished_at', r.finished_at,
                                'seconds', extract(epoch from coalesce(r.finished_at, now()) - r.started_at)) as run
                     from ledger.runs r
                     left join ledger.worker w on w.organization_id = org and w.id = r.worker_id
                     where r.organization_id = org and r.job_id = wanted.id
                     order by r.attempt desc limit 5) as r));
end
$$;

-- How long the last pods that came up took for it; null when none did.
create function private.median_boot_seconds() returns double precision
language sql stable
set search_path = ''
as $$
    select percentile_cont(0.5) within group (order by extract(epoch from w.active_at - w.created_at))
    from (select w.active_at, w.created_at from ledger.worker w
          where w.organization_id = (select private.my_org()) and w.active_at is not null
          order by w.created_at desc limit 20) as w
$$;

-- How long the last completed jobs of a type ran; null when none did.
create function private.median_run_seconds(job_type text) returns double precision
language sql stable
set search_path = ''
as $$
    select percentile_cont(0.5) within group (order by extract(epoch from r.finished_at - r.started_at))
    from (select j.organization_id, j.id, j.attempt from ledger.jobs j
          where j.organization_id = (select private.my_org()) and j.type = job_type and j.status = 'completed'
          order by j.created_at desc limit 50) as j
    join ledger.runs r on r.organization_id = j.organization_id and r.job_id = j.id and r.attempt = j.attempt
$$;
