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

-- What the runs that a token asked for have cost until now.
create function private.token_spent(for_token uuid) returns numeric
language sql stable security definer
set search_path = ''
as $$
    select coalesce(sum(private.cost_usd(i)), 0)
    from ledger.runs r join ledger.pod_intervals i on i.run_id = r.id
    where r.token_id = for_token
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

create function public.get_budget() returns setof jsonb
language sql stable
set search_path = ''
as $$
    select jsonb_build_object(
        'limit_usd', (select b.limit_usd from ledger.budgets b),
        'reserved_usd', (select coalesce(sum(r.usd), 0) from ledger.reservations r),
        'spent_usd', (select coalesce(sum(private.cost_usd(i)), 0) from ledger.pod_intervals i))
    where private.my_org() is not null
$$;
