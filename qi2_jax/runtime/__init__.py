"""What every process needs: files, locks, signals, other processes, devices, errors."""
