"""Where requests come from. Nothing here needs torch."""
