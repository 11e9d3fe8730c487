"""The step loop: requests in, steps out."""
