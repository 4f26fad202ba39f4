"""The commands `actcache` and `saetrain`. Installed as `actcache_cli`."""
