"""What a run keeps: its workdir, its checkpoints, and how damage is noticed."""
