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
    'relay_sweep_inbox',
    'create_inbox',
    'enable_inbox_tracking',
    'disable_inbox_tracking',
    'drop_inbox',
    'inbox_status',
    'inbox_health',
    'replay_inbox_messages',
    'inbox_mark_processed',
    'inbox_mark_failed',
    -- what runs as the caller inside them
    'relay_inbox_fields',
    'relay_own_columns',
    'relay_require_free_inbox',
    'relay_build_inbox',
    'relay_build_inbox_views',
    'relay_view_name',
    'relay_relation',
    'relay_grant_inbox',
    'relay_register_inbox',
    'relay_inbox_problems',
    'relay_adopt_inbox',
    'relay_find_inbox',
    'relay_drop_inbox_objects',
    'relay_drop_own_inbox',
    'relay_unregister_inbox',
    'relay_mark_inbox',
    'relay_inbox_states'
);

