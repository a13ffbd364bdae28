"""What programs stand on: processes, signals, statuses, progress, compiled programs."""
