-- What a member of pgtrickle_relay may call: the catalog's functions and the relay's own working
-- functions. Nobody may read or write the catalog's tables, public may call none of this.

select pgtrickle.relay_grant_execute(
    'pgtrickle_relay',
    -- pipelines
    'set_relay_outbox',
    'set_relay_inbox',
    'enable_relay',
    'disable_relay',
    'delete_relay',
    'get_relay_config',
    'list_relay_configs',
    'relay_validate_config',
    'relay_schema_version',
    -- positions
    'relay_claim',
    'relay_commit',
    'relay_reset_offset',
    'relay_release',
    'relay_cursor_get',
    'relay_cursor_set',
    'relay_lag',
    -- dead letters
    'relay_dead_letter',
    'relay_dlq_list',
    'relay_dlq_retry',
    'relay_dlq_retry_all',
    'relay_dlq_purge',
    'relay_dlq_stats',
    'relay_dlq_take',
    'relay_dlq_settle',
    'relay_dlq_fail',
    'relay_dlq_put_back',
    -- the fleet
    'relay_report',
    'relay_retire',
    'relay_fleet'
);

select pgtrickle.relay_grant_execute(
    'pgtrickle_relay',
    -- consumer groups
    'relay_group_create',
    'relay_group_drop',
    'relay_group_poll',
    'relay_group_commit',
    'relay_group_extend',
    'relay_group_release',
    'relay_group_heartbeat',
    'relay_group_seek',
    'relay_group_watermark',
    'relay_group_status',
    'create_consumer_group',
    'drop_consumer_group',
    'poll_outbox',
    'commit_offset',
    'extend_lease',
    'consumer_heartbeat',
    'seek_offset',
    'consumer_lag',
    -- what their thin forms call
    'relay_group_missing',
    'relay_group_commit_through',
    'relay_group_extend_newest',
    'relay_group_lag'
);

select pgtrickle.relay_grant_execute(
    'pgtrickle_relay',
    -- inboxes
    'relay_inbox',
    'relay_inbox_is_intact',
    'create_inbox',
    'enable_inbox_tracking',
    'disable_inbox_tracking',
    'drop_inbox',
    'inbox_status',
    'inbox_health',
    -- what runs as the caller inside them
    'relay_base_type',
    'relay_inbox_parts',
    'relay_inbox_problems',
    'relay_build_inbox',
    'relay_drop_inbox_parts',
    'relay_remove_inbox',
    -- definer halves, which look before they act
    'relay_create_inbox',
    'relay_register_inbox',
    'relay_forget_inbox'
);

-- An application marks messages with its own rights on the table.
select pgtrickle.relay_grant_execute(
    'public',
    'inbox_mark_processed',
    'inbox_mark_failed',
    'replay_inbox_messages',
    'relay_mark_inbox',
    'relay_find_inbox'
);

-- What the validation of a configuration calls.
select pgtrickle.relay_grant_execute(
    'pgtrickle_relay',
    'relay_pipeline_rules',
    'relay_backend_rules',
    'relay_required_keys',
    'relay_connection_keys',
    'relay_template_variables',
    'relay_refuse',
    'relay_refuse_key',
    'relay_refuse_pipeline_key',
    'relay_nearest',
    'relay_edit_distance',
    'relay_check_pipeline_keys',
    'relay_check_value',
    'relay_check_backend',
    'relay_check_backend_type',
    'relay_check_required_keys',
    'relay_check_template',
    'relay_check_combinations',
    'relay_check_secrets'
);

