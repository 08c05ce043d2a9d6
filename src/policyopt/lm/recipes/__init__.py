"""Complete runs on public models and data, to be started as they are or read as examples."""
