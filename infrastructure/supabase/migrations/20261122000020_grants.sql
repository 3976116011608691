-- Who may call what. A function that is not named here can be called by nobody but the owner; anon calls nothing.

create function public.expire_events(older_than_days int, max_rows int default 10000) returns setof jsonb
language plpgsql
set search_path = ''
as $$
declare
    deleted int;
begin
    perform private.my_org();
    if older_than_days < 1 then
        raise exception 'older_than_days=% is not at least 1', older_than_days using errcode = '22023';
    end if;
    delete from ledger.events e where e.id in (
        select old.id from ledger.events old
        where old.created_at < now() - make_interval(days => older_than_days)
          and old.run_id in (select r.id from ledger.runs r where r.finished_at < now() - make_interval(days => older_than_days))
        order by old.id  -- the oldest first: what is left has no gap
        limit max_rows);
    get diagnostics deleted = row_count;
    return query select jsonb_build_object('deleted', deleted);
end
$$;

revoke execute on all functions in schema public, private from public, anon, authenticated, service_role, ow_worker, ow_pod;
-- The helpers do nothing that their caller may not do, except for those that check who calls; policies need some of them.
grant execute on all functions in schema private to authenticated, ow_worker, ow_pod, service_role;

do $$
declare
    given record;
    name text;
begin
    for given in values
        ('authenticated', 'whoami create_organization list_organizations rename_organization list_members set_member_role
          remove_member create_invitation list_invitations accept_invitation create_token list_tokens revoke_token
          set_token_limit list_audit set_secret list_secrets delete_secret read_secret list_sealed replace_sealed
          set_budget get_budget list_costs job_cost explain_job
          register_file get_files list_files delete_file submit_job get_job list_jobs find_jobs cancel_job restart_job
          get_run list_runs list_events latest_events read_log list_workers request_shutdown extend_pod ping
          open_script renew_script append_events append_log finish_run'),
        ('ow_worker', 'whoami ping submit_job cancel_job restart_job get_job list_jobs get_run list_runs list_events get_files list_workers
          control_snapshot record_flow_run adopt_flow_run hint_runs set_ceilings set_pending_reasons intend_pod record_pod lose_pod
          expire_leases end_pod fail_job known_pods record_duplicate pod_of_proxy abandon_run request_shutdown mark_mirrored known_runs expire_scripts expire_events
          get_budget publish_catalogue note_refusal clear_refusal'),
        ('ow_pod', 'whoami ping register_pod renew_lease open_run append_events append_log finish_run release_pod reject_pod extend_pod
          abandon_run register_file get_files list_events latest_events job_secrets'),
        ('service_role', 'exchange_token redeem_bootstrap')
    loop
        foreach name in array regexp_split_to_array(trim(given.column2), '\s+') loop
            execute format('grant execute on function public.%I to %I', name, given.column1);
        end loop;
    end loop;
end
$$;
