"""What the commands share: their settings, the run, its files, its pictures."""
