"""Models that look at pictures: loading and running them."""
