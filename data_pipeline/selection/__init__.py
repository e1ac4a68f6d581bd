"""Which records a stage trains on: thresholds, rules, the selection index, and the report page."""
