"""Data sets and models from the Hugging Face hub: found, downloaded, checked, and written out as plain files."""
