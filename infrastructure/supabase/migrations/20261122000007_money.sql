-- What pods cost and for whom, budgets and their reservations.

-- A change of a pod's state ends one interval and begins the next. The price is the pod's, frozen when it was bought.
create function private.track_interval() returns trigger
language plpgsql security definer
set search_path = ''
as $$
declare
    kind_now text := case new.status when 'starting' then 'boot' when 'active' then 'idle' when 'busy' then 'run'
                                     when 'terminated' then null
                                     else case when new.run_id is not null then 'run' else 'teardown' end end;
begin
    if tg_op = 'UPDATE' and new.price_per_hour <> old.price_per_hour then
        update ledger.pod_intervals i set price_per_hour = new.price_per_hour
        where i.organization_id = new.organization_id and i.worker_id = new.id;
    end if;
    if tg_op = 'UPDATE' and new.status = old.status and new.run_id is not distinct from old.run_id then
        return null;
    end if;
    update ledger.pod_intervals i set ended_at = now()
    where i.organization_id = new.organization_id and i.worker_id = new.id and i.ended_at is null;
    if kind_now is not null then
        insert into ledger.pod_intervals (organization_id, worker_id, kind, run_id, price_per_hour, started_at)
        values (new.organization_id, new.id, kind_now, case kind_now when 'run' then new.run_id end, new.price_per_hour, now());
    elsif new.pod_id is null then
        -- It never existed at the provider: nothing was paid.
        delete from ledger.pod_intervals i where i.organization_id = new.organization_id and i.worker_id = new.id;
    end if;
    return null;
end
$$;

create trigger track_interval after insert or update of status, run_id, price_per_hour on ledger.worker
    for each row execute function private.track_interval();

create function private.cost_usd(spell ledger.pod_intervals) returns numeric
language sql stable
set search_path = ''
as $$ select spell.price_per_hour * extract(epoch from coalesce(spell.ended_at, now()) - spell.started_at) / 3600 $$;

-- Every second of pods, charged to the runs that caused it. What a pod did while it ran nothing (boot, idle, teardown) is
-- shared among all of its runs by how long they ran, whenever that was: the parts of a longer time add up to the whole.
-- `run_id` is null for a pod that ran nothing. Of a run that found its pod warm, `saved_usd` is what another boot would
-- have cost. Without `by_run` nothing is shared. `day` is the UTC midnight before it, when that is asked for. `run_seconds`
-- is null where nothing ran.
create function private.charges(
    for_org uuid, since timestamptz default null, until timestamptz default null, by_day boolean default false,
    by_run boolean default true, of_pods text[] default null
) returns table (worker_id text, run_id uuid, day timestamptz, run_seconds float8, direct_usd float8, boot_usd float8,
                 idle_usd float8, teardown_usd float8, saved_usd float8)
language sql stable
set search_path = ''
as $$
    with spell as materialized (
        select i.worker_id, i.kind, case i.kind when 'run' then i.run_id end as run_id, i.price_per_hour::float8 / 3600 as price,
               i.started_at, coalesce(i.ended_at, now()) as ended_at
        from ledger.pod_intervals i
        where i.organization_id = for_org and (of_pods is null or i.worker_id = any (of_pods))
    ), ran as materialized (
        select t.worker_id, t.run_id, t.started_at,
               row_number() over (partition by t.worker_id order by t.started_at, t.run_id) as turn,
               -- Runs that took no time share alike.
               coalesce(t.seconds / nullif(sum(t.seconds) over (partition by t.worker_id), 0),
                        1.0::float8 / count(*) over (partition by t.worker_id)) as share
        from (select s.worker_id, s.run_id, min(s.started_at) as started_at,
                     sum(date_part('epoch', s.ended_at - s.started_at)) as seconds
              from spell s where s.run_id is not null group by s.worker_id, s.run_id) as t
    ), piece as materialized (
        select c.worker_id, c.run_id, c.kind, c.day, c.seconds, c.seconds * c.price as usd
        from (select s.worker_id, s.run_id, s.kind, s.price, null::timestamptz as day, s.started_at = s.ended_at as is_moment,
                     date_part('epoch', least(s.ended_at, until) - greatest(s.started_at, since)) as seconds
              from spell s where not by_day
              union all
              select s.worker_id, s.run_id, s.kind, s.price, d.day, s.started_at = s.ended_at,
                     date_part('epoch', least(s.ended_at, until, d.day + interval '24 hours') - greatest(s.started_at, since, d.day))
              from spell s
              cross join generate_series(date_trunc('day', greatest(s.started_at, since), 'utc'), least(s.ended_at, until),
                                         interval '24 hours') as d (day)
              where by_day) as c
        where c.seconds > 0 or (c.seconds = 0 and c.is_moment)
    )
    select p.worker_id, p.run_id, p.day, sum(p.seconds), sum(p.usd), 0, 0, 0, 0
    from piece p where p.run_id is not null group by p.worker_id, p.run_id, p.day
    union all
    select o.worker_id, r.run_id, o.day, null, 0, o.boot * s.share, o.idle * s.share, o.teardown * s.share, 0
    from (select p.worker_id, p.day, coalesce(sum(p.usd) filter (where p.kind = 'boot'), 0) as boot,
                 coalesce(sum(p.usd) filter (where p.kind in ('idle', 'run')), 0) as idle,
                 coalesce(sum(p.usd) filter (where p.kind = 'teardown'), 0) as teardown
          from piece p where p.run_id is null group by p.worker_id, p.day) as o
    left join ran r on by_run and r.worker_id = o.worker_id
    cross join lateral (select coalesce(r.share, 1) as share) as s
    union all
    select r.worker_id, r.run_id, case when by_day then date_trunc('day', r.started_at, 'utc') end,
           null, 0, 0, 0, 0, b.usd
    from ran r
    join (select s.worker_id, sum(date_part('epoch', s.ended_at - s.started_at) * s.price) as usd
          from spell s where s.kind = 'boot' group by s.worker_id) as b on b.worker_id = r.worker_id
    where r.turn > 1 and (since is null or r.started_at >= since) and (until is null or r.started_at < until)
$$;

-- What the runs that a token asked for have cost until now, and the pods that were bought for it and ran nothing.
create function private.token_spent(for_token uuid) returns numeric
language sql stable security definer
set search_path = ''
as $$
    select coalesce(sum(c.direct_usd + c.boot_usd + c.idle_usd + c.teardown_usd), 0)
    from ledger.api_tokens t
    cross join lateral private.charges(t.organization_id, of_pods => array(
        select r.worker_id from ledger.runs r where r.token_id = t.id and r.worker_id is not null
        union
        select w.id from ledger.jobs j
        join ledger.worker w on w.organization_id = j.organization_id and w.bought_for = j.id
        where j.organization_id = t.organization_id and j.token_id = t.id)) as c
    left join ledger.runs r on r.id = c.run_id
    left join ledger.worker w on c.run_id is null and w.organization_id = t.organization_id and w.id = c.worker_id
    left join ledger.jobs j on j.organization_id = t.organization_id and j.id = w.bought_for
    where t.id = for_token and coalesce(r.token_id, j.token_id) = t.id
$$;

-- Names of tokens and who made them, for reports: members see what the organization's tokens cost.
create function private.token_names() returns table (id uuid, name text, created_by uuid)
language sql stable security definer
set search_path = ''
as $$
    select t.id, t.name, t.created_by from ledger.api_tokens t
    where t.organization_id = any (array(select private.my_orgs()))
$$;

-- The bill of a time, by what caused it: `group_by` is job, worker, token, user or day (in UTC). Whatever the grouping,
-- the rows add up to the bill. What nobody caused, or caused without a token, has no key and comes last. Pages go by key.
create function public.list_costs(
    group_by text, since timestamptz default null, until timestamptz default null, max_rows int default null,
    after_key text default null
) returns setof jsonb
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
as $$
declare
    org uuid := private.my_org();
begin
    if group_by is null or group_by not in ('job', 'worker', 'token', 'user', 'day') then
        raise exception 'group_by=% is none of job, worker, token, user, day', quote_nullable(group_by) using errcode = '22023';
    end if;
    return query
    with charged as (
        select c.*, case group_by
                        when 'job' then j.id
                        when 'worker' then c.worker_id
                        when 'day' then to_char(c.day at time zone 'utc', 'YYYY-MM-DD')
                        when 'token' then t.id::text
                        else coalesce(t.created_by, j.created_by)::text end as key
        from private.charges(org, since, until, group_by = 'day', group_by not in ('worker', 'day')) as c
        left join ledger.runs r on r.organization_id = org and r.id = c.run_id
        left join ledger.worker w on c.run_id is null and w.organization_id = org and w.id = c.worker_id
        left join ledger.jobs j on j.organization_id = org and j.id = coalesce(r.job_id, w.bought_for)
        left join private.token_names() t on t.id = case when r.id is null then j.token_id else r.token_id end
    ), summed as (
        select c.key, count(c.run_seconds) as runs, sum(c.direct_usd) as direct, sum(c.boot_usd) as boot, sum(c.idle_usd) as idle, sum(c.teardown_usd) as teardown,
               sum(c.saved_usd) as saved, coalesce(sum(c.run_seconds), 0) as run_seconds
        from charged c group by c.key)
    select jsonb_build_object(
        'key', s.key, 'label', coalesce(j.type, w.hardware, t.name, m.email), 'runs', s.runs,
        'direct_usd', s.direct, 'overhead_usd', s.boot + s.idle + s.teardown,
        'total_usd', s.direct + s.boot + s.idle + s.teardown, 'boot_usd', s.boot, 'idle_usd', s.idle,
        'teardown_usd', s.teardown, 'saved_usd', s.saved, 'run_seconds', s.run_seconds)
    from summed s
    left join ledger.jobs j on group_by = 'job' and j.organization_id = org and j.id = s.key
    left join ledger.worker w on group_by = 'worker' and w.organization_id = org and w.id = s.key
    left join private.token_names() t on group_by = 'token' and t.id::text = s.key
    left join ledger.members m on group_by = 'user' and m.organization_id = org and m.user_id::text = s.key
    where after_key is null or s.key collate "C" > after_key or s.key is null
    order by s.key collate "C" nulls last
    limit max_rows;
end
$$;

-- What a job has cost until now: all of its runs, with their share of what their pods did besides.
create function public.job_cost(job_id text) returns setof jsonb
language plpgsql stable
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    pods text[] := array(
        select r.worker_id from ledger.runs r
        where r.organization_id = org and r.job_id = job_cost.job_id and r.worker_id is not null
        union
        select w.id from ledger.worker w where w.organization_id = org and w.bought_for = job_cost.job_id);
begin
    return query
    select jsonb_build_object(
        'direct_usd', coalesce(sum(c.direct_usd), 0),
        'overhead_usd', coalesce(sum(c.boot_usd + c.idle_usd + c.teardown_usd), 0),
        'total_usd', coalesce(sum(c.direct_usd + c.boot_usd + c.idle_usd + c.teardown_usd), 0),
        'saved_usd', coalesce(sum(c.saved_usd), 0), 'run_seconds', coalesce(sum(c.run_seconds), 0))
    from private.charges(org, of_pods => pods) as c
    left join ledger.runs r on r.organization_id = org and r.id = c.run_id
    left join ledger.worker w on c.run_id is null and w.organization_id = org and w.id = c.worker_id
    where coalesce(r.job_id, w.bought_for) = job_cost.job_id
    having exists (select from ledger.jobs j where j.organization_id = org and j.id = job_cost.job_id);
end
$$;

-- True when `more` USD would go beyond the budget: spent, and what the live pods may still cost.
create function private.over_budget(more numeric) returns boolean
language sql stable security definer
set search_path = ''
as $$
    select exists (
        select from ledger.budgets b
        where b.organization_id = private.my_org() and more
            + (select coalesce(sum(private.cost_usd(i)), 0) from ledger.pod_intervals i
               join ledger.worker w on w.organization_id = i.organization_id and w.id = i.worker_id
               where i.organization_id = b.organization_id and w.status = 'terminated')
            + (select coalesce(sum(r.usd), 0) from ledger.reservations r where r.organization_id = b.organization_id)
            > b.limit_usd)
$$;

-- Null removes it.
create function public.set_budget(limit_usd numeric) returns setof jsonb
language plpgsql security definer
set search_path = ''
as $$
#variable_conflict use_column
begin
    perform private.require_admin();
    if set_budget.limit_usd is null then
        delete from ledger.budgets b where b.organization_id = private.my_org();
    else
        insert into ledger.budgets (organization_id, limit_usd) values (private.my_org(), set_budget.limit_usd)
        on conflict (organization_id) do update set limit_usd = excluded.limit_usd, updated_at = now();
    end if;
    perform private.audit('set_budget', coalesce(set_budget.limit_usd::text, 'none'));
    return query select jsonb_build_object('outcome', 'set');
end
$$;

-- `remaining_usd` is what new pods may still reserve: a live pod counts with all that it may cost, not with what it has.
create function public.get_budget() returns setof jsonb
language plpgsql stable
set search_path = ''
as $$
declare
    org uuid := private.my_org();
    most numeric := (select b.limit_usd from ledger.budgets b where b.organization_id = org);
    reserved numeric := (select coalesce(sum(r.usd), 0) from ledger.reservations r where r.organization_id = org);
begin
    return query
    select jsonb_build_object(
        'limit_usd', most, 'reserved_usd', reserved, 'spent_usd', coalesce(sum(private.cost_usd(i)), 0),
        'remaining_usd', case when most is not null then
            greatest(0, most - reserved - coalesce(sum(private.cost_usd(i)) filter (where w.status = 'terminated'), 0)) end)
    from ledger.pod_intervals i
    join ledger.worker w on w.organization_id = i.organization_id and w.id = i.worker_id
    where i.organization_id = org;
end
$$;
