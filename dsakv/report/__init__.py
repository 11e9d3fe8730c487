"""Analysis results for people: terminal tables and HTML."""
