"""What was trained, looked at and judged."""
