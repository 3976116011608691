-- Scripts that log with `ow.run` outside a job: a job of type `script` with one run and a lease of its own.

create function public.open_script(for_job text, for_run uuid, as_boot uuid, command text, lease_seconds int)
returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    insert into ledger.jobs (id, organization_id, type, status, entrypoint, docker_image, started_at, created_by, token_id)
    values (for_job, private.my_org(), 'script', 'in_progress', command, '', now(), private.my_user(), private.my_token())
    on conflict (organization_id, id) do nothing;
    if found then
        insert into ledger.runs (id, organization_id, job_id, attempt, status, boot, started_at, token_id, lease_expires_at, mirrored)
        values (for_run, private.my_org(), for_job, 1, 'in_progress', as_boot, now(), private.my_token(),
                now() + make_interval(secs => least(lease_seconds, 3600)), true);
    end if;
    return query select jsonb_build_object('outcome', case when exists (
        select from ledger.runs r where r.id = for_run and r.job_id = for_job and r.boot = as_boot
        and r.status = 'in_progress' and r.lease_expires_at is not null) then 'opened' else 'refused' end);
end
$$;

create function public.renew_script(for_run uuid, as_boot uuid, lease_seconds int) returns setof jsonb
language plpgsql
set search_path = ''
as $$
begin
    update ledger.runs r set lease_expires_at = now() + make_interval(secs => least(lease_seconds, 3600))
    where r.id = for_run and r.boot = as_boot and r.status = 'in_progress' and r.lease_expires_at is not null;
    return query select jsonb_build_object('fenced', not found);
end
$$;

-- Scripts that were killed: nobody renews their lease any more.
create function public.expire_scripts() returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    silent record;
begin
    perform private.my_org();
    for silent in select r.id, r.job_id from ledger.runs r
                  where r.status = 'in_progress' and r.lease_expires_at < now() loop
        perform 1 from ledger.jobs j where j.id = silent.job_id for update;
        update ledger.runs r set status = 'failed', error = 'the script ended without a word', finished_at = now()
        where r.id = silent.id and r.status = 'in_progress' and r.lease_expires_at < now();
        if found then
            update ledger.jobs j
            set status = case when j.cancel_requested then 'canceled' else 'failed' end,
                error = 'the script ended without a word', finished_at = now()
            where j.id = silent.job_id and j.status = 'in_progress';
            perform private.notify('ow_job', silent.job_id);
            return query select jsonb_build_object('job_id', silent.job_id);
        end if;
    end loop;
end
$$;
