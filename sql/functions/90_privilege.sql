-- Who may execute which function. Nobody but the owner may do anything that is not listed here.

do $privileges$
declare
    public_functions constant text[] := array[
        -- Names, made from what everybody may see.
        'relay_relation', 'relay_find_outbox', 'relay_settings', 'relay_outbox_named', 'relay_captured_table',
        'relay_bound_triggers', 'relay_family', 'relay_free_name', 'relay_outbox_plan', 'relay_primary_key',
        'relay_channel', 'relay_rows',
        -- What the owner of a table calls: each makes ordinary DDL as its caller.
        'enable_outbox', 'repair_outbox', 'disable_outbox', 'relay_change_outbox', 'relay_enable', 'relay_repair',
        'relay_disable', 'adopt_outbox', 'relay_adopt', 'relay_adopted', 'relay_adopted_problem', 'relay_refuse_adopted',
        'relay_adopted_rows', 'relay_reader_settings', 'relay_settings_clause', 'relay_reader_source',
        'relay_sweeper_source', 'relay_check_adopted_columns', 'relay_make_beside',
        'relay_make_function', 'relay_claim_function', 'relay_check_stream', 'relay_capture_mode', 'relay_first_by',
        'relay_trigger_problems', 'relay_function_of', 'relay_function_problem',
        'relay_source', 'relay_capture_source', 'relay_capture_quick', 'relay_capture_first',
        'relay_snapshot_source', 'relay_check_event_triggers', 'relay_missing_grant', 'relay_extension_table',
        'backfill', 'relay_begin_backfill', 'relay_backfill_chunk', 'relay_backfill_function', 'relay_backfill_key',
        'relay_backfill_source', 'relay_function_shape', 'relay_say_rows',
        -- The catalog's halves of these: each acts for who has claimed a capture function.
        'relay_register_outbox', 'relay_register_adopted', 'relay_transfer_outbox', 'relay_drop_outbox',
        'relay_register_backfill', 'relay_lock_backfill', 'relay_note_backfill',
        -- What capture functions call, as the owner of their table.
        'relay_is_plain', 'relay_row_expression', 'relay_put', 'relay_is_quick', 'relay_current_rows',
        -- What reads or writes an outbox with its caller's own rights on it.
        'relay_wake', 'outbox_status', 'relay_status', 'outbox_publish', 'relay_publish',
        'relay_base_type', 'inbox_mark_processed', 'inbox_mark_failed', 'replay_inbox_messages', 'relay_mark_inbox', 'relay_find_inbox'
    ];
    publisher_functions constant text[] := array['relay_create_stream', 'relay_drop_stream'];
    relay_functions constant text[] := array[
        -- outboxes
        'relay_outbox_of', 'outbox_rows_consumed', 'relay_note_drained', 'relay_sleep', 'relay_capture_problems',
        'relay_sweep_outbox', 'relay_swept_outboxes', 'relay_due_snapshots', 'relay_snapshot_is_intact',
        'relay_end_snapshot',
        -- pipelines
        'set_relay_outbox', 'set_relay_inbox', 'relay_set_pipeline', 'relay_object', 'enable_relay', 'disable_relay',
        'relay_find_pipeline', 'relay_switch', 'relay_delete_pipeline', 'delete_relay', 'get_relay_config', 'list_relay_configs', 'relay_validate_config', 'relay_schema_version',
        -- positions
        'relay_claim', 'relay_commit', 'relay_release', 'relay_forget_group', 'relay_cursor_get', 'relay_cursor_set',
        'relay_seek', 'relay_seek_to', 'relay_seek_progress', 'relay_lag', 'relay_delivered', 'relay_to_repartition', 'relay_repartition',
        -- consumer groups
        'create_consumer_group', 'drop_consumer_group', 'poll_outbox', 'commit_offset', 'extend_lease',
        'consumer_heartbeat', 'seek_offset', 'consumer_lag', 'relay_group_create', 'relay_group_join',
        'relay_group_leave', 'relay_group_poll', 'relay_group_release',
        -- dead letters
        'relay_dead_letter', 'relay_dlq_list', 'relay_dlq_retry', 'relay_dlq_retry_all', 'relay_dlq_purge',
        'relay_dlq_stats', 'relay_dlq_take', 'relay_dlq_settle', 'relay_dlq_fail', 'relay_dlq_put_back',
        -- the fleet
        'relay_report', 'relay_retire', 'relay_fleet', 'relay_readers', 'relay_outbox_sizes',
        -- inboxes, and what runs as the caller inside them
        'relay_inbox', 'relay_inbox_is_intact', 'relay_refuse_deferred', 'create_inbox', 'enable_inbox_tracking', 'disable_inbox_tracking',
        'drop_inbox', 'inbox_status', 'inbox_health',
        'relay_inbox_parts', 'relay_inbox_problems',
        'relay_build_inbox', 'relay_drop_inbox_parts', 'relay_remove_inbox', 'relay_new_inbox', 'relay_adopted_inbox',
        -- definer halves of these, which look before they act
        'relay_create_inbox', 'relay_register_inbox', 'relay_forget_inbox',
        'relay_create_stream', 'relay_drop_stream'
    ];
    found record;
begin
    grant usage on schema @schema@ to public;
    for found in
        select p.oid::regprocedure as signature, p.proname::text as name, (
                -- Default privileges may have given it to others.
                select string_agg(distinct quote_ident(pg_get_userbyid(a.grantee)), ', ')
                from aclexplode(p.proacl) as a
                where a.grantee not in (0, p.proowner)
            ) as others
        from pg_proc as p
        join pg_namespace as n on n.oid = p.pronamespace
        where n.nspname = @schema_name@
            and p.proname <> 'relay_apply'
            -- Those of single inboxes have grants of their own.
            and p.proname !~ '^(receive|count|sweep)_'
    loop
        execute format('revoke all on routine %s from %s', found.signature, concat_ws(', ', 'public', found.others));
        if found.name = any (public_functions) then
            execute format('grant execute on routine %s to public', found.signature);
        end if;
        if found.name = any (publisher_functions) and to_regrole('pgtrickle_publisher') is not null then
            execute format('grant execute on routine %s to pgtrickle_publisher', found.signature);
        end if;
        if found.name = any (relay_functions) and to_regrole('pgtrickle_relay') is not null then
            execute format('grant execute on routine %s to pgtrickle_relay', found.signature);
        end if;
    end loop;
end
$privileges$;
