"""What a run prints, writes and plots."""
