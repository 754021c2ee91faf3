"""The kernel of durable stages: it knows nothing of videos."""
