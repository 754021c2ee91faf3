"""Training runs side by side: read from MLflow, grouped by what differs, told as text, page, CSV and JSON."""
