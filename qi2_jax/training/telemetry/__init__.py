"""The reports of a run: metrics and their sinks, events, progress, profiles, and the watchdog."""
