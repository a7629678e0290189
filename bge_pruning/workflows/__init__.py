"""What one command does, from its arguments to its files."""
