"""pgtrickle-relay moves events between PostgreSQL and messaging systems, without losing one."""

__version__ = "0.29.0"
