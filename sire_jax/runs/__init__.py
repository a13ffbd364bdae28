"""Several independent runs as compiled programs, over seeds, steps and devices."""
