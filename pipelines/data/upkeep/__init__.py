"""Looking after a dataset: status, verification, repair, estimates, the report."""
