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
    if tg_op = 'UPDATE' and new.pod_id <> old.pod_id then
        -- One create made two, and it is the other one that works: the first is on the bill as well.
        insert into ledger.pod_intervals (organization_id, worker_id, kind, price_per_hour, started_at, ended_at, duplicate)
        values (new.organization_id, new.id, 'teardown', new.price_per_hour, new.created_at, now(), old.pod_id)
        on conflict do nothing;
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

create trigger track_interval after insert or update of status, run_id, price_per_hour, pod_id on ledger.worker
    for each row execute function private.track_interval();

create function private.cost_usd(spell ledger.pod_intervals) returns numeric
language sql stable
set search_path = ''
as $$ select spell.price_per_hour * extract(epoch from coalesce(spell.ended_at, now()) - spell.started_at) / 3600 $$;

-- Which pods were there in a time, and which were bought for a token's jobs: neither reads what else there is.
create index pod_intervals_ended on ledger.pod_intervals (organization_id, ended_at);
create index worker_bought_for on ledger.worker (organization_id, bought_for) where bought_for is not null;
create index jobs_token on ledger.jobs (token_id) where token_id is not null;

-- Every second of pods, charged to the runs that caused it. What a pod did while it ran nothing (boot, idle, teardown) is
-- shared among all of its runs by how long they ran, whenever that was: the parts of a longer time add up to the whole.
-- So of a pod that was there in the time asked for everything is read, and nothing of other pods. `run_id` is null for a
-- pod that ran nothing. Of a run that found its pod warm, `saved_usd` is what another boot would have cost. `by_day` shares
-- nothing and adds the UTC midnight before each charge. `run_seconds` is null where nothing ran.
create function private.charges(
    for_org uuid, since timestamptz default null, until timestamptz default null, by_day boolean default false,
    of_pods text[] default null
) returns table (worker_id text, run_id uuid, day timestamptz, run_seconds float8, direct_usd float8, boot_usd float8,
                 idle_usd float8, teardown_usd float8, saved_usd float8)
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'  -- so that a plan holds only what is asked for
set jit = off                              -- of days the planner expects a thousand times as many as there are
as $$
#variable_conflict use_column
begin
    if since is not null or until is not null then
        of_pods := array(
            select distinct i.worker_id from ledger.pod_intervals i
            where i.organization_id = for_org and (of_pods is null or i.worker_id = any (of_pods))
              and (since is null or i.ended_at >= since or i.ended_at is null) and (until is null or i.started_at <= until));
    end if;
    if of_pods = '{}' then
        return;
    end if;
    return query
    with spell as not materialized (
        select i.id, i.worker_id, i.kind, case i.kind when 'run' then i.run_id end as run_id, i.price_per_hour, i.started_at,
               coalesce(i.ended_at, now()) as ended_at
        from ledger.pod_intervals i
        where i.organization_id = for_org and (of_pods is null or i.worker_id = any (of_pods))
    ), piece as (
        select c.*, greatest(c.begins, since) as first, least(c.ends, until) as last
        from (select s.*, null::timestamptz as day, s.started_at as begins, s.ended_at as ends from spell s where not by_day
              union all
              select d.*, greatest(d.started_at, d.day), least(d.ended_at, d.day + interval '24 hours')
              from (select s.*, generate_series(date_trunc('day', s.started_at at time zone 'utc') at time zone 'utc', s.ended_at,
                                                interval '24 hours') as day
                    from spell s where by_day) as d) as c
    ), part as materialized (
        -- A run, or a kind of time in which a pod ran nothing. `seconds` and `usd` are of the time asked for, and null if it
        -- was not then. A run has one price, so it is one row (by day: one a day); the lowest id tells a pod's first run.
        select t.*, t.seconds * t.price_per_hour::float8 / 3600 as usd,
               case t.kind when 'boot' then t.ever_seconds * t.price_per_hour::float8 / 3600 end as ever_boot_usd
        from (select p.worker_id, p.kind, p.run_id, p.day, p.price_per_hour, min(p.id) as id, min(p.started_at) as started_at,
                     sum(date_part('epoch', p.ends - p.begins)) as ever_seconds,
                     sum(date_part('epoch', p.last - p.first))
                         filter (where p.first < p.last or p.first = p.last and p.started_at = p.ended_at) as seconds
              from piece p group by p.worker_id, p.kind, p.run_id, p.day, p.price_per_hour) as t
    ), pod as materialized (
        select p.worker_id, count(p.run_id) as runs, min(p.id) filter (where p.run_id is not null) as first_id,
               sum(p.ever_seconds) filter (where p.run_id is not null) as ever_seconds,
               coalesce(sum(p.ever_boot_usd), 0) as ever_boot_usd,
               sum(p.usd) filter (where p.run_id is null) is not null as was_there,
               coalesce(sum(p.usd) filter (where p.kind = 'boot'), 0) as boot,
               coalesce(sum(p.usd) filter (where p.kind in ('idle', 'run') and p.run_id is null), 0) as idle,
               coalesce(sum(p.usd) filter (where p.kind = 'teardown'), 0) as teardown
        from part p group by p.worker_id
    )
    select o.worker_id, r.run_id, null::timestamptz, r.seconds, coalesce(r.usd, 0), o.boot * s.share, o.idle * s.share,
           o.teardown * s.share,
           case when r.id > o.first_id and (since is null or r.started_at >= since) and (until is null or r.started_at < until)
                then o.ever_boot_usd else 0 end
    from pod o
    left join part r on r.worker_id = o.worker_id and r.run_id is not null
    -- Runs that took no time share alike.
    cross join lateral (select case o.runs when 0 then 1 else coalesce(r.ever_seconds / nullif(o.ever_seconds, 0), 1.0::float8 / o.runs)
                               end as share) as s
    where not by_day and (r.seconds is not null or o.was_there)
    union all
    select p.worker_id, p.run_id, p.day, case when p.run_id is not null then p.seconds end,
           case when p.run_id is not null then p.usd else 0 end, case p.kind when 'boot' then p.usd else 0 end,
           case when p.kind in ('idle', 'run') and p.run_id is null then p.usd else 0 end,
           case p.kind when 'teardown' then p.usd else 0 end, 0
    from part p where by_day and p.seconds is not null
    union all
    select r.worker_id, null, date_trunc('day', r.started_at, 'utc'), null, 0, 0, 0, 0, sum(o.ever_boot_usd)
    from (select p.worker_id, min(p.id) as id, min(p.started_at) as started_at
          from part p where by_day and p.run_id is not null group by p.worker_id, p.run_id) as r
    join pod o on o.worker_id = r.worker_id and r.id > o.first_id
    where (since is null or r.started_at >= since) and (until is null or r.started_at < until)
    group by r.worker_id, 3;
end
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
    where t.id = for_token and case
        when c.run_id is not null then exists (select from ledger.runs r where r.id = c.run_id and r.token_id = t.id)
        else exists (select from ledger.worker w
                     join ledger.jobs j on j.organization_id = w.organization_id and j.id = w.bought_for
                     where w.organization_id = t.organization_id and w.id = c.worker_id and j.token_id = t.id) end
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
                        when 'token' then t.id::text
                        when 'user' then coalesce(t.created_by, j.created_by)::text end as key
        from private.charges(org, since, until, group_by = 'day') as c
        left join ledger.runs r on r.organization_id = org and r.id = c.run_id
        left join ledger.worker w on c.run_id is null and w.organization_id = org and w.id = c.worker_id
        left join ledger.jobs j on j.organization_id = org and j.id = coalesce(r.job_id, w.bought_for)
        left join private.token_names() t on group_by in ('token', 'user') and t.id = case when r.id is null then j.token_id else r.token_id end
    ), summed as (
        select coalesce(c.key, to_char(c.day at time zone 'utc', 'YYYY-MM-DD')) as key, count(c.run_seconds) as runs,
               sum(c.direct_usd) as direct, sum(c.boot_usd) as boot, sum(c.idle_usd) as idle, sum(c.teardown_usd) as teardown,
               sum(c.saved_usd) as saved, coalesce(sum(c.run_seconds), 0) as run_seconds
        from charged c group by c.key, c.day)
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
