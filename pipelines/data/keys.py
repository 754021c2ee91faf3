"""Work keys: the one place that writes and parses the names of files, sources, clips and work on them."""


def clip_key(source_id: str, start_s: float, end_s: float) -> str:
    """Names a clip by what it shows: content hash of the source, and span in milliseconds."""
    return f"{source_id}:{round(start_s * 1000):08d}-{round(end_s * 1000):08d}"
