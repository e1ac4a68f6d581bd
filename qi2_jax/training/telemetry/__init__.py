"""What a run reports: metrics and their sinks, events, progress, profiles, and the watchdog."""
