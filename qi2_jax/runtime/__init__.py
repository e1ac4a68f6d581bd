"""Operating-system and device services that every layer uses: files, locks, logging, processes, signals, devices."""
