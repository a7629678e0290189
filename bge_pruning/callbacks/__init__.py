"""What watches a run and logs it."""
