"""The `cosface` command: demo, info, bench, plan and convert."""
