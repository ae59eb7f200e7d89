"""What somebody without rights tries against the database side, on the oldest and newest server."""
