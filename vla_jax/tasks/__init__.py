"""Tasks: heads, losses and metrics, one file a task."""
