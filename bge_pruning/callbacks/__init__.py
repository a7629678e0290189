"""What watches training and logs: gates, checkpoint metadata, metrics."""
