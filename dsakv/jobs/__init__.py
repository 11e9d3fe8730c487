"""What each command does, as library calls."""
