"""What a run selected, on disk and in memory. Nothing here needs torch."""
