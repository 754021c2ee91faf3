"""What is published: columns, writing, reading, the ledger."""
