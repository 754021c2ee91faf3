"""What models make, judged and compared."""
