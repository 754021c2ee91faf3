"""The demo: a sample corpus, the whole path over it, a judge and a report."""
