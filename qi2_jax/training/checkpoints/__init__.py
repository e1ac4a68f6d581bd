"""Checkpoints of a run: saving, restoring, checksums, retention, and copies on local disks."""
